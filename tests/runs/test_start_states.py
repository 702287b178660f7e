"""What tuning starts from, and which tuning settings apply at test time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_programs import MODEL
from smallest_runs import mode_settings, odd_sum, save_base_model
from tiny_models import lively, random_state

from rwkv7_jax.checkpoints import param_tree
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.test_time.traces import read_traces
from rwkv7_jax.training.train_step import TrainState
from rwkv7_jax.tuning.state_tuning import trainable_mask
from rwkv7_jax.tuning.upscaling import upscale


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the path of a model of one layer."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_base_model(path)
    return path


def made(mode, base, folder, **changes):
    """Makes a mode and sets it up."""
    mode = make_mode(mode_settings(mode, base, **changes), folder)
    return mode


@pytest.mark.parametrize("mode", ["state", "grpo", "context"])
def test_a_run_starts_from_the_state_of_a_file(base, tmp_path, mode):
    config = made("state", base, tmp_path).model.config
    state = jax.tree.map(lambda x: jnp.full_like(x, 0.25), init_state(config))
    save_state(tmp_path / "poet.safetensors", state, config=config)
    start = str(tmp_path / "poet.safetensors")
    changes = {"start": start}
    if mode == "context":
        (tmp_path / "prompt.txt").write_text("a prompt")
        changes["test_time.context"] = str(tmp_path / "prompt.txt")
    found = made(mode, base, tmp_path, **changes).make_params()
    np.testing.assert_array_equal(found.wkv, state.wkv)
    assert found.wkv.dtype == jnp.float32


@pytest.mark.parametrize("mode", ["state", "grpo", "distil", "context"])
def test_the_start_of_a_model_on_an_accelerator_is_read_once(
    tmp_path, monkeypatch, mode
):
    # Two layers, whose numbers are fetched row by row from a device that NumPy cannot read.
    config = RWKV7Config(**(MODEL | {"num_layers": 2}))
    save_model(tmp_path / "base.pth", lively(config), config)
    state = jax.tree.map(lambda x: jnp.full_like(x, 0.25), init_state(config))
    save_state(tmp_path / "poet.safetensors", state, config=config)
    monkeypatch.setattr(param_tree, "_is_on_host", lambda leaf: False)
    changes = {"start": str(tmp_path / "poet.safetensors")}
    changes["tuning__layer_rates"] = (1.0, 0.5)
    if mode == "context":
        (tmp_path / "prompt.txt").write_text("a prompt")
        changes["test_time.context"] = str(tmp_path / "prompt.txt")
    found = made(mode, tmp_path / "base.pth", tmp_path, **changes)
    assert found.abstract_params.wkv.shape == state.wkv.shape
    np.testing.assert_array_equal(found.init_params().wkv, state.wkv)


def test_a_run_starts_from_the_state_after_a_prompt(base, tmp_path):
    (tmp_path / "prompt.txt").write_text("the sea")
    mode = made("grpo", base, tmp_path, start=str(tmp_path / "prompt.txt"))
    ids = np.asarray(mode.tokenizer.encode("the sea"))
    expected = prefill_state(mode.model, mode.frozen, ids)
    np.testing.assert_allclose(mode.make_params().wkv, expected.wkv, rtol=1e-5)


def test_token_shifts_are_tuned_at_test_time_on_request(base, tmp_path):
    only = made("grpo", base, tmp_path)
    all_leaves = made("grpo", base, tmp_path, **{"tuning.leaves": "all"})
    params = all_leaves.make_params()
    assert all_leaves.trained_count(params) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    assert only.trained_count(params) == params.wkv.size


@pytest.mark.parametrize("mode", ["state", "grpo", "expert", "distil", "context"])
def test_leaves_and_layers_have_their_own_rates_in_every_mode_that_tunes_a_state(
    base, tmp_path, mode
):
    changes = {"tuning.leaves": "all", "tuning.leaf_rates": {"att_shift": 0.5}}
    one = made(mode, base, tmp_path, **changes, **{"tuning.layer_rates": (0.25,)})
    plain = made(mode, base, tmp_path, **{"tuning.leaves": "all"})
    params = one.make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    moves = []
    for each in (one, plain):
        _, tx = each.optimizer()
        moves.append(tx.update(grads, tx.init(params), params)[0])
    scaled, free = moves
    np.testing.assert_allclose(scaled.wkv, 0.25 * free.wkv, rtol=1e-6)
    np.testing.assert_allclose(scaled.att_shift, 0.125 * free.att_shift, rtol=1e-6)


def test_rates_of_leaves_are_checked_before_features_are_calibrated(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr("rwkv7_jax.runs.modes.state_tuning.upscale", None)
    with pytest.raises(ValueError, match="must have only tuned leaves, memory; got"):
        made("upscaled_state", base, tmp_path, **{"tuning.leaf_rates": {"wkv": 1.0}})


@pytest.mark.parametrize(
    ("mode", "changes", "sentence"),
    [
        (
            "state",
            {"tuning.leaf_rates": {"att_shift": 1.0}},
            "must have only tuned leaves",
        ),
        (
            "upscaled_state",
            {"tuning.leaf_rates": {"wkv": 1.0}},
            "must have only tuned leaves",
        ),
        (
            "grpo",
            {"tuning.layer_rates": (1.0, 2.0)},
            "each of the model's 1 layers; got 2",
        ),
        (
            "state",
            {"tuning.leaf_rates": {"emb": 1.0}},
            "`config.tuning.leaf_rates` must be wkv, att",
        ),
        (
            "state",
            {"tuning.leaf_rates": {"wkv": "a"}},
            "`config.tuning.leaf_rates.wkv` must be a num",
        ),
        (
            "state",
            {"tuning.leaf_rates": {"wkv": -1}},
            "leaf_rates.wkv` must be at least 0",
        ),
        (
            "grpo",
            {"test_time.stop": ("",)},
            "`config.test_time.stop` must hold only non-empty strings",
        ),
        (
            "distil",
            {"test_time.substitute": ("x",)},
            "`config.test_time.substitute` must be two texts",
        ),
        ("grpo", {"test_time.epsilon_low": 2}, "epsilon_low` must be at most 1"),
        (
            "grpo",
            {"test_time.sampling_dtype": "int8"},
            "sampling_dtype` must be float32 or bfloat16",
        ),
    ],
)
def test_impossible_rates_and_ratios_are_rejected(
    base, tmp_path, mode, changes, sentence
):
    with pytest.raises(ValueError, match=sentence):
        made(mode, base, tmp_path, **changes)


def test_the_schedule_of_several_updates_ends_with_the_run(base, tmp_path):
    changes = {
        "steps": 6,
        "optimizer.warmup_steps": 0,
        "optimizer.final_learning_rate": 0.001,
    }
    once = made("grpo", base, tmp_path, **changes)
    thrice = made("grpo", base, tmp_path, **changes, **{"test_time.updates": 3})
    for step in (0, 3, 6):
        rate = once.optimizer()[0](step)
        assert thrice.optimizer()[0](3 * step) == pytest.approx(rate)


def test_sampling_in_another_dtype_trains_in_the_models_dtype(base, tmp_path):
    mode = made("grpo", base, tmp_path, **{"test_time.sampling_dtype": "bfloat16"})
    assert mode.model.config.dtype == "float32"
    assert mode._source._sampler.model.config.dtype == "bfloat16"
    assert mode._source._trainer is mode.model


def test_the_held_out_reward_is_logged_with_its_standard_error(base, tmp_path):
    lines = [{"prompt": f"{number}", "answer": "1"} for number in range(40)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    changes = {"data.path": str(path), "data.held_out": 0.5}
    changes["test_time.verifier"] = "smallest_runs:odd_sum"
    changes["evaluation.windows"] = 64
    mode = made("grpo", base, tmp_path, **changes)
    found = mode.evaluate(mode.init_params())
    rewards, _ = mode._sampler(mode.model, mode.frozen).greedy_rewards(
        mode.init_params(), mode._held_out_prompts, odd_sum
    )
    share = found["held_out_reward"].value
    count = len(rewards)
    assert share == rewards.mean()
    assert count == len(set(map(tuple, mode._held_out_prompts))) < 40
    assert f"{count} are evaluated" in mode.describe_data()
    error = found["held_out_reward_error"].value
    np.testing.assert_allclose(error, (share * (1 - share) / count) ** 0.5)
    assert mode.held_out_names() == ("held_out_reward",)


@pytest.mark.parametrize(
    ("keep", "chains", "least", "most"),
    [
        ("all", None, 8, 8),
        ("all", 4, 32, 32),
        ("verified", None, 1, 7),
        ("verified", 4, 9, 31),
        ("majority", None, 16, 64),
        ("majority", 2, 1, 16),
    ],
)
def test_a_guide_writes_the_configured_number_of_chains(
    base, tmp_path, keep, chains, least, most
):
    changes = {"test_time.keep": keep, "test_time.chains": chains}
    changes["test_time.verifier"] = "smallest_runs:odd_sum"
    if keep == "majority":
        changes["test_time.vote_margin"] = 0.0
    # Few tokens: some answers must agree.
    changes["test_time.tokens"] = 1
    changes["test_time.temperature"] = 0.3
    made("distil", base, tmp_path, **changes)
    traces = read_traces(tmp_path / "kept_traces.jsonl")
    assert least <= len(traces) <= most
    assert len({trace.prompt for trace in traces}) <= 8
    if keep == "verified":
        assert all(odd_sum(trace.prompt, trace.completion) for trace in traces)


def test_the_reference_policy_is_the_state_that_tuning_starts_from(base, tmp_path):
    config = made("state", base, tmp_path).model.config
    state = random_state(config)
    save_state(tmp_path / "poet.safetensors", state, config=config)
    start = str(tmp_path / "poet.safetensors")
    mode = made("grpo", base, tmp_path, start=start, **{"test_time.kl": 0.5})
    batch = Batch(
        tokens=np.arange(14).reshape(2, 7) % config.vocab_size,
        mask=np.ones((2, 6), np.float32),
        advantages=np.zeros(2, np.float32),
    )
    first = mode.init_params()
    moved = jax.tree.map(jnp.zeros_like, first)
    assert mode.loss(first, batch)[1]["kl_nats"] < 1e-6
    # As an update does that is given its memory.
    for leaf in jax.tree.leaves(first):
        leaf.delete()
    assert mode.loss(moved, batch)[1]["kl_nats"] > 1e-3


@pytest.fixture(scope="module")
def upscaled_start(base, tmp_path_factory):
    """Returns the path of an upscaled state of the base model, and the state."""
    folder = tmp_path_factory.mktemp("upscaled")
    mode = made("state", base, folder)
    rows = np.arange(64).reshape(2, 32) % mode.model.config.vocab_size
    state = upscale(mode.model, mode.frozen, rows, size=8, prepare="none")
    memory = jnp.full_like(state.upscaled.memory, 0.25)
    state = state.replace(upscaled=state.upscaled.replace(memory=memory))
    path = folder / "state.safetensors"
    save_state(path, state, config=mode.model.config)
    return str(path), state


@pytest.mark.parametrize("mode", ["grpo", "expert", "distil", "context"])
def test_the_memory_of_an_upscaled_start_is_tuned_at_test_time(
    base, tmp_path, upscaled_start, mode
):
    start, state = upscaled_start
    made_mode = made(mode, base, tmp_path, start=start)
    params = made_mode.init_params()
    batch = Batch(
        tokens=np.arange(14).reshape(2, 7) % made_mode.model.config.vocab_size,
        mask=np.ones((2, 6), np.float32),
        advantages=np.ones(2, np.float32) if mode == "grpo" else None,
    )
    np.testing.assert_array_equal(params.upscaled.memory, state.upscaled.memory)
    grads = jax.grad(lambda state: made_mode.loss(state, batch)[0])(params)
    assert np.abs(grads.upscaled.memory).max() > 0
    others = grads.replace(upscaled=grads.upscaled.replace(memory=0, write=0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(others))
    assert made_mode.tuned_leaves == ("memory",)
    assert made_mode.trained_count(params) >= params.upscaled.memory.size
    path = made_mode.save(tmp_path, params)
    assert path.name == "state.safetensors" and made_mode.state_files(tmp_path) == {
        "": path
    }
    loaded = load_state(path, config=made_mode.model.config)
    np.testing.assert_array_equal(loaded.upscaled.memory, params.upscaled.memory)


@pytest.mark.parametrize(
    ("mode", "changes", "sentence"),
    [
        ("state", {}, "upscaled state, which only mode 'test_time' can tune further"),
        (
            "grpo",
            {"tuning.leaves": "all"},
            "`config.tuning.leaves` must be left out if `config.start` is an upscaled",
        ),
        (
            "context",
            {"tuning.decorrelate": "whiten"},
            '`config.tuning.decorrelate` must be "none" or "dbp" if `config.start`',
        ),
    ],
)
def test_an_upscaled_start_that_cannot_be_tuned_is_rejected(
    base, tmp_path, upscaled_start, mode, changes, sentence
):
    with pytest.raises(ValueError, match=sentence):
        made(mode, base, tmp_path, start=upscaled_start[0], **changes)


@pytest.mark.parametrize("mode", ["grpo", "distil", "context"])
@pytest.mark.parametrize("is_upscaled", [False, True])
def test_tuning_at_test_time_can_be_decorrelated(
    base, tmp_path, upscaled_start, mode, is_upscaled
):
    changes = {"start": upscaled_start[0]} if is_upscaled else {}
    plain = made(mode, base, tmp_path, **changes)
    mode = made(mode, base, tmp_path, **changes, **{"tuning.decorrelate": "dbp"})
    rows = 2
    batch = Batch(
        tokens=np.arange(7 * rows).reshape(rows, 7) % mode.model.config.vocab_size,
        mask=np.ones((rows, 6), np.float32),
        advantages=np.arange(rows, dtype=np.float32),
    )
    tuned = []
    for each in (plain, mode):
        _, tx = each.optimizer()
        train = TrainState.create(each.init_params(), tx)
        after, _ = each.update_step(tx, None)(train, batch)
        tuned.append(after.params)
    before = mode.make_params()
    mask = trainable_mask(before, mode.tuned_leaves)
    same = jax.tree.map(
        lambda *x: x[2] or not np.any(x[0] != x[1]), before, tuned[1], mask
    )
    assert all(jax.tree.leaves(same))
    leaves = [state.upscaled.memory if is_upscaled else state.wkv for state in tuned]
    assert np.isfinite(leaves[1]).all() and np.any(leaves[0] != leaves[1])
