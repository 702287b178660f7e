"""Sources of batches, shared by the library's loop and train.py."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from reward_tasks import prompts_at
from run_programs import MODEL as SIZES
from run_programs import SMALLEST, train_here
from small_vocabularies import DIGITS
from tiny_models import lively

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.optimizer import build_optimizer
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.test_time.distillation import distill
from rwkv7_jax.test_time.expert_iteration import ExpertBatches, expert_iteration
from rwkv7_jax.test_time.grpo import PolicyBatches, grpo
from rwkv7_jax.test_time.questions import QuestionSet
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.traces import (
    Trace,
    completion_rows,
    read_traces,
    trace_batch,
    write_traces,
)
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary

CONFIG = RWKV7Config(**SIZES)
SEED = 3
STEPS = 4
LEARNING_RATE = 0.05
TRACES = [Trace((1, n), (7, n, 7, 0), weight=float(n % 3)) for n in range(2, 9)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of one layer."""
    path = tmp_path_factory.mktemp("base") / "model.pth"
    save_model(path, lively(CONFIG), CONFIG)
    return path


@pytest.fixture(scope="module")
def params(base):
    return load_model(base)[0]


def settings_of(base: Path, **test_time):
    flat = {
        name: value for name, value in SMALLEST.items() if not name.startswith("model.")
    }
    flat |= {"mode": "test_time", "init": str(base), "seed": SEED, "steps": STEPS}
    flat |= {"data.path": "task:steer", "evaluation.length": 40, "evaluation.every": 0}
    flat |= {"optimizer.learning_rate": LEARNING_RATE, "optimizer.warmup_steps": 0}
    sizes = {"tokens": 6}
    if test_time.get("method") != "distil":
        sizes |= {"group": 4, "prompts": 2}
    flat |= {f"test_time.{name}": value for name, value in (sizes | test_time).items()}
    nested: dict = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = value
    return read_settings(nested)


def questions():
    return QuestionSet("task:steer", Tokenizer.bytes(), seed=SEED)


def low_ids(prompt, completion):
    """Return the share of a completion's ids that are below 100."""
    return sum(token < 100 for token in completion) / len(completion)


def not_a_number(prompt, completion):
    return float("nan")


def negative(prompt, completion):
    return -1.0


def infinite(prompt, completion):
    return float("inf")


def text_reward(prompt, completion):
    return "1"


def optimizer_of(settings):
    """Return the optimizer that train.py makes from its settings."""
    optimizer = settings.optimizer
    return build_optimizer(
        LEARNING_RATE,
        kind=optimizer.kind,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
    )


def in_library(method: str, params, traces, tx):
    """Return the state that the library's loop tunes."""
    model = RWKV7(CONFIG)
    asked = questions()
    arguments = (sampler(params), lambda step: asked.prompts(step, 2), low_ids)
    choices = {"key": jax.random.key(SEED), "stop_reward": 2.0, "tx": tx}
    if method == "grpo":
        return grpo(*arguments, steps=STEPS, **choices).state
    if method == "expert":
        own = {"keep_reward": None, "replay": False, "updates": 1}
        return expert_iteration(*arguments, rounds=STEPS, **own, **choices).state
    return distill(
        model, params, traces, steps=STEPS, batch_size=2, seed=SEED, tx=tx
    ).state


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["grpo", "expert", "distil"])
def test_train_py_and_the_library_tune_the_same_state(tmp_path, base, params, method):
    guide = tmp_path / "guide.jsonl"
    write_traces(guide, TRACES)
    verifier = f"{__name__}:low_ids"
    choices = {"method": method, "verifier": verifier}
    # The others refuse a guide, which they would not read.
    if method == "distil":
        choices["guide"] = str(guide)
    settings = settings_of(base, **choices)
    train_here(settings, tmp_path / "run")
    theirs = load_state(tmp_path / "run" / "state.pth").wkv
    ours = in_library(method, params, read_traces(guide), optimizer_of(settings)).wkv
    assert np.abs(ours).max() > 0.01
    # train.py adds up the gradients of two devices.
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("method", ["grpo", "expert"])
@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (not_a_number, "must be finite; got nan"),
        (infinite, "must be finite; got inf"),
        (text_reward, "must be a number; got str"),
    ],
)
def test_an_invalid_reward_stops_train_py(
    tmp_path, base, method, reward, reason, unchecked
):
    verifier = f"{__name__}:{reward.__name__}"
    mode = make_mode(settings_of(base, method=method, verifier=verifier), tmp_path)
    source = mode.batches(0, None)
    with pytest.raises(ValueError, match=f"`reward` of prompt 0 {reason}"):
        source.batch(0, mode.init_params)


def test_a_negative_reward_is_rejected_by_train_py(tmp_path, base, unchecked):
    verifier = f"{__name__}:negative"
    mode = make_mode(settings_of(base, method="expert", verifier=verifier), tmp_path)
    source = mode.batches(0, None)
    with pytest.raises(
        ValueError, match="`reward` of prompt 0 must be at least 0; got -1"
    ):
        source.batch(0, mode.init_params)


def test_groups_of_one_are_rejected_before_sampling(tmp_path, base):
    with pytest.raises(
        ValueError, match="PolicyBatches: `group` must be at least 2; got 1"
    ):
        make_mode(settings_of(base, method="grpo", group=1), tmp_path)


def sampler(params, **choices):
    return RolloutSampler(
        RWKV7(CONFIG), params, **({"group": 4, "tokens": 6} | choices)
    )


def test_without_replay_a_batch_is_the_reward_weighted_samples(params, unchecked):
    key = jax.random.key(7)
    state = init_state(CONFIG)
    source = ExpertBatches(sampler(params), prompts_at, low_ids, key=key)
    batch = source.batch(state, 5)
    drawn = sampler(params).draw(state, prompts_at(5), jax.random.fold_in(key, 5))
    weights = [
        low_ids(*pair) for pair in zip(drawn.prompts, drawn.completions, strict=True)
    ]
    expected = completion_rows(
        drawn.prompts, drawn.completions, length=drawn.mask.shape[1], weights=weights
    )
    np.testing.assert_array_equal(batch.tokens, expected.tokens)
    np.testing.assert_array_equal(batch.mask, expected.mask)
    assert source.traces == [] and source.budget == drawn.budget
    assert source.metrics == {"reward": float(np.mean(weights))}


def test_a_new_source_reproduces_an_earlier_batch(params, unchecked):
    make = functools.partial(ExpertBatches, sampler(params), prompts_at, low_ids)
    first = make(key=jax.random.key(7))
    state = init_state(CONFIG)
    for step in range(3):
        expected = first.batch(state, step)
    again = make(key=jax.random.key(7)).batch(state, 2)
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    np.testing.assert_array_equal(again.mask, expected.mask)


def test_a_step_without_reward_has_no_batch(params, unchecked):
    nothing = lambda prompt, completion: 0.0  # noqa: E731
    key = jax.random.key(7)
    state = init_state(CONFIG)
    for replay in (False, True):
        source = ExpertBatches(
            sampler(params), prompts_at, nothing, key=key, replay=replay
        )
        assert source.batch(state, 0) is None
    source = PolicyBatches(sampler(params), prompts_at, nothing, key=key)
    assert source.batch(state, 0) is None
    expected = {"reward": 0.0, "updated": 0, "uniform_groups": 1.0}
    assert expected.items() <= source.metrics.items()


def test_a_threshold_replays_each_approved_completion_once(params, unchecked):
    source = ExpertBatches(
        sampler(params),
        prompts_at,
        low_ids,
        key=jax.random.key(7),
        keep_reward=0.3,
        replay=True,
        updates=2,
        batch_size=3,
    )
    state = init_state(CONFIG)
    shapes = {source.batch(state, step).tokens.shape for step in range(6)}
    assert shapes == {(3, 17)}
    assert len(set(source.traces)) == len(source.traces) == source.metrics["kept"] > 0
    assert all(
        low_ids(trace.prompt, trace.completion) >= 0.3 for trace in source.traces
    )
    assert {trace.weight for trace in source.traces} == {1.0}
    # The last of two batches of round 2, in the order of that round.
    again = source.batch(state, 5)
    rows = trace_batch(source.traces, 1, batch_size=3, length=16, seed=2)
    np.testing.assert_array_equal(again.tokens, rows.tokens)
    # Rows of an earlier round still fit after one with shorter prompts.
    drawn = sampler(params).draw(state, prompts_at(0), jax.random.key(7))
    source._keep(dataclasses.replace(drawn, mask=drawn.mask[:, :9]), np.zeros(8))
    assert source.batch(state, 5).tokens.shape == (3, 17)


def test_a_replay_source_cannot_start_inside_a_round(params):
    key = jax.random.key(7)
    source = ExpertBatches(
        sampler(params), prompts_at, low_ids, key=key, replay=True, updates=2
    )
    with pytest.raises(
        ValueError, match="step 3 must follow the first step of its round, 2"
    ):
        source.batch(init_state(CONFIG), 3)


@pytest.mark.parametrize("method", ["grpo", "expert"])
def test_questions_that_the_verifier_cannot_use_are_rejected(tmp_path, base, method):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"}\n')
    settings = settings_of(base, method=method, verifier="hash_number")
    data = dataclasses.replace(settings.data, path=str(path))
    with pytest.raises(
        ValueError,
        match=r"verifier` must find the answer .*questions\.jsonl`; 'hash_number'",
    ):
        make_mode(dataclasses.replace(settings, data=data), tmp_path)


@pytest.mark.parametrize(
    ("size", "vocabulary", "sentence"),
    [
        (300, None, "of 257 ids; `.*` has 300"),
        (257, "digits", "vocabulary, bytes; `.*` has"),
    ],
)
def test_a_guide_with_another_vocabulary_is_rejected(
    tmp_path, base, size, vocabulary, sentence
):
    config = dataclasses.replace(CONFIG, vocab_size=size)
    guide = tmp_path / ("guide" if vocabulary else "guide.pth")
    tokenizer = None
    if vocabulary:
        (tmp_path / "digits.txt").write_text(DIGITS)
        tokenizer = load_vocabulary(tmp_path / "digits.txt", size)
    save_model(guide, lively(config), config, tokenizer=tokenizer)
    settings = settings_of(base, method="distil", guide=str(guide), traces=2)
    with pytest.raises(ValueError, match=f"`config.test_time.guide` must .*{sentence}"):
        make_mode(settings, tmp_path)


def test_traces_of_another_vocabulary_are_rejected_by_train_py(
    tmp_path, base, unchecked
):
    guide = tmp_path / "guide.jsonl"
    write_traces(guide, [Trace((1,), (300,))])
    settings = settings_of(base, method="distil", guide=str(guide))
    sentence = r"^config\.test_time\.guide: `traces\[0\]` must hold ids .* got 300 at"
    with pytest.raises(ValueError, match=sentence):
        make_mode(settings, tmp_path)
