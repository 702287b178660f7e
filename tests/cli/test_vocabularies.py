"""`--vocabulary` of the commands: numbers, files, what a folder keeps, what is rejected."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from genuine_checkpoints import REVERSE, TINY, genuine
from random_checkpoints import random_params
from small_vocabularies import DIGITS, WORDS, byte_level_bpe

from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.checkpoints.model_vocabulary import kept_vocabulary
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.text.vocabularies import load_vocabulary


def numbers():
    """The numbers of the author's own test: ten of each length from 1 to 60 digits."""
    draw = random.Random(42)
    for length in range(1, 61):
        least = 0 if length == 1 else 10 ** (length - 1)
        for _ in range(10):
            yield str(draw.randint(least, 10**length - 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds vocabularies, and models of 12, 24 and 400 ids; one of 300 fits an HF folder."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "digits.txt").write_text(DIGITS)
    (folder / "words.txt").write_text(WORDS)
    for vocab_size in (12, 24, 300, 400):
        width = 64 if vocab_size == 300 else 16
        config = RWKV7Config(
            vocab_size=vocab_size,
            num_layers=1,
            width=width,
            head_size=width,
            ffn_width=width,
        )
        params = random_params(config, dtype=jnp.float32, scale=0.3)
        save_model(folder / f"m{vocab_size}.pth", params, config)
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """`command(*words)` runs `rwkv7` among the files; gives the code and what it printed."""
    monkeypatch.chdir(folder)

    def call(*words):
        code = main([*words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def generated(command, *words):
    """Runs `generate` and returns its report."""
    code, out, err = command("generate", "--tokens", "9", "--json", *words)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("vocabulary", "prompt", "end"),
    [("digits.txt", "{},", ["--stop", "#"]), ("ids", "{} 10", ["--stop-ids", "11"])],
)
def test_a_published_model_writes_numbers_backwards(command, vocabulary, prompt, end):
    model = str(genuine(REVERSE))
    number = "31415926535"
    spaced = number if vocabulary != "ids" else " ".join(number)
    words = ["--model", model, "--vocabulary", vocabulary, "--tokens", "64", *end]
    words += ["--temperature", "0", "--prompt", prompt.format(spaced)]
    code, out, err = command("generate", *words)
    assert code == 0, err
    assert out.replace(" ", "") == "53562951413\n"


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["digits.txt", "ids"])
def test_a_published_model_passes_its_authors_test(folder, vocabulary):
    from rwkv7_jax.cli.inputs import read_model
    from rwkv7_jax.generation.generate import generate

    model = read_model(str(genuine(REVERSE)))
    name = vocabulary if vocabulary == "ids" else str(folder / vocabulary)
    tokenizer = model.tokenizer(name)
    written = list(numbers())
    ids = "{} 10".format if vocabulary == "ids" else "{},".format
    prompts = []
    for number in written:
        spaced = " ".join(number) if vocabulary == "ids" else number
        prompts.append(tokenizer.encode(ids(spaced)))
    out = generate(
        model.module,
        model.params,
        prompts,
        tokens=64,
        temperature=0,
        stop_ids=(11,),
        tokenizer=tokenizer,
    )
    right = 0
    for number, text, finished in zip(written, out.texts, out.finished, strict=True):
        # The digits and the mark that ends them.
        if text.replace(" ", "") == number[::-1] and finished == "stop":
            right += len(number) + 1
    assert right == 18_900


def test_ids_are_read_and_written_as_numbers(command):
    words = ["--model", "m12.pth", "--vocabulary", "ids"]
    report = generated(command, *words, "--prompt", "3, 1 4")
    assert report["prompt_tokens"] == 3
    assert [int(number) for number in report["text"].split()] == report["tokens"]
    again = generated(command, *words, "--prompt", "3 1 4\n")
    assert again["tokens"] == report["tokens"]
    stop = str(report["tokens"][4])
    cut = generated(
        command, *words, "--prompt", "3 1 4", "--stop-ids", f"{stop},{stop}"
    )
    assert cut["finished"] == "stop"
    assert cut["tokens"] == report["tokens"][: report["tokens"].index(int(stop))]


def test_a_model_of_256_ids_reads_raw_bytes(command, folder):
    report = generated(
        command, "--model", str(genuine(TINY)),
        "--prompt", "hi\x01", "--temperature", "0",
    )  # fmt: skip
    assert report["prompt_tokens"] == 3 and len(report["tokens"]) == 9


def test_ids_without_an_entry_are_counted_once(command):
    code, out, err = command(
        "generate", "--model", "m24.pth", "--vocabulary", "words.txt", "--json",
        "--tokens", "40", "--prompt", "ab", "--temperature", "2",
    )  # fmt: skip
    silent = [
        n for n in json.loads(out)["tokens"] if n not in (1, 2, 3, 4, 7, 9, 10, 20)
    ]
    assert code == 0 and silent
    assert err.startswith(
        f"note: {len(silent)} of the {len(json.loads(out)['tokens'])} ids"
    )
    assert err.count("\n") == 1


def test_a_stop_string_may_begin_inside_a_vocabulary_entry(command, tmp_path):
    lines = "".join(f"{i} 'x{i:02}y' 4\n" for i in range(12))
    (tmp_path / "v.txt").write_text(lines)
    words = ["--model", "m12.pth", "--vocabulary", str(tmp_path / "v.txt")]
    report = generated(command, *words, "--prompt", "x01y", "--stop", "y")
    assert report["text"] == report["text"][:3] and report["tokens"] == []
    assert report["finished"] == "stop"


@pytest.mark.parametrize("kind", ["words.txt", "tokenizer.json"])
def test_an_orbax_folder_needs_no_option(command, folder, tmp_path, kind):
    if kind == "tokenizer.json":
        pytest.importorskip(
            "tokenizers", reason="the extra tokenizers is not installed"
        )
        vocabulary = str(byte_level_bpe(tmp_path / "hf"))
    else:
        vocabulary = kind
    code, _, err = command(
        "convert", "m400.pth", str(tmp_path / "m"), "--vocabulary", vocabulary
    )
    assert code == 0, err
    # From folder to folder it is kept.
    assert command("convert", str(tmp_path / "m"), str(tmp_path / "n"))[0] == 0
    words = ["--prompt", "ab", "--seed", "3"]
    named = generated(
        command, "--model", "m400.pth", "--vocabulary", vocabulary, *words
    )
    kept = generated(command, "--model", str(tmp_path / "n"), *words)
    assert kept == named


HF_VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("kind", ["words.txt", "tokenizer.json"])
def test_an_hf_folder_keeps_its_vocabulary_even_in_place(
    command, folder, tmp_path, kind
):
    vocabulary = kind
    if kind == "tokenizer.json":
        pytest.importorskip(
            "tokenizers", reason="the extra tokenizers is not installed"
        )
        vocabulary = str(byte_level_bpe(tmp_path / "bpe"))
    target = str(tmp_path / "m")
    hf = ["--format", "hf"]
    words = ["convert", "m300.pth", target, *hf, "--vocabulary", vocabulary]
    assert command(*words)[0] == 0
    before = {name: (tmp_path / "m" / name).read_text() for name in HF_VOCABULARY}
    code, _, err = command("convert", target, target, *hf)
    assert code == 0, err
    after = {name: (tmp_path / "m" / name).read_text() for name in HF_VOCABULARY}
    assert after == before
    assert command("convert", target, str(tmp_path / "n"))[0] == 0
    given = load_vocabulary(folder / vocabulary, 300)
    kept = kept_vocabulary(tmp_path / "n", 300)
    assert kept is not None and kept.identity == given.identity


def test_an_unreadable_vocabulary_is_rejected_before_anything_is_replaced(
    command, tmp_path
):
    target = str(tmp_path / "m")
    hf = ["--format", "hf"]
    words = ["convert", "m300.pth", target, *hf, "--vocabulary", "words.txt"]
    assert command(*words)[0] == 0
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    for options in (hf, ["--format", "transformers"]):
        code, _, err = command("convert", target, target, *options)
        assert code == 2 and err.count("\n") == 1
        assert "name another with `--vocabulary` (`config.data.vocabulary`)" in err
    after = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    assert after == before
    # Weights alone need none, and another may be named.
    assert command("convert", target, str(tmp_path / "m.pth"))[0] == 0
    assert command("convert", target, target, *hf, "--vocabulary", "words.txt")[0] == 0


def test_a_cache_identifies_a_vocabulary_file_by_its_content(command, folder, tmp_path):
    (tmp_path / "x.txt").write_text("120,021#31,13#")
    cache = str(tmp_path / "x.bin")
    words = ["data", str(tmp_path / "x.txt"), cache, "--vocabulary", "digits.txt"]
    code, out, _ = command(*words)
    assert code == 0
    assert "14 digits.txt tokens (all in the loss) of 14 bytes" in out
    show = ["data", cache, "--show", "1", "--length", "7"]
    code, out, _ = command(*show, "--vocabulary", "digits.txt")
    assert code == 0 and "\n[[2]]1#31,13\n" in out and "ends a document" not in out
    code, _, err = command(*show)
    assert code == 2 and "`--vocabulary` must name the vocabulary file that" in err
    code, _, err = command(*show, "--vocabulary", "words.txt")
    assert code == 2 and "must be of the model's vocabulary, file " in err
    (tmp_path / "renamed.txt").write_text(DIGITS)
    assert command(*show, "--vocabulary", str(tmp_path / "renamed.txt"))[0] == 0


def test_data_given_as_numbers_may_have_large_ids(command, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "1 2", "answer": "70000, 3"}\n{"text": "5"}\n'
    )
    cache = str(tmp_path / "x.bin")
    words = ["data", str(tmp_path / "x.jsonl"), cache, "--vocabulary", "ids"]
    assert command(*words)[0] == 0
    assert np.fromfile(cache, "<i4").tolist() == [1, 2, 70000, 3, 5]
    code, out, _ = command(
        "data", cache, "--show", "2", "--packing", "documents", "--length", "3"
    )
    assert code == 0 and "[[1 2 ]]70000 3 " in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "generate --model m12.pth --prompt 1",
            "`--vocabulary` must name the vocabulary of a model of 12 ids: ids, a vocab",
        ),
        (
            "generate --model m12.pth --prompt 1 --vocabulary bytes",
            "`--vocabulary` must have ids below the model's 12; got bytes, whose large",
        ),
        (
            "generate --model m12.pth --prompt abc --vocabulary digits.txt",
            "must consist of entries of digits.txt; none begins at byte 0, b'abc'.",
        ),
        (
            "generate --model m12.pth --prompt 12 --vocabulary ids",
            "must hold ids from 0 and below 12 separated by spaces or commas; got",
        ),
        (
            "generate --model m12.pth --prompt= --vocabulary digits.txt",
            "`--prompt` must hold a token, because digits.txt has no end of text",
        ),
        (
            "generate --model m12.pth --prompt 1 --vocabulary ids --stop-ids 12",
            "generate: `stop_ids` must hold ids at least 0 and below 12; got 12",
        ),
        (
            "generate --model m12.pth --prompt 1 --vocabulary ids --stop-ids 1,x",
            "`--stop-ids` must be a whole number; got 'x'",
        ),
        (
            "generate --model m12.pth --prompt 1 --vocabulary ids --chat",
            "must hold ids from 0 and below 12 separated by spaces or commas; got",
        ),
        (
            "convert m12.pth n --vocabulary bytes",
            "convert: `--vocabulary` must have ids below the model's 12; got bytes",
        ),
        (
            "convert m12.pth n.pth --vocabulary bytes",
            "convert: `--vocabulary` must have ids below the model's 12; got bytes",
        ),
        (
            "convert m12.pth n.pth --vocabulary none.txt",
            "`--vocabulary` must be",
        ),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_rejected_in_one_sentence(
    command, words, sentence
):
    code, _, err = command(*words.split())
    assert code == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "st"])
def test_a_format_without_a_vocabulary_is_written_with_a_note(
    command, tmp_path, suffix
):
    plain = tmp_path / f"a.{suffix}"
    named = tmp_path / f"b.{suffix}"
    code, out, _ = command("convert", "m12.pth", str(plain))
    assert code == 0 and "note" not in out
    words = ["convert", "m12.pth", str(named), "--vocabulary", "digits.txt"]
    code, out, err = command(*words)
    assert code == 0 and err == ""
    assert f"note: {named} holds no vocabulary" in out
    assert "`--vocabulary digits.txt`" in out
    assert named.read_bytes() == plain.read_bytes()
