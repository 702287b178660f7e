"""`rwkv7 data`: what it writes, counts, shows and rejects."""

import pytest

from rwkv7_jax.cli.commands import main
from rwkv7_jax.data.loading import token_stream
from rwkv7_jax.text.tokenizer import Tokenizer

LINES = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    '{"prompt": "2+2=", "answer": "4"}\nbad\n{"text": "The sea is deep."}\n'
)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES)
    return str(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["out", "out.bin", "new/v1.5"])
def test_text_becomes_a_cache_and_is_counted(file, tmp_path, capsys, name):
    target = str(tmp_path / name)
    assert (
        main(["data", file, target, "--vocabulary", "bytes", "--on-bad", "skip"]) == 0
    )
    path = target if target.endswith(".bin") else f"{target}.bin"
    printed = capsys.readouterr().out
    assert (
        f"{path}: 3 documents, 47 bytes tokens (23 in the loss) of 44 bytes" in printed
    )
    assert f"lines skipped: 1; the first: {file}:3: not one JSON object" in printed
    assert len(token_stream(path, Tokenizer.bytes())) == 47


def test_rows_are_shown_with_brackets_around_tokens_outside_the_loss(
    file, tmp_path, capsys
):
    cache = str(tmp_path / "x.bin")
    main(["data", file, cache, "--vocabulary", "bytes", "--on-bad", "skip"])
    capsys.readouterr()
    shown = []
    for options in (
        [cache],
        [cache.removesuffix(".bin")],
        [file, "--vocabulary", "bytes", "--on-bad", "skip"],
    ):
        rows = ["--show", "3", "--length", "30", "--packing", "documents"]
        if options[0] == file:
            with pytest.warns(UserWarning, match="1 lines of"):
                assert main(["data", *options, *rows]) == 0
        else:
            assert main(["data", *options, *rows]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert "3 documents, 47 bytes tokens, 23 in the loss; hash " in shown[0]
    for text in (
        "targets in the loss, 7 tokens of padding\n[[User: Hi\n\nAssistant:]] Ho<0>\n",
        "2 targets in the loss, 25 tokens of padding\n[[2+2=]]4<0>\n",
        "[[T]]he sea is deep.<0>\n",
    ):
        assert text in shown[0]


def test_a_cache_named_without_its_suffix_is_rejected_as_a_source(
    file, tmp_path, capsys
):
    cache = str(tmp_path / "c")
    main(["data", file, cache, "--vocabulary", "bytes", "--on-bad", "skip"])
    assert main(["data", cache, str(tmp_path / "d")]) == 2
    assert "`SOURCE` must be text; got the token cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{file}", "{folder}/out"], "x.jsonl:3: not one JSON object"),
        (["{file}"], "`OUT` must be given, or `--show`; got neither"),
        (["nowhere", "{folder}/out"], "`nowhere` must be a file, a folder"),
        (
            ["{folder}/x.bin", "{folder}/out"],
            "`SOURCE` must be text; got the token cache",
        ),
        (["{folder}/x.bin", "--show", "1"], "x.bin` does not exist"),
        (["{file}", "--show", "0"], "`--show` must be at least 1; got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(file, tmp_path, capsys, words, reason):
    assert (
        main(["data", *(word.format(file=file, folder=tmp_path) for word in words)])
        == 2
    )
    printed = capsys.readouterr().err
    assert reason in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
