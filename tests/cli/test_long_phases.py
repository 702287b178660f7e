"""Commands that take long say so on stderr, and never amid the text of an answer."""

import argparse
from types import SimpleNamespace

import pytest
from slow_phases import SlowPhase

from rwkv7_jax.cli import commands, inputs, serve
from rwkv7_jax.cli.answers import Stream
from rwkv7_jax.cli.commands import main, parser
from rwkv7_jax.runs import waiting


@pytest.fixture
def slow(monkeypatch, capsys):
    return SlowPhase(monkeypatch, capsys)


@pytest.mark.parametrize("words", [["inspect", "a"], ["state", "info", "a"]])
def test_a_command_that_takes_long_is_named(words, slow, monkeypatch, capsys):
    options = argparse.Namespace(run=slow)
    known = SimpleNamespace(parse_args=lambda words: options)
    monkeypatch.setattr(commands, "parser", lambda: known)
    assert main(words) == 0
    assert slow.said.startswith(f"waiting for rwkv7 {words[0]} (")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        (["convert", "a.pth", "b.pth"], True),
        (["data", "a.txt", "b"], True),
        (["observe", "a", "--model", "b", "--prompt", "c"], True),
        (["state", "doctor", "a", "--model", "b", "--data", "c"], True),
        (["generate", "--model", "a"], False),
        (["chat", "--model", "a"], False),
        (["serve", "--model", "a"], False),
    ],
)
def test_only_commands_that_print_while_they_work_are_not_waited_for(words, waits):
    assert getattr(parser().parse_args(words), "waits", True) is waits


def test_the_weights_that_are_read_are_named(slow, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", lambda path, weights: (slow(), None))
    monkeypatch.setattr(inputs, "model_hash", lambda *_: "")
    inputs.read_model("large.pth")
    assert slow.said.startswith("waiting for the weights of large.pth (")


def test_the_compilation_of_a_server_is_named(slow, monkeypatch):
    model = SimpleNamespace(module=None, params=None, tokenizer=lambda vocabulary: None)
    engine = SimpleNamespace(warm_up=slow)
    monkeypatch.setattr(serve, "read_model", lambda *_, **__: model)
    monkeypatch.setattr(serve, "Engine", lambda *_, **__: engine)
    options = parser().parse_args(["serve", "--model", "a"])
    serve._engine(options, {}, [])
    assert slow.said.startswith("waiting for the compilation (")


def test_an_answer_is_waited_for_until_its_first_text(slow, capsys):
    with Stream("<think>", goes_on=False) as stream:
        slow()
        assert slow.said.startswith("waiting for the first text of the answer (")
        stream("a", 0)
        assert waiting._waits == []
        stream("b", 0)
    stream.close()
    assert capsys.readouterr().out == "<think>ab\n"


@pytest.mark.parametrize("pieces", [(), ("a", "b")])
def test_the_opening_of_an_answer_is_written_once(pieces, capsys):
    with Stream("<think>", goes_on=False) as stream:
        for piece in pieces:
            stream(piece, 0)
    stream.close()
    assert capsys.readouterr().out == f"<think>{''.join(pieces)}\n"
