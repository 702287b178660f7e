"""A vocabulary of the entries of World that a text uses most."""

import json
import sys

import pytest

import rwkv7_jax as rwkv
from benchmarks import small_vocabulary
from rwkv7_jax.text import load_vocabulary

TEXT = "The cat sat on the mat. Ünïcödé "


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["small_vocabulary", *map(str, words)])
    small_vocabulary.main()


def written(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_most_used_entries_are_kept_in_worlds_order():
    world = rwkv.Tokenizer.world()
    used = ["mat mat mat", " the the", " once"]
    small = small_vocabulary.small_vocabulary(used, 257 + 2)
    entries = [small.token_bytes(number) for number in range(small.vocab_size)]
    assert entries[:257] == [world.token_bytes(number) for number in range(257)]
    counted = entries[257:]
    assert set(counted) == {b" mat", b" the"}
    assert counted == sorted(counted, key=lambda entry: world.encode(entry)[0])


@pytest.mark.parametrize("size", [257, 300, 4096])
def test_any_text_survives(size):
    small = small_vocabulary.small_vocabulary([TEXT * 3], size)
    assert small.vocab_size == size and small.stop_ids == (0,)
    for text in (TEXT, "日本 \0\n", "never seen"):
        assert small.decode(small.encode(text)) == text


def test_every_entry_is_worlds_where_the_size_is():
    world = rwkv.Tokenizer.world()
    small = small_vocabulary.small_vocabulary([TEXT], world.largest_id + 1)
    assert small.encode(TEXT) == world.encode(TEXT)


def test_the_file_is_a_vocabulary_of_a_model(tmp_path, monkeypatch, capsys):
    text = written(tmp_path / "a.jsonl", [TEXT * 8] * 20)
    run(monkeypatch, text, tmp_path / "a.txt", "--size", 300)
    tokenizer = load_vocabulary(str(tmp_path / "a.txt"), 300, argument="x")
    size = len(TEXT.encode() * 8) / len(tokenizer.encode(TEXT * 8))
    assert f"{size:.2f} bytes per token" in capsys.readouterr().out
    assert size > 1.5


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (['{"text": "a"}'] * 20, 256, "`size` must be from 257 to 65,530; got 256"),
        (['{"text": "a"}'] * 20, 70_000, "`size` must be from 257 to 65,530"),
        (['{"text": "a"}'] * 9, 300, "fewer than 10 documents"),
        (
            ['{"text": "a"}'] * 9 + ['{"words": 1}'],
            300,
            "a.jsonl:10: must be an object",
        ),
        (["[1]"] * 10, 300, "a.jsonl:10: must be an object"),
        (['{"text": 3}'] * 10, 300, "a.jsonl:10: must be an object"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    lines, size, message, tmp_path, monkeypatch
):
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match=r"^small_vocabulary: ") as error:
        run(monkeypatch, tmp_path / "a.jsonl", tmp_path / "a.txt", "--size", size)
    assert message in str(error.value)
    assert not (tmp_path / "a.txt").exists()


def test_a_file_that_is_no_text_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"\x9c\xff\n" * 20)
    with pytest.raises(SystemExit, match=r"a\.jsonl:10: must be an object"):
        run(monkeypatch, tmp_path / "a.jsonl", tmp_path / "a.txt")


def test_a_folder_is_no_target_and_a_missing_one_is_made(tmp_path, monkeypatch):
    text = written(tmp_path / "a.jsonl", [TEXT] * 10)
    with pytest.raises(SystemExit, match="`target` must be a file"):
        run(monkeypatch, text, tmp_path)
    run(monkeypatch, text, tmp_path / "new" / "a.txt", "--size", 300)
    assert (tmp_path / "new" / "a.txt").exists()


def test_a_missing_text_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"gone\.jsonl"):
        run(monkeypatch, tmp_path / "gone.jsonl", tmp_path / "a.txt")
