"""The described step matches that of a run: the same arrays, and a program that compiles."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.checkpoints.model_files import describe_model, load_model
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.plan.child import compile_step
from rwkv7_jax.plan.chips import find_target
from rwkv7_jax.plan.steps import describe_step
from rwkv7_jax.plan.table import describe
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.tuning.upscaling import upscale

CHANGES = {
    "plain": {},
    "accumulated": {"optimizer": {"accumulate": 2}},
    "decorrelated": {"tuning": {"decorrelate": "dbp"}},
    "anchored": {"tuning": {"anchor": 1.0, "anchor_path": "task:mapping"}},
    "all leaves": {"tuning": {"leaves": "all"}},
    "in 8 bits": {"model": {"weights": "int8"}},
    "found rate": {"optimizer": {"learning_rate": None, "final_learning_rate": None}},
    "several states": {
        "data": {"path": ""},
        "tuning": {"states": {"one": "task:mapping", "two": "task:facts-8"}},
    },
}
OF_WEIGHTS = ("plain", "accumulated")
# What a job adds to a plan.
OF_JOB = {
    "topology": "v5e-1",
    "chips": 1,
    "mode": "state",
    "batch": 2,
    "length": 24,
    "limit_gib": 1.0,
}


def changed(settings, changes):
    """Return the settings with some fields of their groups replaced."""
    for group, fields in changes.items():
        old = getattr(settings, group)
        new = (
            {**old, **fields}
            if isinstance(old, dict)
            else dataclasses.replace(old, **fields)
        )
        settings = dataclasses.replace(settings, **{group: new})
    return settings


def arrays_of(tree):
    """Return shapes and dtypes of the arrays of a tree, by path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = str(jax.dtypes.canonicalize_dtype(leaf.dtype))
        found[jax.tree_util.keystr(path)] = (leaf.shape, kind)
    return found


def _unread(names):
    """Return the unused value-residual tensors of the first block, which files hold."""
    return [name for name in names if "['layer_0']['att']['v" in name]


def cases():
    for kind in ("pretrain", "observer"):
        for name in OF_WEIGHTS:
            yield kind, name
    for name in ("plain", "accumulated", "decorrelated"):
        yield "upscaled_state", name
    for name in CHANGES:
        yield "state", name


@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_described_arrays_match_the_run(tmp_path, kind, name):
    base = tmp_path / "base.pth"
    save_base_model(base)
    settings = changed(mode_settings(kind, base), CHANGES[name])
    run = make_mode(settings, tmp_path)
    if settings.finds_rate:
        run.found_rate = 0.1
    _, tx = run.optimizer()
    program = run.update_step(tx, None)
    state = run.train_state(run.init_params(), tx)
    batch = run.batches(0, None).batch(0, run.make_params).host
    dtype = "float32"
    if run.frozen is not None:
        dtype = str(run.frozen["emb"]["weight"].dtype)
    step = describe_step(settings, run.model.config, dtype, jax.devices()[:1])
    loss, statistics, *rates = program.args
    described = arrays_of(step.arguments)
    real = arrays_of((loss, statistics, *rates, state, batch))
    left_out = {name for name in real if name not in described}
    assert left_out <= set(_unread(real))
    assert described == {name: real[name] for name in real if name not in left_out}


@pytest.mark.parametrize("method", ["grpo", "context"])
def test_a_test_time_step_is_described_at_the_configured_length(tmp_path, method):
    base = tmp_path / "base.pth"
    save_base_model(base)
    changes = {"data__length": 20}
    if method == "grpo":
        changes |= {"test_time__updates": 2, "test_time__importance_cap": 2.0}
    settings = mode_settings(method, base, **changes)
    run = make_mode(settings, tmp_path)
    _, tx = run.optimizer()
    state = run.train_state(run.init_params(), tx)
    step = describe_step(settings, run.model.config, "float32", jax.devices()[:1])
    loss, statistics, *_ = run.update_step(tx, None).args
    *described, batch = step.arguments
    real = arrays_of((loss, statistics, state))
    found = arrays_of(tuple(described))
    assert found == {name: real[name] for name in found}
    assert {name for name in real if name not in found} <= set(_unread(real))
    rows = 8 if method == "grpo" else 2
    assert batch.tokens.shape == (rows, 21)
    ratios = {"old_logp", "importance", "advantages"}
    assert (ratios <= set(batch)) == (method == "grpo")
    # It can be traced: the shapes fit.
    new, _ = jax.eval_shape(step.program, *step.arguments)
    assert arrays_of(new.params) == arrays_of(state.params)


def test_a_step_that_starts_from_an_upscaled_state_includes_its_memory(
    tmp_path,
):
    base = tmp_path / "base.pth"
    save_base_model(base)
    params, config = load_model(base)
    text = np.arange(64).reshape(2, 32) % config.vocab_size
    state = upscale(RWKV7(config), params, text, size=8, prepare="none")
    save_state(tmp_path / "wide.safetensors", state, config=config)
    start = {"start": str(tmp_path / "wide.safetensors")}
    settings = mode_settings("distil", base, **start)
    run = make_mode(settings, tmp_path)
    _, tx = run.optimizer()
    step = describe_step(settings, config, "float32", jax.devices()[:1])
    assert arrays_of(step.state) == arrays_of(run.train_state(run.init_params(), tx))
    (tmp_path / "wide.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^config\.start: .* does not exist\."):
        describe_step(settings, config, "float32", jax.devices()[:1])


@pytest.mark.parametrize("method", ["expert", "distil"])
def test_a_step_on_answers_is_described_without_a_teacher(tmp_path, method):
    save_base_model(tmp_path / "base.pth")
    settings = mode_settings(method, tmp_path / "base.pth")
    config, _ = describe_model(str(tmp_path / "base.pth"))
    settings = dataclasses.replace(settings, init="the planned model")
    step = describe_step(settings, config, "float32", jax.devices()[:1])
    assert set(step.arguments[-1]) == {"tokens", "mask"}
    jax.eval_shape(step.program, *step.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state", "observer"])
def test_a_described_step_compiles_and_reports_its_memory(tmp_path, kind):
    base = tmp_path / "base.pth"
    save_base_model(base)
    settings = mode_settings(kind, base)
    run = make_mode(settings, tmp_path)
    step = describe_step(settings, run.model.config, "float32", jax.devices()[:1])
    target = dataclasses.replace(find_target("v5e-1"), platform="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "limit", 1.0)
        plan = compile_step(step, target)
    assert plan["fits"] and plan["peak_gib"] >= 0 and plan["collectives"] == []
    assert len(plan["buffers"]) == 10
    # A step that reads two models is not estimated.
    assert (plan["estimated_gib"] is None) == (kind == "observer")
    assert "no collectives" in describe(plan | OF_JOB)


@pytest.mark.parametrize(
    ("error", "is_chips"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm."), True),
        (RuntimeError("std::bad_alloc"), False),
        (MemoryError(), False),
    ],
)
def test_only_device_out_of_memory_counts_as_not_fitting(tmp_path, error, is_chips):
    save_base_model(tmp_path / "base.pth")
    settings = mode_settings("state", tmp_path / "base.pth")
    config = make_mode(settings, tmp_path).model.config

    def refuse(*_):
        raise error

    step = describe_step(settings, config, "float32", jax.devices()[:1])
    step = step._replace(program=SimpleNamespace(trace=refuse))
    if is_chips:
        plan = compile_step(step, find_target("v5e-1"))
        assert not plan["fits"] and plan["peak_gib"] == 20.5
        return
    with pytest.raises(type(error)):
        compile_step(step, find_target("v5e-1"))
