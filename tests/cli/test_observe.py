"""`rwkv7 observe` and `rwkv7 generate --observer`: proposals, their error, and bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params
from tiny_observers import alive

from rwkv7_jax.checkpoints import (
    load_model,
    load_state,
    model_hash,
    read_sidecar,
    save_model,
    save_state,
)
from rwkv7_jax.cli.commands import main
from rwkv7_jax.data.loading import token_stream, windows
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.observer.evaluation import proposal_error
from rwkv7_jax.observer.files import load_observer, save_observer
from rwkv7_jax.observer.observer import (
    init_observer,
    propose,
    read_prompts,
    state_moments,
)
from rwkv7_jax.text.tokenizer import Tokenizer

# One layer compiles fastest; 257 ids are single bytes.
TEACHER = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)
SMALL = RWKV7Config(vocab_size=257, num_layers=1, width=16, head_size=8)
PROMPT = "Hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, an observer of it, an observer that is the teacher, another teacher, and text."""
    folder = tmp_path_factory.mktemp("observers")
    params = random_params(TEACHER, dtype=jnp.float32, scale=0.3)
    save_model(folder / "teacher.pth", params, TEACHER)
    info = {"base_model": model_hash(params, TEACHER)}
    observer, observer_params = init_observer(SMALL, TEACHER, jax.random.key(0))
    observer_params = alive(observer_params, 1)
    save_observer(folder / "observer", observer, observer_params, info=info)
    mirror, mirror_params = init_observer(TEACHER, TEACHER, jax.random.key(0))
    mirror_params = _mirror(mirror_params, params)
    save_observer(folder / "mirror", mirror, mirror_params, info=info)
    other = random_params(TEACHER, seed=1, dtype=jnp.float32, scale=0.3)
    save_model(folder / "other.pth", other, TEACHER)
    save_state(folder / "state.pth", load_proposal(folder))
    draws = np.random.default_rng(0).integers(97, 123, 600)
    (folder / "text.txt").write_bytes(bytes(draws.tolist()))
    (folder / "short.txt").write_bytes(b"abcdefghijklmnopqrst")
    return folder


def _mirror(observer_params, teacher_params):
    """Parameters of an observer that proposes exactly what the teacher itself would have."""
    # [L H J N n]: each of the teacher's two heads is proposed from the same head.
    maps = np.zeros(observer_params["left"].shape, np.float32)
    for head in range(2):
        maps[0, head, head] = np.eye(16)
    return {
        "model": teacher_params,
        "left": jnp.asarray(maps),
        "right": jnp.asarray(maps),
        "bias": jnp.zeros_like(observer_params["bias"]),
    }


def load_proposal(folder):
    """What the library proposes for the prompt."""
    observer, params = load_observer(folder / "observer", TEACHER)
    return propose(observer, params, tokens(PROMPT))


def tokens(text):
    return np.asarray([Tokenizer.bytes().encode(text)], np.int32)


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """`run(*words)` runs `rwkv7` among these files and returns what it printed."""
    monkeypatch.chdir(folder)

    def call(*words):
        assert main(list(map(str, words))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def observe(name, *words):
    return ("observe", name, "--model", "teacher.pth", "--prompt", PROMPT, *words)


def test_the_proposed_state_is_written_with_its_origin(run, folder, tmp_path):
    printed = run(*observe("observer", "--out", tmp_path / "s.pth"))
    assert (
        "1 layers with 2 heads of 8, for a teacher's 1 layers with 2 heads of 16"
        in printed
    )
    assert "prompt: 5 tokens" in printed and "s.pth" in printed
    state = load_state(tmp_path / "s.pth", config=TEACHER)
    np.testing.assert_array_equal(state.wkv, load_proposal(folder).wkv)
    table = read_sidecar(tmp_path / "s.pth")
    assert table["base_model"] == model_hash(*load_model(folder / "teacher.pth"))
    assert table["made_of"] == "proposed by observer"


def test_the_error_is_in_units_of_the_variance_of_the_text(run, folder):
    printed = run(
        *observe("observer", "--text", "text.txt", "--length", 20, "--windows", 4)
    )
    params, config = load_model(folder / "teacher.pth")
    observer, observer_params = load_observer(folder / "observer", TEACHER)
    teacher = RWKV7(config)
    stream = token_stream(folder / "text.txt", Tokenizer.bytes())
    batch = windows(stream, 20, 4)
    variance = state_moments(teacher, params, batch.tokens).variance
    error = proposal_error(
        observer,
        observer_params,
        teacher,
        params,
        tokens(PROMPT),
        variance=variance,
    )
    assert (
        f"proposal error: {float(error[0]):.4f} of the variance in text.txt" in printed
    )


def test_an_observer_equal_to_the_teacher_has_no_error(run):
    printed = run(
        *observe("mirror", "--text", "text.txt", "--length", 20, "--windows", 4)
    )
    assert "proposal error: 0.0000 of" in printed


def test_the_model_starts_from_the_proposal_and_reads_the_last_token_itself(
    run, folder
):
    words = (
        "generate",
        "--model",
        "teacher.pth",
        "--tokens",
        "8",
        "--temperature",
        "0",
    )
    printed = run(*words, "--prompt", PROMPT, "--observer", "observer", "--json")
    result = json.loads(printed)
    assert result["prompt"] == PROMPT and result["prompt_tokens"] == 5
    params, config = load_model(folder / "teacher.pth")
    observer, observer_params = load_observer(folder / "observer", TEACHER)
    ids = tokens(PROMPT)
    start = propose(observer, observer_params, ids[:, :-1])
    expected = generate(
        RWKV7(config),
        params,
        ids[0, -1:].tolist(),
        start,
        tokens=8,
        temperature=0.0,
    )
    assert result["tokens"] == expected.tokens[0]


def test_a_mirror_proposes_the_teachers_own_state(run, folder, tmp_path):
    run(*observe("mirror", "--out", tmp_path / "s.pth"))
    params, config = load_model(folder / "teacher.pth")
    _, end = read_prompts(RWKV7(config), params, tokens(PROMPT))
    np.testing.assert_allclose(
        load_state(tmp_path / "s.pth").wkv, end.wkv, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "observe observer --model other.pth --prompt a --out {out}",
            "`observer` belongs to",
        ),
        (
            "observe nowhere --model teacher.pth --prompt a --out {out}",
            "has no model.safetensors",
        ),
        (
            "observe observer --model none.pth --prompt a --out {out}",
            "`none.pth` does not exist",
        ),
        (
            "observe observer --model teacher.pth --prompt= --out {out}",
            "`--prompt` must not be",
        ),
        (
            "observe observer --model teacher.pth --prompt a",
            "`--out` or `--text` must be given",
        ),
        (
            "observe observer --model teacher.pth --prompt a --text none.txt",
            "`none.txt` must be a file",
        ),
        (
            "observe observer --model teacher.pth --prompt a --text text.txt --windows 1",
            "`--windows` must be at least 2; got 1",
        ),
        (
            "observe observer --model teacher.pth --prompt a --text short.txt --length 15",
            "`--text` must have at least two windows of 15 tokens; got 21 tokens",
        ),
        (
            "observe observer --model teacher.pth --prompt a --out s.npz",
            "observe: `--out` must end in .pth, .safetensors, .st",
        ),
        (
            "generate --observer observer --model other.pth --prompt ab",
            "`observer` belongs to",
        ),
        (
            "generate --observer nowhere --model teacher.pth --prompt ab",
            "has no model.safetensors",
        ),
        (
            "generate --observer observer --model teacher.pth --prompt a",
            "generate: `--prompt` must have at least two tokens with `--observer`",
        ),
        (
            "generate --observer observer --model teacher.pth --prompt=",
            "generate: `--prompt` must have at least two tokens with `--observer`",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder, tmp_path, capsys, monkeypatch, words, sentence
):
    monkeypatch.chdir(folder)
    out = tmp_path / "s.pth"
    assert main(words.format(out=out).split()) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1
    assert not out.exists()


def test_a_state_and_an_observer_exclude_each_other(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = (
        "generate --model teacher.pth --prompt ab --state state.pth --observer observer"
    )
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    assert "not allowed with argument --state" in capsys.readouterr().err
