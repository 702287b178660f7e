"""Named tensors and the parameter tree: the name table, inferred sizes, bit-exact copies."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.integrity.finite_numbers import is_finite
from rwkv7_jax.checkpoints.layouts.names import with_official_names
from rwkv7_jax.checkpoints.param_tree import (
    check_all_leaves,
    check_names,
    infer_config,
    official_tensors,
    require_finite_leaves,
    tree_path,
)
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checkpoints.tree_reader import build_tree
from rwkv7_jax.checkpoints.unused_value_residual import unused_value_residual_shapes
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

SINGLE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
CONFIGS = {
    "three layers": CONFIG,
    "two layers": dataclasses.replace(CONFIG, num_layers=2),
    "one layer": SINGLE_LAYER,
    "heads of 64": RWKV7Config(vocab_size=20, num_layers=2, width=128, head_size=64),
}


def initialized_shapes(config):
    """Return the shapes of the parameters from `model.init`, by tree path."""

    def init(key):
        return RWKV7(config).init(
            key, jnp.zeros((1, 1), jnp.int32), init_state(config)
        )["params"]

    leaves = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init, jax.random.key(0))
    )
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def listed_shapes(config):
    """Return the shapes of the name table, stacked like the tree."""
    shapes = {}
    for name, shape in tensor_names.shapes(config).items():
        path = tree_path(name)
        shapes[path] = (config.num_layers - 1, *shape) if path[0] == "layers" else shape
    return shapes


def tensors_of(params, config, *, wrap=lambda array: array):
    """Return a file's tensors in memory."""
    tensors = {}
    for name, array in official_tensors(params, config):
        array = wrap(array)
        tensors[name] = Tensor(array.shape, array.dtype, lambda array=array: array)
    return tensors


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_name_table_matches_the_initialized_model(config):
    assert listed_shapes(config) == initialized_shapes(config)


def test_hf_names_are_unique_and_invertible():
    names = list(tensor_names.shapes(CONFIG))
    hf = {tensor_names.to_hf(name): name for name in names}
    assert len(hf) == len(names)
    tensors = {
        name: Tensor((2, 2), np.dtype(np.float32), lambda: np.eye(2)) for name in hf
    }
    named = with_official_names(tensors, Path("a file"))
    assert set(named.tensors) == set(names)
    assert named.family == "fla"


def test_only_block_0_has_an_unused_value_residual():
    unused = unused_value_residual_shapes(CONFIG)
    assert set(unused) == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert not set(unused) & set(tensor_names.shapes(CONFIG))
    # Their shapes are those that other blocks' have.
    for name, shape in unused.items():
        assert (
            tensor_names.shapes(CONFIG)[name.replace("blocks.0", "blocks.1")] == shape
        )


def test_later_blocks_are_stacked_in_order(params):
    tensors = dict(official_tensors(params, CONFIG))
    for layer in (1, 2):
        stacked = params["layers"]["att"]["w1"][layer - 1]
        np.testing.assert_array_equal(tensors[f"blocks.{layer}.att.w1"], stacked)
    first = params["layer_0"]["att"]["w1"]
    np.testing.assert_array_equal(tensors["blocks.0.att.w1"], first)


def test_tree_and_tensors_round_trip_bit_exactly(params):
    tree = build_tree(tensors_of(params, CONFIG), CONFIG, "a file")
    assert differing(tree, params) == []


def test_the_tree_does_not_alias_the_file(params):
    """JAX may alias a NumPy buffer, so the tree must own its buffers."""
    arrays = {name: np.array(array) for name, array in official_tensors(params, CONFIG)}
    tensors = {n: Tensor(x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()}
    tree = build_tree(tensors, CONFIG, "a file")
    for array in arrays.values():
        array[...] = 0
    assert differing(tree, params) == []


def test_progress_ends_at_the_total_bytes(params):
    calls = []
    tensors = tensors_of(params, CONFIG)
    build_tree(
        tensors,
        CONFIG,
        "a file",
        progress=lambda done, total: calls.append((done, total)),
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)


def test_a_requested_dtype_applies_to_every_leaf(params):
    tree = build_tree(tensors_of(params, CONFIG), CONFIG, "a file", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sizes_are_inferred_from_shapes(config):
    def refuse():
        raise AssertionError("a number was read")

    tensors = {}
    for name, shape in tensor_names.accepted_shapes(config).items():
        tensors[name] = Tensor(shape, np.dtype(np.float32), refuse)
    assert infer_config(tensors, "a file") == config
    check_names(tensors, config, "a file")


def test_the_hf_norm_eps_determines_the_group_norm_eps():
    shapes = tensor_names.shapes(CONFIG).items()
    tensors = {
        n: Tensor(s, np.dtype(np.float32), lambda: np.zeros(())) for n, s in shapes
    }
    config = infer_config(tensors, "a file", norm_eps=1e-4, family="fla")
    assert config.norm_eps == 1e-4
    assert config.group_norm_eps == CONFIG.head_size * 1e-4


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("emb.weight", None, "is not an RWKV-7 checkpoint: it has no emb.weight"),
        ("emb.weight", (75,), r"has emb.weight of shape \(75,\), not a matrix"),
        (
            "blocks.0.att.w1",
            (64, 0),
            r"has blocks.0.att.w1 of shape \(64, 0\), not a matrix",
        ),
        ("blocks.999999999.att.w1", (64, 8), "has blocks.999999999 but 4 blocks"),
    ],
)
def test_sizes_that_cannot_be_inferred_are_rejected(params, name, shape, sentence):
    tensors = tensors_of(params, CONFIG)
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = Tensor(shape, np.dtype(np.float32), lambda: np.zeros(shape))
    with pytest.raises(ValueError, match=sentence):
        infer_config(tensors, "a file")


def test_integer_tensors_in_a_file_are_rejected(params):
    tensors = tensors_of(params, CONFIG)
    integers = np.zeros((75, 64), np.int32)
    tensors["head.weight"] = Tensor((75, 64), integers.dtype, lambda: integers)
    with pytest.raises(ValueError, match=r"1 differences(.|\n)*head.weight.*int32"):
        check_names(tensors, CONFIG, "a file")


def test_integer_leaves_in_a_tree_are_rejected(params):
    integers = params | {"head": {"weight": jnp.zeros((75, 64), jnp.int32)}}
    with pytest.raises(
        TypeError, match="`params` must be floating-point; got head/weight int32"
    ):
        check_all_leaves(integers, CONFIG)


def test_a_tree_with_an_extra_leaf_is_rejected(params):
    more = params | {"extra": {"weight": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="only RWKV-7's leaves; got extra/weight too"):
        check_all_leaves(more, CONFIG)


def test_a_tree_with_a_missing_leaf_is_rejected(params):
    less = {name: leaf for name, leaf in params.items() if name != "ln_out"}
    with pytest.raises(
        ValueError, match=r"must hold ln_out/weight of shape \(64,\); got None"
    ):
        check_all_leaves(less, CONFIG)


def test_a_leaf_that_is_not_finite_is_named_by_its_block():
    lerps = jnp.zeros((2, CONFIG.width)).at[1, 3].set(jnp.nan)
    tree = {"layers": {"att": {"x_r": lerps}}}
    with pytest.raises(ValueError, match=r"has NaN or Inf in blocks\.2\.att\.x_r;"):
        require_finite_leaves(tree, CONFIG, "m")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_single_non_finite_value_is_found_anywhere(dtype, value):
    # Longer than one of the pieces in which the bits are compared.
    array = np.ones((1 << 20) + 7, np.dtype(dtype))
    largest = ml_dtypes.finfo(array.dtype).max
    array[3] = largest
    array[4] = -largest
    assert is_finite(array)
    for place in (0, 1 << 20, -1):
        spoiled = array.copy()
        spoiled[place] = value
        assert not is_finite(spoiled)
