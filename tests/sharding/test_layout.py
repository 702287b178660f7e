"""Where arrays lie follows from their paths and sizes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import CONFIG

from rwkv7_jax import sharding
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.param_tree import tree_path
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.model_setup import init_weights
from rwkv7_jax.sharding.layout import path_name, spec
from rwkv7_jax.training.train_step import TrainState
from rwkv7_jax.tuning.upscaling import describe_upscaled

SIZES = {"data": 2, "fsdp": 4}
HEADS = {"fsdp": 2, "tensor": 2}


def shapes():
    """The shapes of a model's weights."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = RWKV7(CONFIG).init
    return jax.eval_shape(init, jax.random.key(0), tokens, init_state(CONFIG))["params"]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("emb/weight", (32, 64), P(None, "fsdp")),
        ("head/weight", (32, 64), P("fsdp", None)),
        ("head/weight", (30, 64), P(None, None)),
        ("layer_0/att/key/weight", (64, 64), P("fsdp", None)),
        ("layers/ffn/value/weight", (2, 64, 256), P(None, "fsdp", None)),
        ("layers/att/w1", (2, 64, 8), P(None, "fsdp", None)),
        ("layers/att/w2", (2, 8, 64), P(None, None, "fsdp")),
        ("layers/att/w0", (2, 64), P(None, None)),
        ("layers/att/ln_x/weight", (2, 64), P(None, None)),
        ("ln_out/weight", (64,), P(None)),
        ("opt_state/0/mu/layers/att/output/weight", (2, 64, 64), P(None, "fsdp", None)),
        ("layers/att/key/weight/values", (2, 64, 64), P(None, "fsdp", None)),
        ("layers/att/key/weight/scale", (2, 64), P(None, "fsdp")),
        ("params/wkv", (3, 1, 2, 32, 32), P(None, None, None, None, None)),
    ],
)
def test_the_parameter_path_determines_the_sharded_axis(name, shape, wanted):
    assert spec(name, shape, SIZES) == wanted


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("layer_0/att/value/weight", (64, 64), P(("tensor", "fsdp"), None)),
        ("layer_0/att/value/weight", (6, 64), P("tensor", None)),
        ("layers/ffn/key/weight", (2, 256, 64), P(None, ("tensor", "fsdp"), None)),
        ("layers/ffn/value/weight", (2, 64, 256), P(None, "fsdp", "tensor")),
        ("layer_0/att/output/weight/values", (64, 64), P("fsdp", "tensor")),
        ("layer_0/att/output/weight/scale", (64,), P("fsdp")),
        ("layers/att/key/weight/scale", (2, 64), P(None, ("tensor", "fsdp"))),
        ("layers/att/w1", (2, 64, 8), P(None, "fsdp", None)),
        ("layers/att/w2", (2, 8, 64), P(None, None, ("tensor", "fsdp"))),
        ("layers/att/w0", (2, 64), P(None, "tensor")),
        ("layers/att/x_r", (2, 64), P(None, None)),
        ("layers/att/r_k", (2, 4, 16), P(None, "tensor", None)),
        ("layers/att/ln_x/bias", (2, 64), P(None, "tensor")),
        ("layers/ln1/bias", (2, 64), P(None, None)),
        ("emb/weight", (32, 64), P(None, "fsdp")),
        ("head/weight", (32, 64), P("fsdp", None)),
        ("mu/wkv", (3, 1, 4, 16, 16), P(None, None, "tensor", None, None)),
        ("att_shift", (3, 1, 64), P(None, None, None)),
        ("upscaled/memory", (3, 1, 4, 16, 48), P(None, None, "tensor", None, None)),
        ("upscaled/features/mean", (3, 1, 4, 48), P(None, None, "tensor", None)),
    ],
)
def test_heads_and_inner_channels_have_their_own_mesh_axis(name, shape, wanted):
    assert spec(name, shape, HEADS) == wanted


def test_a_mesh_that_does_not_divide_the_heads_is_rejected_everywhere():
    mesh = sharding.make_mesh({"tensor": 2}, 0)
    config = dataclasses.replace(CONFIG, width=96)
    model = RWKV7(config)
    ids = jnp.zeros((1, 1), jnp.int32)
    state = init_state(config)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, state)["params"]
    said = r"must have a size of `tensor` that divides the model's 3 heads .*; got 2\."
    with sharding.use_mesh(mesh), pytest.raises(ValueError, match=f"^RWKV7: .*{said}"):
        model.apply({"params": params}, ids, state)
    with pytest.raises(ValueError, match=f"^`config.mesh` {said}"):
        init_weights(model, 0, mesh)


def test_matrices_are_sharded_and_vectors_are_not():
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes()):
        name = path_name(path)
        own = leaf.ndim - name.startswith("layers")
        is_matrix = own == 2 and not name.endswith("r_k")
        sharded = "fsdp" in tuple(spec(name, (4096,) * leaf.ndim, SIZES))
        assert sharded == is_matrix, name


def test_only_norms_and_token_shifts_have_no_line_in_the_table():
    upscaled = describe_upscaled(CONFIG, kind="gaussian", prepare="whiten")
    state = init_state(CONFIG).replace(
        upscaled=upscaled.replace(readout=upscaled.memory)
    )
    weights = jax.eval_shape(quantize, shapes())
    replicated = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path({**weights, "state": state}):
        name = path_name(path)
        if not any(spec(name, (4096,) * leaf.ndim, HEADS)):
            replicated.add(name.replace("layer_0/", "layers/"))
    norms = {"ln0", "ln_out", "layers/ln1", "layers/ln2"}
    wanted = {f"{norm}/{part}" for norm in norms for part in ("weight", "bias")}
    wanted |= {f"layers/att/x_{letter}" for letter in "rwkvag"}
    wanted |= {"layers/ffn/x_k", "state/att_shift", "state/ffn_shift"}
    assert replicated == wanted


def test_official_names_have_the_paths_of_the_table():
    names = tensor_names.shapes(CONFIG)
    paths = {
        path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes())
    }
    assert {"/".join(tree_path(name)) for name in names} == paths


def test_moments_are_sharded_like_their_parameters():
    state = jax.eval_shape(
        lambda tree: TrainState.create(tree, optax.adam(1.0)), shapes()
    )
    wanted = jax.tree.leaves(sharding.specs(SIZES, state.params))
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
        assert jax.tree.leaves(sharding.specs(SIZES, moments)) == wanted


def test_indivisible_sizes_are_reported():
    mesh = sharding.make_mesh({"fsdp": 2}, 0)
    odd = {"layers": {"att": {"w1": jnp.zeros((2, 7, 4)), "w2": jnp.zeros((2, 4, 8))}}}
    assert [tuple(one) for one in sharding.undivided(mesh, odd)] == [
        ("layers/att/w1", 7, "fsdp")
    ]


@pytest.mark.parametrize(
    ("rows", "axes"), [(8, ("data", "fsdp")), (4, ("fsdp",)), (2, ("data",)), (3, ())]
)
def test_rows_are_sharded_over_as_many_devices_as_divide_them(rows, axes):
    assert sharding.row_axes(rows, SIZES) == axes


@pytest.mark.parametrize(
    ("tokens", "sizes", "axes"),
    [
        (8, {"fsdp": 2, "tensor": 4}, ("tensor",)),
        (8, {"fsdp": 2, "sequence": 4}, ("sequence",)),
        (6, {"fsdp": 2, "tensor": 4}, None),
        (8, {"data": 2, "fsdp": 2}, None),
    ],
)
def test_tokens_are_sharded_over_devices_that_share_rows_or_heads(tokens, sizes, axes):
    assert sharding.token_axes(tokens, sizes) == axes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("auto", "auto"),
        ("fsdp=8", {"fsdp": 8}),
        ("data=2,fsdp=4", SIZES),
        ("fsdp=2,tensor=2", HEADS),
    ],
)
def test_mesh_sizes_are_parsed(text, sizes):
    assert sharding.parse_sizes(text, "`config.mesh`") == sizes


@pytest.mark.parametrize(
    "text", ["", "8", "fsdp=0", "fsdp=2,fsdp=2", "rows=2", "fsdp=-1"]
)
def test_bad_mesh_sizes_are_rejected_in_one_sentence(text):
    with pytest.raises(ValueError, match=r"^`config.mesh` must be auto, or sizes of"):
        sharding.parse_sizes(text, "`config.mesh`")


def test_the_sequence_and_tensor_axes_exclude_each_other():
    with pytest.raises(ValueError, match="along sequence or heads along tensor, not"):
        sharding.parse_sizes("sequence=2,tensor=2", "`config.mesh`")
    with pytest.raises(ValueError, match="along sequence or heads along tensor, not"):
        sharding.make_mesh({"sequence": 2, "tensor": 2}, 8)
    assert sharding.parse_sizes("sequence=1,tensor=2", "`config.mesh`") == {
        "sequence": 1,
        "tensor": 2,
    }


@pytest.mark.parametrize("sizes", [{"tensr": 2}, {"data": 0}, {"data": 2.0}])
def test_the_library_rejects_the_same_sizes_as_the_command_line(unchecked, sizes):
    with pytest.raises(ValueError, match=r"^`config.mesh` must be auto, or sizes of"):
        sharding.make_mesh(sizes, 8)


def test_a_mesh_may_be_named_by_text():
    assert sharding.make_mesh("fsdp=2", 8).shape["fsdp"] == 2
    with pytest.raises(ValueError, match=r"^`config.mesh` must be auto, or sizes of"):
        sharding.make_mesh("fdsp=2", 8)


def test_a_mesh_larger_than_the_machine_is_rejected():
    with pytest.raises(ValueError, match="at most 2 devices, as many as there are"):
        sharding.make_mesh({"data": 2, "fsdp": 4}, 8)
