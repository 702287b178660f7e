"""`rwkv7 serve`: what it rejects before it reads a model, and a server from start to end."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.checkpoints import load_model, save_state
from rwkv7_jax.cli.commands import main
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.chat_answers import read_answer
from rwkv7_jax.text.chat_template import CHAT_STOP, answer_opening, chat_prompt
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("starlette", reason="the extra server is not installed")

TINY = str(Path(__file__).parents[2] / "assets" / "tiny.pth")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "70000"], "`--port` must be at most 65535; got 70000"),
        (["--slots", "0"], "`--slots` must be at least 1; got 0"),
        (["--host", "nowhere.invalid"], "`--host` and `--port` must be an address"),
        (["--allow-origin", "a.example"], "`--allow-origin` must be '*' or an origin"),
        (["--allow-origin", "https://a.example/"], "without a path; got"),
        (["--allow-host", "a.example:80"], "`--allow-host` must be a name like"),
        (["--allow-host", "http://a.example"], "without a scheme, a port"),
        (["--name", "a/b"], "`--name` must give a name of letters"),
        (["--state", "gs://b/x.pth"], "`--state` must be on this machine; got gs://b"),
        (["--state", "a b=x.pth"], "`--state` must give a name of letters"),
        (["--state", "x=a.pth", "--state", "x=b.pth"], "'x' names `a.pth` and `b.pth`"),
        (["--state", "poet.pth", "--state", "d/poet.st"], "its own name; 'poet'"),
        (["--watchdog", "0"], "`--watchdog` must be at least 1; got 0"),
        (["--drain", "-1"], "`--drain` must be at least 0; got -1"),
        (["--port", "0", "--model", "none.pth"], "`none.pth` does not exist"),
        (["--port", "0", "--state", "none.pth"], "`none.pth` does not exist"),
        (["--port", "0", "--state", "poet=TEXT"], "TEXT"),
    ],
)
def test_an_invalid_command_line_is_rejected_in_one_sentence(
    tmp_path, capsys, words, sentence
):
    (tmp_path / "text.pth").write_text("no state")
    text = str(tmp_path / "text.pth")
    words = [word.replace("TEXT", text) for word in words]
    sentence = sentence.replace("TEXT", text)
    assert main(["serve", "--model", TINY, *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.splitlines()[-1].startswith("rwkv7: ")


@pytest.mark.parametrize("key", ["", " ", "a b", "\u00e4"])
def test_a_key_that_no_header_can_carry_is_rejected(monkeypatch, capsys, key):
    monkeypatch.setenv("RWKV7_API_KEY", key)
    assert main(["serve", "--model", TINY, "--port", "0"]) == 2
    assert "`RWKV7_API_KEY` must be a key" in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_the_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", "none.pth", "--port", port]) == 2
    assert f"can listen on; got 127.0.0.1:{port}" in capsys.readouterr().err


def call(address, route="completions", **fields):
    """Opens the answer to a text, or to a chat."""
    data = json.dumps({"temperature": 0} | fields).encode()
    request = urllib.request.Request(f"{address}/{route}", data)
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.slow
def test_a_server_answers_from_its_states_until_a_signal(tmp_path):
    params, config = load_model(TINY)
    state = init_state(config)
    draws = 0.5 * np.random.default_rng(0).normal(size=state.wkv.shape)
    state = state.replace(wkv=jnp.asarray(draws, jnp.float32))
    save_state(tmp_path / "poet.pth", state)
    words = ["serve", "--model", TINY, "--state", tmp_path, "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "rwkv7_jax.cli", *words, "--slots", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        said = [server.stdout.readline() for _ in range(2)]
        address = re.search(r"tiny at (\S+); states: poet$", said[1].strip())[1]
        for name, start in ((None, None), ("poet", state)):
            with call(address, prompt="decoding", max_tokens=12, state=name) as got:
                (choice,) = json.load(got)["choices"]
            expected = generate(
                RWKV7(config),
                params,
                Tokenizer.bytes().encode("decoding"),
                start,
                tokens=12,
                temperature=0,
                tokenizer=Tokenizer.bytes(),
            )
            assert choice["text"] == expected.texts[0]
        # Of a chat that thinks, the text is a thought and words.
        messages = [{"role": "user", "content": "hi"}]
        with call(
            address,
            "chat/completions",
            messages=messages,
            reasoning_effort="minimal",
            max_tokens=20,
        ) as got:
            message = json.load(got)["choices"][0]["message"]
        expected = generate(
            RWKV7(config),
            params,
            Tokenizer.bytes().encode(chat_prompt(b"hi", think="fast")),
            tokens=20,
            temperature=0,
            stop_strings=[CHAT_STOP],
            tokenizer=Tokenizer.bytes(),
        )
        parts = read_answer(answer_opening("fast") + expected.texts[0])
        assert message["content"] == parts.words
        assert message.get("reasoning_content", "") == parts.thought
        # A state that comes later is served, too.
        save_state(tmp_path / "late.pth", state)
        with call(address, prompt="decoding", max_tokens=12, state="late") as got:
            assert json.load(got)["choices"][0]["text"] == choice["text"]
        streams = []
        for tokens in (400, 8000):
            one = call(address, prompt="a", max_tokens=tokens, stream=True)
            assert json.loads(one.readline().removeprefix(b"data: "))["choices"]
            streams.append(one)
        server.send_signal(signal.SIGTERM)
        # The short one ends in peace; the other one is told when a second signal comes.
        assert streams[0].read().endswith(b"data: [DONE]\n\n")
        server.send_signal(signal.SIGTERM)
        last = streams[1].read().split(b"\n\n")[-2]
        assert b"the server is shutting down" in last
        for one in streams:
            one.close()
        _, error = server.communicate(timeout=60)
    assert (server.returncode, error) == (143, "")
