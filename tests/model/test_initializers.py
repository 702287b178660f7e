"""Every tensor of a new model, from the published table restated in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORMULA, assert_close

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

DEEP = RWKV7Config(vocab_size=150, num_layers=4, width=128, head_size=64, ffn_width=512)
SINGLE = RWKV7Config(vocab_size=50, num_layers=1, width=64, head_size=64)


@functools.cache
def new(config):
    """A new model's blocks as a list, and its whole tree."""
    ids = jnp.zeros((1, 1), jnp.int32)
    state = init_state(config)
    draw = jax.jit(lambda key: RWKV7(config).init(key, ids, state)["params"])
    params = jax.tree.map(np.asarray, draw(jax.random.key(0)))
    rest = [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(config.num_layers - 1)
    ]
    return [params["layer_0"], *rest], params


def table(config, layer):
    """The tensors of one block's time mix and channel mix that no chance is in."""
    width = config.width
    size = config.head_size
    n = np.arange(width)
    ramp = n / (width - 1)
    q = n / width
    side = (n % size - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = side * np.abs(side)
    depth = layer / (config.num_layers - 1) if config.num_layers > 1 else 0.0
    left = 1 - layer / config.num_layers
    power = {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}
    att = {f"x_{name}": 1 - q ** (p * left) for name, p in power.items()}
    att |= {
        "w0": -6 + 6 * ramp ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5),
        "k_k": 0.71 - 0.1 * (ramp - 0.5),
        "k_a": np.full(width, 1.02),
        "r_k": np.full((config.num_heads, size), -0.04),
        "w1": np.zeros((width, config.decay_rank)),
        "a1": np.zeros((width, config.icl_rank)),
        "g1": np.zeros((width, config.gate_rank)),
        "output": {"weight": np.zeros((width, width))},
        "ln_x": {
            "weight": np.full(width, ((1 + layer) / config.num_layers) ** 0.7),
            "bias": np.zeros(width),
        },
    }
    if layer:
        att |= {
            "v0": 0.73 - 0.4 * (ramp - 0.5),
            "v1": np.zeros((width, config.value_rank)),
        }
    ffn = {
        "x_k": 1 - q ** (left**4),
        "value": {"weight": np.zeros((width, config.ffn_width))},
    }
    norm = {"weight": np.ones(width), "bias": np.zeros(width)}
    return {"att": att, "ffn": ffn, "ln1": norm, "ln2": norm}


def orthogonal_gain(matrix):
    """The gain of a matrix whose shorter side is orthogonal."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = short.astype(np.float64) @ short.T
    gain = np.sqrt(gram[0, 0])
    np.testing.assert_allclose(
        gram, gain**2 * np.eye(len(gram)), atol=2e-6 * gain**2 + 1e-9
    )
    return gain


@pytest.mark.parametrize(
    ("config", "layer"),
    [(DEEP, 0), (DEEP, 1), (DEEP, 3), (SINGLE, 0)],
    ids=["0", "1", "3", "L=1"],
)
def test_deterministic_initial_values_follow_the_published_formulas(config, layer):
    block = new(config)[0][layer]
    expected = table(config, layer)
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        actual = block
        for key in path:
            actual = actual[key.key]
        assert np.isfinite(actual).all()
        assert_close(actual, value, FORMULA, jax.tree_util.keystr(path))


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_random_matrices_are_orthogonal_with_the_published_gain(layer):
    block = new(DEEP)[0][layer]
    gains = {"receptance": 1.0, "key": 0.1, "value": 1.0}
    for name, gain in gains.items():
        assert orthogonal_gain(block["att"][name]["weight"]) == pytest.approx(
            gain, rel=1e-5
        )
    assert orthogonal_gain(block["ffn"]["key"]["weight"]) == pytest.approx(
        1.0, rel=1e-5
    )
    for name in "wag" + "v" * (layer > 0):
        assert orthogonal_gain(block["att"][f"{name}2"]) == pytest.approx(0.1, rel=1e-5)


def test_every_tensor_is_in_the_tables():
    drawn = {"receptance", "key", "value", "w2", "a2", "g2", "v2"}
    for layer, block in enumerate(new(DEEP)[0]):
        assert set(block["att"]) == set(table(DEEP, layer)["att"]) | (
            drawn if layer else drawn - {"v2"}
        )
        assert set(block["ffn"]) == {"x_k", "key", "value"}


def test_the_embedding_is_tiny_and_the_head_is_orthogonal():
    params = new(DEEP)[1]
    emb = params["emb"]["weight"]
    assert 0.9e-4 < np.abs(emb).max() <= 1e-4
    assert abs(emb.mean()) < 2e-6
    gain = orthogonal_gain(params["head"]["weight"])
    assert gain == pytest.approx(0.5 * (150 / 128) ** 0.5, rel=1e-5)
    small = orthogonal_gain(new(SINGLE)[1]["head"]["weight"])
    assert small == pytest.approx(0.5, rel=1e-5)
    for norm in ("ln0", "ln_out"):
        np.testing.assert_array_equal(params[norm]["weight"], np.ones(128))
        np.testing.assert_array_equal(params[norm]["bias"], np.zeros(128))


def test_every_block_has_its_own_random_values():
    first, second, *_ = new(DEEP)[0]
    assert not np.allclose(
        first["att"]["key"]["weight"], second["att"]["key"]["weight"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_start_states_are_float32_where_float64_is_enabled(dtype):
    config = dataclasses.replace(DEEP, dtype=dtype)
    ids = np.zeros((1, 1), np.int32)
    with jax.enable_x64(True):
        state = init_state(config)
        params = jax.eval_shape(
            lambda key: RWKV7(config).init(key, ids, state), jax.random.key(0)
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert state.wkv.dtype == jnp.float32
    assert state.att_shift.dtype == state.ffn_shift.dtype == jnp.dtype(dtype)
