"""`rwkv7 generate`: continued sessions, escapes, and terminals with a limited encoding."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params

from rwkv7_jax.checkpoints import (
    load_logits,
    load_model,
    load_state,
    read_sidecar,
    read_tensors,
    save_model,
    save_state,
)
from rwkv7_jax.cli import generate as command
from rwkv7_jax.cli.arguments import unescape
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state

# One layer compiles fastest.
CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk."""
    folder = tmp_path_factory.mktemp("files")
    params = random_params(CONFIG, dtype=jnp.float32, scale=0.3)
    save_model(folder / "m.pth", params, CONFIG)
    return folder


@pytest.fixture
def generate(folder, monkeypatch, capsys):
    """`generate(*words)` runs the command among the files and returns its JSON."""
    monkeypatch.chdir(folder)

    def call(*words):
        options = ["--model", "m.pth", "--temperature", "0", "--json"]
        assert main(["generate", *options, *words]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "st"])
def test_a_session_continues_from_its_saved_state(generate, folder, suffix):
    file = f"session.{suffix}"
    once = generate("--prompt", "abcdef", "--tokens", "0", "--save-state", "whole.pth")
    assert once["tokens"] == []
    generate("--prompt", "abc", "--tokens", "0", "--save-state", file)
    generate("--prompt", "def", "--tokens", "0", "--state", file, "--save-state", file)
    one = load_state(folder / "whole.pth")
    two = load_state(folder / file)
    for name in ("att_shift", "wkv", "ffn_shift"):
        assert np.any(getattr(one, name))
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-5)
    assert read_sidecar(folder / file)["session"] == "text"


def test_a_resumed_answer_equals_an_uninterrupted_one(generate):
    whole = generate("--prompt", "ab", "--tokens", "9")
    first = generate("--prompt", "ab", "--tokens", "4", "--save-state", "s.pth")
    # The last token is read by the state, so the next text follows it.
    rest = generate("--prompt", "x", "--tokens", "3", "--state", "s.pth")
    assert whole["tokens"][:4] == first["tokens"]
    both = generate("--prompt", "ab" + first["text"] + "x", "--tokens", "3")
    if first["text"].isascii() and len(first["text"]) == 4:
        assert both["tokens"] == rest["tokens"]


@pytest.mark.parametrize("prompt", [[], ["--prompt", ""]])
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "st"])
def test_an_answer_that_was_cut_off_resumes_bit_exactly(
    generate, folder, suffix, prompt
):
    file = f"cut.{suffix}"
    words = ["--prompt", "ab", "--stop-ids", "300"]
    whole = generate(*words[:2], "--tokens", "9", "--save-state", f"w.{suffix}")
    first = generate(*words[:2], "--tokens", "4", "--save-state", file)
    rest = generate(*prompt, "--tokens", "5", "--state", file, "--save-state", file)
    assert rest["prompt"] == "" and rest["prompt_tokens"] == 0
    assert first["tokens"] + rest["tokens"] == whole["tokens"]
    assert len(first["tokens"]) == 4 and rest["tokens"]
    one = load_state(folder / f"w.{suffix}")
    two = load_state(folder / file)
    for name in ("att_shift", "wkv", "ffn_shift"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    logits = load_logits(folder / file, config=CONFIG)
    np.testing.assert_array_equal(load_logits(folder / f"w.{suffix}"), logits)
    assert logits.shape == (1, 257)


def test_a_session_continues_from_a_converted_file(generate, capsys):
    whole = generate("--prompt", "ab", "--tokens", "9")
    generate("--prompt", "ab", "--tokens", "4", "--save-state", "c.pth")
    assert main(["state", "convert", "c.pth", "c.st"]) == 0
    capsys.readouterr()
    rest = generate("--tokens", "5", "--state", "c.st")
    assert whole["tokens"][4:] == rest["tokens"]


def test_a_chat_session_continues_as_a_chat(generate, folder, monkeypatch):
    ask = ["--prompt", "Hi", "--chat"]
    first = generate(*ask, "--tokens", "3", "--save-state", "c.pth")
    whole = generate(*ask, "--tokens", "40")["tokens"]
    # An answer's end that is found in this one shows whether it is looked for.
    ends = [
        token for token in whole[3:] if token <= 128 and token not in first["tokens"]
    ]
    monkeypatch.setattr(command, "CHAT_STOP", chr(ends[0] - 1))
    for words in ([], ["--chat"]):
        words = [*words, "--state", "c.pth", "--save-state", "d.pth"]
        rest = generate(*words, "--tokens", "37")
        assert rest["finished"] == "stop"
        assert first["tokens"] + rest["tokens"] == whole[: whole.index(ends[0])]
        assert read_sidecar(folder / "d.pth")["session"] == "chat"


def test_an_empty_text_begins_after_a_tuned_state(generate, folder):
    save_state(folder / "tuned.pth", init_state(CONFIG))
    begun = generate("--prompt", "", "--tokens", "3", "--state", "tuned.pth")
    assert begun["prompt_tokens"] == 1
    assert begun["tokens"] == generate("--prompt", "", "--tokens", "3")["tokens"]


def test_a_session_file_is_also_a_state_file(generate, folder):
    generate("--prompt", "ab", "--tokens", "2", "--save-state", "c.pth")
    names = list(read_tensors(folder / "c.pth"))
    # Other tools take the shape of the first tensor for that of the state.
    assert names[0] == "blocks.0.att.time_state" and names[-1] == "session.logits"
    with pytest.raises(ValueError, match="is a start state"):
        load_model(folder / "c.pth")


def test_a_continued_chat_ends_the_previous_turn(generate):
    first = generate(
        "--prompt", "Hi", "--chat", "--tokens", "3", "--save-state", "c.pth"
    )
    assert first["prompt"] == "User: Hi\n\nAssistant:"
    following = generate(
        "--prompt", "Who?", "--chat", "--tokens", "1", "--state", "c.pth"
    )
    assert following["prompt"] == "\n\nUser: Who?\n\nAssistant:"


def test_blank_lines_inside_a_message_are_removed_as_in_tuning_data(generate):
    report = generate("--prompt", "a\\n\\nb", "--escape", "--chat", "--tokens", "0")
    assert report["prompt"] == "User: a\nb\n\nAssistant:"
    report = generate("--prompt", "a\\n\\nb", "--tokens", "0")
    assert report["prompt"] == "a\\n\\nb"


def test_an_upscaled_state_needs_a_file_that_can_hold_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    save_state("plain.pth", init_state(CONFIG))
    words = ["generate", "--model", "m.pth", "--prompt", "a", "--save-state", "x.npz"]
    assert main(words) == 2
    assert (
        "`--save-state` must end in .pth, .safetensors, .st" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (rb"a\nb", b"a\nb"),
        (rb"\t\r\\", b"\t\r\\"),
        (rb"\\n", rb"\n"),
        (rb"\xe6\xb5\xb7\u6d77", "海海".encode()),
        ("海".encode(), "海".encode()),
        (b"", b""),
    ],
)
def test_escapes_have_the_documented_meaning(typed, meant):
    assert unescape(typed, "`--prompt`") == meant


@pytest.mark.parametrize("typed", [rb"\q", b"a\\", rb"\x1", rb"\u12", rb"\0"])
def test_an_unknown_escape_is_rejected(typed):
    with pytest.raises(ValueError, match="`--prompt` must have n, t, r"):
        unescape(typed, "`--prompt`")


def test_a_stop_string_with_a_backslash_is_reported_as_it_is_read(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    words = [
        "generate",
        "--model",
        "m.pth",
        "--prompt",
        "a",
        "--tokens",
        "1",
        "--stop",
        "\\n",
    ]
    assert main(words) == 0
    assert "--escape reads them as a line break" in capsys.readouterr().err
    assert main([*words, "--escape"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "latin-1", "utf-8"])
def test_a_terminal_shows_unencodable_characters_as_escapes(
    folder, monkeypatch, encoding
):
    monkeypatch.chdir(folder)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    (folder / "x.txt").write_text("é海 ☃ 𝄞", encoding="utf-8")
    words = ["data", "x.txt", "--show", "1", "--length", "3", "--vocabulary", "bytes"]
    assert main([*words, "--packing", "documents"]) == 0
    assert (
        main(["generate", "--model", "m.pth", "--prompt", "a", "--tokens", "20"]) == 0
    )
    stdout.flush()
    assert stdout.buffer.getvalue()
