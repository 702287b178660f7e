"""`rwkv7 chat`: a conversation equals repeated calls of `generate`, also if interrupted."""

import io
import os
import signal
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params

from rwkv7_jax.checkpoints import read_sidecar, read_tensors, save_model, save_state
from rwkv7_jax.cli import chat as command
from rwkv7_jax.cli.commands import main
from rwkv7_jax.generation import decode_loop, prefill
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.chat_template import answer_opening

# One layer compiles fastest.
CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)

MODEL = ["--model", "m.pth", "--tokens", "12"]
GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a start state and a vocabulary of three entries on disk."""
    folder = tmp_path_factory.mktemp("files")
    params = random_params(CONFIG, dtype=jnp.float32, scale=0.3)
    save_model(folder / "m.pth", params, CONFIG)
    wkv = np.random.default_rng(0).normal(size=init_state(CONFIG).wkv.shape)
    state = init_state(CONFIG).replace(wkv=jnp.asarray(wkv, jnp.float32))
    save_state(folder / "tuned.pth", state)
    (folder / "binary.txt").write_text("0 '0' 1\n1 '1' 1\n2 ',' 1\n")
    return folder


@pytest.fixture
def folder(files, monkeypatch):
    """The folder of these files, as the current one."""
    monkeypatch.chdir(files)
    return files


class Typed(io.TextIOWrapper):
    """Standard input in which the character ETX stands for Ctrl-C."""

    def readline(self):
        line = super().readline()
        if line == "\x03":
            signal.raise_signal(signal.SIGINT)
        return line


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """`chat(text, *words)` runs the command with this input; returns its two outputs."""

    def call(text, *words, code=0):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(data), encoding="utf-8"))
        assert main(["chat", *MODEL, *words]) == code
        return capsys.readouterr()

    return call


@pytest.fixture
def generate(folder, capsys):
    """`generate(prompt, *words)` answers one message; returns the answer."""

    def call(prompt, *words):
        assert main(["generate", *MODEL, "--chat", "--prompt", prompt, *words]) == 0
        return capsys.readouterr().out

    return call


def assert_same_file(one, two):
    """Compares two sessions and their metadata bit-exactly."""
    first = read_tensors(Path(one))
    second = read_tensors(Path(two))
    assert list(first) == list(second) and "session.logits" in first
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor.read(), second[name].read())
    assert read_sidecar(one) == read_sidecar(two)


@pytest.mark.parametrize(
    "words",
    [
        GREEDY,
        ["--seed", "5", "--frequency-penalty", "0.3", "--think", "fast"],
        [*GREEDY, "--state", "tuned.pth", "--dtype", "bfloat16", "--system", "Be kind"],
        ["--seed", str(2**63 - 2), "--weights", "int8"],
    ],
)
def test_a_chat_equals_repeated_calls_of_generate_bit_exactly(chat, generate, words):
    said = chat("Hi\n\nWho\\\nare you?\n//reset", *words, "--save-state", "chat.pth")
    seed = int(words[words.index("--seed") + 1]) if "--seed" in words else 0
    answers = ""
    for number, message in enumerate(["Hi", "Who\nare you?", "/reset"]):
        # Each answer has the next seed; the one after the last is the first.
        seeds = ["--seed", str((seed + number + 2**63) % 2**64 - 2**63)]
        if number == 1:
            words = [word for word in words if word not in ("--system", "Be kind")]
            words = [*words, "--state", "calls.pth"]
        answers += generate(message, *words, *seeds, "--save-state", "calls.pth")
    assert said == (answers, "")
    assert_same_file("chat.pth", "calls.pth")


def test_a_session_continues_in_a_chat_and_in_another_chat(chat, generate):
    whole = chat("a\nb\nc\n", *GREEDY, "--save-state", "whole.pth").out
    parts = generate("a", *GREEDY, "--save-state", "s.pth")
    parts += chat("b", *GREEDY, "--state", "s.pth", "--save-state", "s.pth").out
    parts += chat("c", *GREEDY, "--state", "s.pth", "--save-state", "s.pth").out
    assert parts == whole
    assert_same_file("whole.pth", "s.pth")


def test_each_turn_prefills_only_its_own_text_and_compiles_nothing_new(
    chat, monkeypatch
):
    read = []
    generate_once = command.generate
    programs = (prefill.prefill, decode_loop.decode)
    compiled = []

    def watched(model, params, ids, state, **choices):
        read.append(bytes(token - 1 for token in ids).decode())
        out = generate_once(model, params, ids, state, **choices)
        compiled.append([program._cache_size() for program in programs])
        return out

    monkeypatch.setattr(command, "generate", watched)
    chat("a\nbcd\n e \nfghi\n", "--system", "S")
    first = "System: S\n\nUser: a\n\nAssistant:"
    following = [f"\n\nUser: {text}\n\nAssistant:" for text in ("bcd", "e", "fghi")]
    assert read == [first, *following]
    assert compiled[1] == compiled[2] == compiled[3]


TOOL = '{"name":"add","arguments":{}}'

TOLD = f"Tools:\n[\n{TOOL}\n]\nReturn only a JSON function call."


@pytest.mark.parametrize("think", ["off", "fast"])
def test_functions_are_told_at_the_start_and_no_answer_is_made_to_call(
    chat, folder, monkeypatch, think
):
    (folder / "tools.json").write_text(f"[{TOOL}]")
    read = []
    generate_once = command.generate

    def watched(model, params, ids, state, **choices):
        read.append(bytes(token - 1 for token in ids).decode())
        return generate_once(model, params, ids, state, **choices)

    monkeypatch.setattr(command, "generate", watched)
    text = "a\nFunction output:\\\n3\n/reset\nb\n"
    words = ["--tools", "tools.json", "--system", "S", "--think", think]
    chat(text, *words)
    system = f"System: S\n{TOLD}\n\n"
    opening = answer_opening(think)
    assert read == [
        f"{system}User: a\n\nAssistant:{opening}",
        f"\n\nUser: Function output:\n3\n\nAssistant:{opening}",
        f"{system}User: b\n\nAssistant:{opening}",
    ]


def test_a_stop_text_may_have_escapes_as_that_of_generate(chat, generate):
    words = [*GREEDY, "--stop", r"\x56", "--stop", r"\u00e4", "--escape"]
    assert chat("a\n", *words).out == generate("a", *words)
    assert chat("a\n", *words).out != chat("a\n", *GREEDY).out
    note = "note: `--stop` has a backslash and an n"
    assert chat("", "--stop", r"\n").err.startswith(note)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a\nb\n/undo\nc\n", "a\nc\n"),
        ("a\n/undo\nc\n", "c\n"),
        ("a\nb\n/undo\n/undo\nc\n", "c\n"),
        ("a\nb\n/reset\nc\n", "c\n"),
        ("/undo\nc\n/quit\nd\n", "c\n"),
        ("/nothing\n/reset now\nc\n/help\n", "c\n"),
    ],
)
@pytest.mark.parametrize("start", [[], ["--state", "tuned.pth"]])
def test_dropped_turns_leave_no_trace(chat, text, same, start):
    words = [*GREEDY, *start, "--system", "S", "--save-state"]
    out = chat(text, *words, "one.pth").out
    assert out.endswith(chat(same, *words, "two.pth").out)
    assert_same_file("one.pth", "two.pth")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/nothing at all", "`/nothing at all` is not a command: /help lists them"),
        ("/undo", "`/undo` must follow an answer; it drops at most the last 8."),
        ("/save", "`/save` must name a file"),
        ("/save x.txt", "`/save` must end in .pth, .safetensors, .st, .state; got"),
        ("/save m.pth", "`/save` must not overwrite `--model`"),
        ("/save new.pth", "`/save` must follow an answer."),
    ],
)
def test_an_invalid_command_is_answered_in_one_sentence(chat, line, sentence):
    said = chat(f"{line}\n")
    assert said.out == "" and said.err.startswith(sentence)
    assert said.err.count("\n") == 1


def test_a_file_that_cannot_be_written_does_not_end_the_chat(chat, folder):
    (folder / "file").write_text("")
    said = chat("a\n/save file/x.pth\nb\n/save ok.pth\n", *GREEDY)
    assert said.out == chat("a\nb\n", *GREEDY, "--save-state", "both.pth").out
    refusal, saved = said.err.splitlines()
    assert "file" in refusal and saved.startswith("ok.pth: ")
    assert_same_file("ok.pth", "both.pth")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "none.pth"], "`none.pth` does not exist"),
        (["--model", "none.pth", "--state", "gone.pth"], "`gone.pth` does not exist"),
        (["--save-state", "x.npz"], "`--save-state` must end in .pth"),
        (["--save-state", "m.pth"], "`--save-state` must not overwrite `--model`"),
        (["--temperature", "-1"], "`--temperature` must be at least 0; got -1"),
        (["--stop", ""], "`--stop` must not be empty"),
        (
            ["--vocabulary", "binary.txt"],
            "`--vocabulary` must encode the chat template",
        ),
        (["--vocabulary", "ids"], "`--vocabulary` must encode the chat template"),
        (["--tools", "binary.txt"], "chat: `--tools` must be a JSON list of functions"),
        (["--tools", "none.json"], "none.json"),
        (["--stop", r"\q", "--escape"], "chat: `--stop` must have n, t, r, xNN"),
    ],
)
def test_invalid_options_are_rejected_in_one_sentence_before_anything_is_read(
    chat, words, sentence
):
    said = chat("a\n", *words, code=2)
    assert said.out == "" and said.err.startswith("rwkv7: ")
    assert sentence in said.err and said.err.count("\n") == 1


def test_bytes_that_are_not_utf_8_are_read_as_generate_reads_them(chat, generate):
    said = chat(b" \xff\xfe \r\n", *GREEDY, "--save-state", "one.pth")
    assert said.out == generate("\udcff\udcfe", *GREEDY, "--save-state", "two.pth")
    assert_same_file("one.pth", "two.pth")


def interrupt_answers(monkeypatch, times):
    """Sends Ctrl-C this many times with the first piece of text of the first answer."""

    class Interrupted(command.Stream):
        left = times

        def __call__(self, piece, row):
            super().__call__(piece, row)
            while piece and Interrupted.left:
                Interrupted.left -= 1
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "Stream", Interrupted)


@pytest.mark.parametrize("words", [GREEDY, ["--temperature", "1.5"]])
def test_an_interrupted_answer_ends_as_at_its_token_limit(
    chat, generate, monkeypatch, words
):
    interrupt_answers(monkeypatch, 1)
    said = chat("a\nb\n", *words, "--save-state", "one.pth")
    first = generate("a", *words, "--tokens", "8", "--save-state", "two.pth")
    words = [*words, "--seed", "1", "--state", "two.pth", "--save-state", "two.pth"]
    assert said.out == first + generate("b", *words)
    assert_same_file("one.pth", "two.pth")


def test_a_second_interrupt_ends_the_chat_without_the_answer(chat, monkeypatch):
    chat("a\n", *GREEDY, "--save-state", "before.pth")
    words = [*GREEDY, "--state", "before.pth", "--save-state", "after.pth"]
    interrupt_answers(monkeypatch, 2)
    assert "after.pth was not written" in chat("b\n", *words, code=130).err
    # At the prompt the first one does.
    said = chat("a\n\x03", *GREEDY, "--save-state", "after.pth", code=130)
    assert said.err == ""
    assert_same_file("before.pth", "after.pth")


def test_a_full_disk_does_not_lose_an_answer(chat, monkeypatch):
    chat("a\n", *GREEDY, "--save-state", "one.pth")
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        error = chat("a\nb\n", *GREEDY, "--save-state", "two.pth", code=5).err
        # Python would try once more when the stream is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    assert error == "rwkv7: `standard output`: No space left on device.\n"
    assert_same_file("one.pth", "two.pth")
