"""What `rwkv7 generate` writes: a stream or one object, any bytes in, quiet on a closed pipe."""

import io
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params
from slow_phases import SlowPhase

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.cli import generate as generate_command
from rwkv7_jax.cli.commands import main
from rwkv7_jax.cli.inputs import read_model
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.generation.sampling import exempt_ids
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import is_int8
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.tokenizer import Tokenizer

# One layer compiles fastest.
CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a state on disk."""
    folder = tmp_path_factory.mktemp("files")
    save_model(
        folder / "m.pth", random_params(CONFIG, dtype=jnp.float32, scale=0.3), CONFIG
    )
    save_state(folder / "s.pth", init_state(CONFIG))
    return folder


@pytest.fixture
def command(folder, monkeypatch):
    """`command(*words)` runs `rwkv7 generate` on the tiny model, among its files."""
    monkeypatch.chdir(folder)

    def call(*words):
        return main(["generate", "--model", "m.pth", "--tokens", "12", *words])

    return call


def test_the_command_streams_the_text_that_json_reports(command, capsys):
    assert command("--prompt", "Hä", "--state", "s.pth", "--seed", "3") == 0
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


@pytest.mark.parametrize("prompt", ["-5 apples", "-5", "-5,7", "-1e-3"])
def test_a_prompt_that_begins_with_a_negative_number_is_read_unchanged(
    command, capsys, prompt
):
    command("--prompt", prompt, "--json", "--tokens", "0")
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


def test_the_command_is_quiet_when_its_pipe_is_closed(command, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command("--prompt", "a") == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "prompt", "opening"),
    [
        ([], "User: Hi\n\nAssistant:", ""),
        (["--think", "off"], "User: Hi\n\nAssistant:", ""),
        (
            ["--think", "fast"],
            "User: Hi\n\nAssistant: <think>\n</think",
            "<think>\n</think",
        ),
        (
            ["--think", "long", "--system", "Be\n\nkind."],
            "System: Be\nkind.\n\nUser: Hi (think a lot)\n\nAssistant: <think",
            "<think",
        ),
        (
            ["--tools", "tools.json"],
            'System: Tools:\n[\n{"name":"now","arguments":{}}\n]\nReturn only a JSON '
            "function call.\n\nUser: Hi\n\nAssistant: ```json",
            "```json",
        ),
    ],
)
def test_chat_prompts_follow_the_published_templates(
    command, folder, capsys, options, prompt, opening
):
    (folder / "tools.json").write_text('[{"name": "now"}]')
    command("--prompt", " Hi\n", "--chat", *options, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["prompt"] == prompt and report["opening"] == opening
    command("--prompt", " Hi\n", "--chat", *options)
    assert capsys.readouterr().out == opening + report["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--think", "fast"], "generate: `--think` must come with `--chat`."),
        (["--system", "a"], "generate: `--system` must come with `--chat`."),
        (["--tools", "bad.json"], "generate: `--tools` must come with `--chat`."),
        (
            ["--chat", "--tools", "bad.json"],
            "generate: `--tools` must be a JSON list of functions; bad.json: not JSON: ",
        ),
        (
            ["--chat", "--tools", "one.json"],
            "generate: `--tools` must be a JSON list of functions; one.json: must be a list",
        ),
    ],
)
def test_options_of_a_chat_are_checked(command, folder, capsys, words, sentence):
    (folder / "bad.json").write_text("[")
    (folder / "one.json").write_text('{"name": "now"}')
    assert command("--prompt", "a", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rwkv7: {sentence}") and error.count("\n") == 1


def test_the_command_holds_the_model_in_8_bits(command, capsys):
    assert (
        command("--prompt", "H\u00e4", "--weights", "int8", "--save-state", "w.pth")
        == 0
    )
    assert capsys.readouterr().out
    # The state belongs to the checkpoint: its float weights take it without a warning.
    assert command("--prompt", "a", "--state", "w.pth", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_token_counts_of_penalties_decay_as_in_the_library(
    command, folder, capsys, decay
):
    words = ["--prompt", "Hi", "--temperature", "0", "--json"]
    penalty = ["--frequency-penalty", "50", "--penalty-decay", str(decay)]
    assert command(*words, *penalty) == 0
    report = json.loads(capsys.readouterr().out)
    params, config = load_model(folder / "m.pth")
    tokenizer = Tokenizer.for_vocabulary(config.vocab_size)
    again = generate(
        RWKV7(config),
        params,
        tokenizer.encode(b"Hi"),
        tokens=12,
        temperature=0,
        frequency_penalty=50,
        penalty_decay=decay,
        penalty_exempt=exempt_ids(tokenizer),
    )
    assert report["tokens"] == again.tokens[0]
    # Nothing is punished twice where counts are forgotten at once.
    assert (len(set(report["tokens"])) < 9) == (decay == 0)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_read_in_a_dtype_keeps_the_hash_of_its_file(folder, dtype, weights):
    plain = read_model(str(folder / "m.pth"), weights=weights)
    model = read_model(str(folder / "m.pth"), weights=weights, dtype=dtype)
    assert plain.config.dtype == "float32" and model.config.dtype == dtype
    assert model.hash == plain.hash
    both = (plain.params, model.params)
    for before, after in zip(*map(leaves, both), strict=True):
        if is_int8(before):
            np.testing.assert_array_equal(before.values, after.values)
            np.testing.assert_array_equal(before.scale, after.scale)
        else:
            assert after.dtype == dtype
            np.testing.assert_array_equal(before.astype(dtype), after)


def leaves(params):
    return jax.tree.leaves(params, is_leaf=is_int8)


def test_the_command_computes_in_bfloat16_and_its_state_fits_the_file(command, capsys):
    words = ["--prompt", "H\u00e4", "--temperature", "0", "--json"]
    assert command(*words, "--dtype", "bfloat16", "--save-state", "b.pth") == 0
    assert json.loads(capsys.readouterr().out)["tokens"]
    shift = np.asarray(load_state("b.pth").att_shift)
    # Its token shifts are activations.
    np.testing.assert_array_equal(shift, shift.astype(jnp.bfloat16).astype(np.float32))
    assert command(*words, "--state", "b.pth") == 0


def test_an_unknown_form_of_weights_is_rejected(command, capsys):
    with pytest.raises(SystemExit):
        command("--prompt", "a", "--weights", "int4")
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [([], "the first text of the answer"), (["--json"], "the answer")],
)
def test_an_answer_that_takes_long_is_waited_for_on_stderr(
    words, what, command, monkeypatch, capsys
):
    slow = SlowPhase(monkeypatch, capsys, error=ValueError("enough"))
    monkeypatch.setattr(generate_command, "generate", slow)
    assert command("--prompt", "a", *words) == 2
    assert f"waiting for {what} (" in slow.said
    assert capsys.readouterr().out == ""
