"""What `rwkv7 generate` writes: a stream or one object, any bytes in, quiet on a closed pipe."""

import argparse
import io
import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.cli_generate import add_generate_command
from rwkv7_jax.config import RWKV7Config
from rwkv7_jax.model import RWKV7
from rwkv7_jax.state import init_state

CONFIG = RWKV7Config(vocab_size=257, num_layers=2, width=32, head_size=16)
MODEL = RWKV7(CONFIG)


class Bytes:
    """A token is a byte plus 1; 0 spells nothing."""

    def encode(self, text):
        return [byte + 1 for byte in (text.encode() if isinstance(text, str) else text)]

    def token_bytes(self, token):
        return bytes([token - 1]) if token else b""


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens, init_state(CONFIG))["params"]
    random = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


class _Files:
    """Stand-ins for the modules that read files."""

    def __init__(self, params):
        self.load_model = lambda path: (params, CONFIG)
        self.load_state = lambda path: init_state(CONFIG)


@pytest.fixture
def command(params, monkeypatch):
    """`command(*words)` runs `rwkv7 generate` on the tiny model."""

    class Tokenizer(Bytes):
        @classmethod
        def for_vocabulary(cls, size):
            assert size == 257
            return cls()

    for name in ("checkpoint", "state_files"):
        monkeypatch.setitem(sys.modules, f"rwkv7_jax.{name}", _Files(params))
    tokenizer = types.SimpleNamespace(Tokenizer=Tokenizer)
    monkeypatch.setitem(sys.modules, "rwkv7_jax.tokenizer", tokenizer)
    parser = argparse.ArgumentParser()
    add_generate_command(parser.add_subparsers())

    def call(*words):
        args = parser.parse_args(["generate", "--model", "m", "--tokens", "12", *words])
        return args.run(args)

    return call


def test_the_command_streams_the_text_that_json_reports(command, capsys):
    assert command("--prompt", "Hä", "--state", "s", "--seed", "3") == 0
    streamed = capsys.readouterr().out
    assert command("--prompt", "Hä", "--json", "--seed", "3") == 0
    report = json.loads(capsys.readouterr().out)
    assert streamed == report["text"] + "\n"
    assert report["prompt"] == "Hä" and report["prompt_tokens"] == 3
    assert report["finished"] in ("stop", "length") and len(report["tokens"]) <= 12


def test_the_command_reads_any_bytes_from_standard_input_and_wraps_a_chat(
    command, capsys, monkeypatch
):
    stdin = io.TextIOWrapper(io.BytesIO(b" \xff\xfe \n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    command("--prompt", "-", "--chat", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["prompt"] == "User: \ufffd\ufffd\n\nAssistant:"
    command("--prompt", "", "--json")
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1


def test_the_command_is_quiet_when_its_reader_has_gone(command, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command("--prompt", "a") == 0
    assert capfd.readouterr() == ("", "")
