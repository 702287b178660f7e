"""The optimizer's groups, schedules and arithmetic, restated in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, lively
from tolerances import FORMULA, assert_close

from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.checkpoints.tensor_names import shapes
from rwkv7_jax.optim.optimizer import (
    build_optimizer,
    group,
    group_labels,
    group_table,
    learning_rate_schedule,
)
from rwkv7_jax.sharding.layout import path_name

MATRICES = {f"att/{name}/weight" for name in ("receptance", "key", "value", "output")}
MATRICES |= {"ffn/key/weight", "ffn/value/weight"}
REST = {f"att/x_{name}" for name in "rwkvag"} | {
    "att/a0",
    "att/k_k",
    "att/k_a",
    "att/r_k",
}
REST |= {f"att/{name}{i}" for name in "wag" for i in "12"} | {"ffn/x_k"}
REST |= {
    f"{norm}/{x}" for norm in ("ln1", "ln2", "att/ln_x") for x in ("weight", "bias")
}
VALUE = {"att/v0", "att/v1", "att/v2"}


def flat(tree):
    """Leaves by path."""
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_every_weight_is_in_its_parameter_group():
    expected = {"emb/weight": "table", "head/weight": "table"}
    expected |= {
        f"{norm}/{x}": "rest" for norm in ("ln0", "ln_out") for x in ("weight", "bias")
    }
    for block in ("layer_0", "layers"):
        rest = REST | (VALUE if block == "layers" else set())
        expected |= {f"{block}/{name}": "rest" for name in rest}
        expected |= {f"{block}/{name}": "matrix" for name in MATRICES}
        expected[f"{block}/att/w0"] = "fast"
    assert flat(group_labels(lively())) == expected


@pytest.mark.parametrize("step", [0, 1, 5, 10, 11, 60, 99, 110, 500])
def test_the_cosine_schedule_is_the_published_formula(step):
    first, last, warmup, total = 6e-4, 6e-5, 10, 110
    done = np.clip((step - warmup) / (total - warmup), 0, 1)
    ratio = last / first
    rate = first * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * np.cos(np.pi * done))
    rate *= 0.01 + 0.99 * step / warmup if step < warmup else 1.0
    actual = learning_rate_schedule(
        "cosine", first, last, warmup_steps=warmup, total_steps=total
    )
    assert_close(actual(jnp.array(step)), rate, FORMULA)


CORNERS = {
    "first": 0,
    "warm": 10,
    "middle": 60,
    "late": 100,
    "last": 110,
    "beyond": 500,
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", (0.01, 1.0, 0.55, 0.1 + 0.45 * (1 + np.cos(0.9 * np.pi)), 0.1, 0.1)),
        ("linear", (0.01, 1.0, 0.55, 0.19, 0.1, 0.1)),
        ("wsd", (0.01, 1.0, 1.0, 0.55, 0.1, 0.1)),
        ("constant", (0.01, 1.0, 1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_every_schedule_passes_through_its_corner_points(kind, expected):
    rate = learning_rate_schedule(kind, 1.0, 0.1, warmup_steps=10, total_steps=110)
    for (corner, step), value in zip(CORNERS.items(), expected, strict=True):
        assert_close(rate(jnp.array(step)), value, FORMULA, corner)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_without_warmup_the_first_step_has_the_peak_rate(kind):
    rate = learning_rate_schedule(kind, 1.0, 0.1, warmup_steps=0, total_steps=100)
    assert float(rate(jnp.array(0))) == 1.0


def test_warmup_over_the_entire_run_rises_to_the_peak():
    rate = learning_rate_schedule("wsd", 1.0, 0.1, warmup_steps=10, total_steps=10)
    assert_close([rate(jnp.array(s)) for s in (0, 5, 9)], (0.01, 0.505, 0.901), FORMULA)


def test_unknown_kinds_are_rejected_in_one_sentence():
    with pytest.raises(
        ValueError,
        match=r"learning_rate_schedule: `kind` must be one of cosine, .*; got 'cos'",
    ):
        learning_rate_schedule("cos", 1.0, 0.1, warmup_steps=1, total_steps=2)
    with pytest.raises(
        ValueError, match="build_optimizer: `kind` must be one of adamw, muon; got"
    ):
        build_optimizer(1e-3, kind="sgd")


def official_rule(name, shape):
    """(factor on the rate, decays) of an official tensor, as the published trainer chooses them."""
    if "att.w0" in name:
        return 2.0, False
    return 1.0, ".weight" in name and len([side for side in shape if side > 1]) >= 2


def test_every_official_tensor_follows_the_published_rule():
    """With a gradient and weights of one, the first step is the factor plus the decay, down."""
    rate, decay = 1.0, 0.25
    tx = build_optimizer(rate, weight_decay=decay, clip=None)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), lively())
    updates = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(
        params
    )
    moved = dict(official_tensors(updates, CONFIG))
    assert moved.keys() == shapes(CONFIG).keys()
    for name, update in moved.items():
        factor, decays = official_rule(name, update.shape)
        assert_close(
            update, np.full(update.shape, -rate * (factor + decay * decays)), 1e-5, name
        )


def test_a_model_inside_another_tree_keeps_its_groups():
    inside = flat(group_labels({"model": lively(), "bias": jnp.zeros(3)}))
    expected = {
        f"model/{name}": label for name, label in flat(group_labels(lively())).items()
    }
    assert inside == expected | {"bias": "rest"}


def test_the_table_of_groups_counts_every_parameter_once():
    lines = group_table(lively()).splitlines()
    assert lines[0].split() == [
        "group",
        "rate",
        "decay",
        "tensors",
        "numbers",
        "pattern",
    ]
    rows = [line.split()[:5] for line in lines[1:]]
    assert [row[:3] for row in rows] == [
        ["fast", "x2", "no"],
        ["table", "x1", "yes"],
        ["matrix", "x1", "yes"],
        ["rest", "x1", "no"],
    ]
    leaves = jax.tree.leaves(lively())
    assert sum(int(row[3]) for row in rows) == len(leaves)
    assert sum(int(row[4].replace(",", "")) for row in rows) == sum(
        x.size for x in leaves
    )


def test_empty_groups_are_not_in_the_table():
    assert len(group_table({"wkv": jnp.zeros(3)}).splitlines()) == 2


def gradient(seed, scale):
    """A tree of noise like the parameters."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * noise.normal(size=x.shape), x.dtype), lively()
    )


@pytest.mark.parametrize(("scale", "clip"), [(1.0, 1.0), (1e-12, None)])
def test_two_adam_steps_match_numpy(scale, clip):
    """Clipped to norm 1; epsilon so small that tiny gradients still move by the learning rate."""
    rate, decay, b1, b2, eps = 1e-3, 0.1, 0.9, 0.99, 1e-18
    tx = build_optimizer(rate, weight_decay=decay, clip=clip)
    update = jax.jit(tx.update)
    state = tx.init(lively())
    mean = dict.fromkeys(flat(lively()), 0.0)
    square = dict(mean)
    names = flat(lively())
    for count in (1, 2):
        tree = gradient(count, scale)
        updates, state = update(tree, state, lively())
        grads = {name: np.asarray(x, np.float64) for name, x in flat(tree).items()}
        norm = np.sqrt(sum(np.sum(x**2) for x in grads.values()))
        for name, actual in flat(updates).items():
            g = grads[name] * (min(1.0, clip / norm) if clip else 1.0)
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            step = mean[name] / (1 - b1**count)
            step = step / (np.sqrt(square[name] / (1 - b2**count)) + eps)
            decayed = group(name).label in ("table", "matrix")
            step = step + decay * np.asarray(names[name], np.float64) * decayed
            factor = 2.0 if name.endswith("att/w0") else 1.0
            assert_close(actual, -rate * factor * step, 1e-5, f"{name} at step {count}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_of_16_bits_are_clipped_by_their_exact_norm(dtype):
    gradients = [jnp.full(3, 300.0 + number, dtype) for number in range(30)]
    tx = build_optimizer(1.0, clip=2.0, eps=1.0, b1=0.0, b2=0.0)
    params = jax.tree.map(jnp.zeros_like, gradients)
    # With eps 1 and no moments, an update is -g / (|g| + 1).
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert all(update.dtype == dtype for update in updates)
    exact = np.concatenate([np.float64(gradient) for gradient in gradients])
    exact *= 2 / np.linalg.norm(exact)
    found = np.concatenate([np.float64(update) for update in updates])
    rounding = 2**-7 if dtype == "bfloat16" else 2**-9
    np.testing.assert_allclose(found, -exact / (exact + 1), rtol=2 * rounding)


def test_muon_updates_matrices_and_adam_the_rest():
    rate = 1e-2
    grads = gradient(0, 1.0)
    muon, adam = (
        build_optimizer(rate, kind=kind, clip=None) for kind in ("muon", "adamw")
    )
    updates, _ = jax.jit(muon.update)(grads, muon.init(lively()), lively())
    others, _ = jax.jit(adam.update)(grads, adam.init(lively()), lively())
    for name, update in flat(updates).items():
        if group(name).label == "matrix":
            size = float(jnp.sqrt(jnp.mean(jnp.square(update))))
            assert size == pytest.approx(0.2 * rate, rel=0.2), name
        else:
            assert_close(update, flat(others)[name], FORMULA, name)
