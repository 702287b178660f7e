"""Layers with arrays of their own compute what the scan over stacked weights computes."""

import dataclasses
import functools
from importlib.metadata import version

import abstract_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import upscaled_states
from tolerances import SAME, assert_close

from pallas_kernels import dispatch, platforms
from pallas_kernels.multi_platform_export import kernels_of_all_platforms
from pallas_kernels.tpu.token_step import TiledState
from rwkv7_jax.model import products
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import repeat
from rwkv7_jax.model.unrolled import join_states, read_token, split_params, split_state
from rwkv7_jax.model.upscaled_memory import DYNAMICS

# Of this rank the gate's product is computed in two halves for GPUs.
CONFIG = dataclasses.replace(tiny_models.SCANNED, gate_rank=101)
# One layer of each kind: the first, which has no value residual, and one with it.
TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
TOKENS = np.array([3, 0, 28], np.int32)
NORMS = ("ln1", "ln2", "att.ln_x")


@pytest.fixture(scope="module")
def params():
    return tiny_models.lively(CONFIG)


@pytest.fixture(scope="module")
def params_of_two(params):
    """The weights without those of the last layer."""
    layers = jax.tree.map(lambda leaf: leaf[:1], params["layers"])
    return params | {"layers": layers}


@functools.partial(jax.jit, static_argnums=0)
def scanned(config, params, state, tokens, live):
    """Logits and state after one token of each row, by the model's call."""
    lengths = live.astype(jnp.int32)
    model = RWKV7(config)
    logits, after = model.apply({"params": params}, tokens[:, None], state, lengths)
    return logits[:, 0], after


def layer_by_layer(config, split, state, tokens, live):
    """The same from weights split by layer."""
    logits, after = read_token(
        config, split, split_state(state), tokens=tokens, live=live
    )
    return logits, join_states(after)


unrolled = functools.partial(jax.jit, static_argnums=0)(layer_by_layer)


def both_forms(config, params, *arguments):
    """Logits and state of the model's call, and of the same token layer by layer."""
    split = split_params(params)
    return scanned(config, params, *arguments), unrolled(config, split, *arguments)


def assert_same(found, expected):
    jax.tree.map(lambda a, b: assert_close(a, b, SAME["model"]), found, expected)


def assert_same_bits(expected, found):
    # Later compilers sum in another order inside of a loop.
    if version("jaxlib").startswith("0.10."):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    else:
        assert_same(found, expected)


def rows(batch):
    return TOKENS[:batch], np.ones(batch, bool)


def test_one_row_is_bit_exact(params):
    state = tiny_models.random_state(CONFIG)
    assert_same_bits(*both_forms(CONFIG, params, state, *rows(1)))


def test_one_row_with_8_bit_weights_is_bit_exact(params):
    state = tiny_models.random_state(CONFIG)
    assert_same_bits(*both_forms(CONFIG, quantize(params), state, *rows(1)))


def test_a_single_layer_model_gives_the_same():
    params = tiny_models.lively(tiny_models.QUICK)
    state = tiny_models.random_state(tiny_models.QUICK)
    expected, found = both_forms(tiny_models.QUICK, params, state, *rows(1))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_token_in_the_gpu_layout_is_the_same(params, monkeypatch):
    state = tiny_models.random_state(CONFIG)
    tokens, live = rows(1)
    expected = [scanned(CONFIG, params, state, tokens, x) for x in (live, ~live)]
    monkeypatch.setattr(platforms, "target_platform", lambda: "cuda")
    # A function of its own: the program of the other platform is kept.
    on_gpu = jax.jit(functools.partial(layer_by_layer, CONFIG))
    found = [on_gpu(split_params(params), state, tokens, x) for x in (live, ~live)]
    assert_same(found, expected)


def test_inactive_rows_keep_their_state(params_of_two):
    state = tiny_models.random_state(TWO_LAYERS, batch=3)
    live = np.array([True, False, True])
    expected, found = both_forms(TWO_LAYERS, params_of_two, state, TOKENS, live)
    assert_same((found[0][live], found[1]), (expected[0][live], expected[1]))
    np.testing.assert_array_equal(found[1].wkv[:, 1], state.wkv[:, 1])


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_upscaled_memories_are_read_and_written(params_of_two, dynamics):
    empty = upscaled_states.empty_state(TWO_LAYERS, dynamics)
    state = upscaled_states.filled(empty)
    expected, found = both_forms(TWO_LAYERS, params_of_two, state, *rows(1))
    assert_same(found, expected)


@pytest.mark.parametrize("dynamics", [None, "static", "delta"])
def test_states_in_tiles_give_the_same(params_of_two, monkeypatch, dynamics):
    """Elsewhere than on a TPU, "scan" reads the tiles."""
    state = tiny_models.random_state(TWO_LAYERS, batch=3)
    if dynamics:
        empty = upscaled_states.empty_state(TWO_LAYERS, dynamics)
        state = repeat(upscaled_states.filled(empty), 3)
    live = np.array([True, False, True])
    expected = scanned(TWO_LAYERS, params_of_two, state, TOKENS, live)
    monkeypatch.setattr(dispatch, "takes_tiles", lambda *_: True)
    assert isinstance(split_state(state)[0].wkv, TiledState)
    # A function of its own: the program of plain states is kept.
    on_tiles = jax.jit(functools.partial(layer_by_layer, TWO_LAYERS))
    found = on_tiles(split_params(params_of_two), state, TOKENS, live)
    assert_same((found[0][live], found[1]), (expected[0][live], expected[1]))
    np.testing.assert_array_equal(found[1].wkv[:, 1], state.wkv[:, 1])


def is_tiled(state, *implementation):
    return isinstance(split_state(state, *implementation)[0].wkv, TiledState)


def test_states_are_tiled_only_for_the_kernel_of_a_tpu():
    state = tiny_models.random_state(CONFIG)
    assert not is_tiled(state)
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("tpu")):
        assert is_tiled(state)
        assert is_tiled(state, "pallas_tpu")
        assert not is_tiled(state, "scan")
        assert not is_tiled(state, "chunked")
        # Heads of 16 have no kernel.
        assert not is_tiled(tiny_models.random_state(tiny_models.TINIEST))
        with kernels_of_all_platforms():
            assert not is_tiled(state)


def test_a_tpu_gets_the_vectors_in_the_dtype_in_which_they_are_read(monkeypatch):
    config = dataclasses.replace(TWO_LAYERS, dtype="bfloat16")
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), tiny_models.lively(config)
    )
    split = split_params(narrow)
    monkeypatch.setattr(platforms, "target_platform", lambda: "tpu")
    widened = split_params(narrow)
    monkeypatch.undo()
    names = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(widened):
        if leaf.dtype == jnp.float32:
            names.add(jax.tree_util.keystr(path[1:], simple=True, separator="."))
        else:
            assert leaf.dtype == jnp.bfloat16
    of_norms = {f"{norm}.{part}" for norm in NORMS for part in ("weight", "bias")}
    assert names == {"weight", "bias", "att.w0", "att.a0", "att.v0", *of_norms}
    arguments = tiny_models.random_state(config), *rows(1)
    assert_same_bits(
        unrolled(config, split, *arguments), unrolled(config, widened, *arguments)
    )


def test_every_layer_runs_the_kernel_of_a_tpu(params):
    config = dataclasses.replace(CONFIG, implementation=None)
    state = tiny_models.random_state(config)
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("tpu")):
        step = jax.jit(functools.partial(layer_by_layer, config))
        traced = step.trace(split_params(params), state, *rows(1))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("wkv7_token_kernel") == config.num_layers
    # A product of a single row would not run on the matrix units.
    products = [line for line in text.splitlines() if "dot_general" in line]
    rows_of = [line.split("tensor<")[1].split("x")[0] for line in products]
    assert rows_of.count("8") > 10 * config.num_layers


def test_split_weights_outlive_the_donated_originals(params):
    stack = jax.tree.map(lambda leaf: leaf + 0, params["layers"])
    split = split_params({"layers": stack})
    give_away = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    negative = give_away(stack)
    for index in range(CONFIG.num_layers - 1):
        jax.tree.map(
            lambda leaf, other, at=index: np.testing.assert_array_equal(
                leaf, -other[at]
            ),
            split[f"layer_{index + 1}"],
            negative,
        )


def test_splitting_and_joining_a_state_changes_nothing():
    state = tiny_models.random_state(CONFIG, batch=2)
    jax.tree.map(np.testing.assert_array_equal, join_states(split_state(state)), state)


def test_tokens_and_prompts_accumulate_16_bit_products_in_float32(params):
    """XLA for GPUs rounds the products of a single row to 16 bits unless it is told otherwise."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tokens, live = rows(1)
    state = tiny_models.random_state(config)
    for weights in (params, quantize(params)):
        step = unrolled.trace(config, split_params(weights), state, tokens, live)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) > 10 * CONFIG.num_layers
        for line in products:
            assert line.rstrip().endswith("xf32>"), line


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("count", [1, 2, 8, 64, 65])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_few_rows_and_their_gradients_match_numpy(
    count, dtype, platform, monkeypatch
):
    monkeypatch.setattr(platforms, "target_platform", lambda: platform)
    random = np.random.default_rng(count)
    # Small integers are exact in 16 bits, and so are their sums in float32.
    x = random.integers(-3, 4, (count, 1, 24)).astype(np.float32)
    weight = random.integers(-3, 4, (16, 24)).astype(np.float32)
    cotangent = random.integers(-1, 2, (count, 1, 16)).astype(np.float32)

    def product(x, weight):
        return products.head_logits(x.astype(dtype), weight)

    found, pull_back = jax.vjp(jax.jit(product), jnp.asarray(x), jnp.asarray(weight))
    np.testing.assert_array_equal(found, x @ weight.T)
    dx, dweight = pull_back(jnp.asarray(cotangent))
    np.testing.assert_array_equal(dx, cotangent @ weight)
    np.testing.assert_array_equal(dweight, cotangent[:, 0].T @ x[:, 0])
