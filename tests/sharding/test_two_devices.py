"""Several devices do together what one does alone, each with its own rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec
from tiny_models import SHALLOW, lively, random_state, tokens
from tolerances import SAME, assert_trees_close

from pallas_kernels import WKVInputs
from rwkv7_jax import sharding as parallel
from rwkv7_jax.model.recurrence import wkv7_sharded
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import LEAVES, state_loss, trainable_mask
from rwkv7_jax.tuning.upscaling import upscale

ROWS, LENGTH = 6, 11
BATCH = {
    "tokens": np.asarray(tokens(ROWS, LENGTH + 1, SHALLOW)),
    "mask": np.random.default_rng(0).integers(0, 2, (ROWS, LENGTH)).astype(np.float32),
}
MODEL = RWKV7(SHALLOW)


def data_mesh(rows):
    """A mesh of both devices, with weights in shards."""
    return parallel.make_mesh({"fsdp": 2}, rows)


def stepped(mesh, loss, params, **choices):
    """One step of plain gradient descent; the compiled program too."""
    tx = choices.pop("tx", optax.sgd(1.0))
    step = make_train_step(loss, tx, mesh=mesh, **choices)
    train = parallel.place(mesh, TrainState.create(params, tx))
    batch = parallel.shard_batch(mesh, BATCH)
    program = step.lower(train, batch).compile()
    after, metrics = program(*step.args, train, batch)
    return (after, metrics), program.as_text()


def test_the_parts_of_a_compiled_step_have_names():
    loss = state_loss(MODEL, lively(SHALLOW))
    _, program = stepped(data_mesh(ROWS), loss, random_state(SHALLOW))
    found = set()
    for name in re.findall(r'op_name="([^"]*)"', program):
        found.update(re.findall(r"\w+", name))
    named = {"head_loss", "optimizer", "gather_shards", "wkv7", "wkv7_gradients"}
    # Flax names the two halves of a block.
    assert found >= named | {"att", "ffn"}


def test_a_mesh_has_as_many_devices_as_divide_the_rows():
    assert jax.device_count() == 2
    sizes = {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert parallel.make_mesh("auto", 6).shape == sizes
    assert parallel.make_mesh("auto", 7) is None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_devices_with_half_the_rows_match_the_step_of_one(accumulate):
    loss = state_loss(MODEL, lively(SHALLOW), leaves=LEAVES[:3])
    make = functools.partial(stepped, loss=loss, params=random_state(SHALLOW))
    alone, _ = make(None, accumulate=accumulate)
    together, program = make(data_mesh(ROWS // accumulate), accumulate=accumulate)
    assert_trees_close(together, alone, SAME["op"])
    rows = ROWS // accumulate
    of_all, of_one = (
        rf"f32\[{n},{LENGTH},{SHALLOW.width}\]" for n in (rows, rows // 2)
    )
    assert re.search(of_one, program) and not re.search(of_all, program)
    assert "all-reduce" in program


@pytest.mark.slow
def test_two_devices_train_weights_like_one():
    make = functools.partial(stepped, loss=pretrain_loss(MODEL), params=lively(SHALLOW))
    alone, _ = make(None)
    together, _ = make(data_mesh(ROWS))
    assert_trees_close(together, alone, SAME["op"])


@pytest.mark.slow
def test_two_devices_decorrelate_like_one():
    params = lively(SHALLOW)
    read = {"leaves": ("memory",)}
    wide = upscale(MODEL, params, BATCH["tokens"], size=48, prepare="whiten")
    tx = optax.masked(decorrelate(optax.sgd(1.0)), trainable_mask(wide, ("memory",)))
    choices = {"statistics": state_statistics(MODEL, params, **read), "tx": tx}
    make = functools.partial(
        stepped, loss=state_loss(MODEL, params, **read), params=wide
    )
    alone, _ = make(None, **choices)
    together, _ = make(data_mesh(ROWS), **choices)
    assert_trees_close(together[0].params, alone[0].params, SAME["gradient"])


def test_a_step_keeps_the_sharding_of_its_arrays():
    mesh = data_mesh(ROWS)
    tx = optax.sgd(1.0)
    step = make_train_step(pretrain_loss(MODEL), tx, mesh=mesh)
    train = parallel.place(mesh, TrainState.create(lively(SHALLOW), tx))
    left = step(train, parallel.shard_batch(mesh, BATCH))
    wanted = parallel.shardings(mesh, left)
    for leaf, sharding in zip(
        jax.tree.leaves(left), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert not left[0].params["emb"]["weight"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("axis", "rows", "heads", "own"),
    [
        ("fsdp", 4, 3, (2, 3)),
        ("fsdp", 3, 2, (3, 2)),
        ("tensor", 3, 2, (3, 1)),
        ("tensor", 4, 3, (4, 3)),
    ],
)
def test_rows_and_heads_of_the_op_are_sharded_or_replicated(axis, rows, heads, own):
    mesh = parallel.make_mesh({axis: 2}, rows)
    noise = np.random.default_rng(0)
    shape = (rows, 5, heads, 4)
    arrays = [jnp.asarray(0.3 * noise.normal(size=shape), "float32") for _ in range(6)]
    inputs = WKVInputs(*arrays)._replace(log_w=-0.5 * jnp.abs(arrays[1]))
    state = jnp.ones((rows, heads, 4, 4))

    @jax.jit
    def program(inputs, state):
        with parallel.use_mesh(mesh):
            return wkv7_sharded(
                inputs, state, implementation="scan", lengths=jnp.arange(rows)
            )

    placed = parallel.place(mesh, (inputs, state))
    with jax.default_device(jax.local_devices()[0]):
        alone = wkv7_sharded(
            inputs, state, implementation="scan", lengths=jnp.arange(rows)
        )
    assert_trees_close(program(*placed), alone, SAME["op"])
    state_on_a_device = ",".join(map(str, (*own, 4, 4)))
    assert f"f32[{state_on_a_device}]" in program.lower(*placed).compile().as_text()


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_constrained_on_their_own_axis(axis):
    mesh = data_mesh(4)
    with parallel.use_mesh(mesh):
        constrain = jax.jit(functools.partial(parallel.constrain_rows, axis=axis))
        found = constrain(parallel.place(mesh, {"x": np.ones((4, 4))}))["x"]
    assert found.sharding.spec == PartitionSpec(*(None,) * axis, "fsdp")


def _chips(name, **sizes):
    """A mesh of chips that one can compile for and not run on."""
    pytest.importorskip(
        "libtpu", reason="libtpu, the compiler for TPUs, is not installed"
    )
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            pytest.skip("libtpu serves another process")
        raise
    return parallel.make_mesh(sizes, 0, chips)


@pytest.mark.slow
def test_a_step_on_four_chips_runs_a_kernel_on_each(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    mesh = _chips("v5e:2x2", data=4)
    model = RWKV7(
        dataclasses.replace(SHALLOW, num_layers=2, implementation="pallas_tpu")
    )
    config = dataclasses.replace(model.config, implementation="scan")
    tx = optax.sgd(1.0)
    weights = parallel.abstract_shards(mesh, lively(config))
    step = make_train_step(state_loss(model, weights), tx, mesh=mesh)
    train = parallel.abstract_shards(mesh, TrainState.create(random_state(config), tx))
    rows = {name: np.repeat(x, 2, axis=0) for name, x in BATCH.items()}
    batch = parallel.abstract_rows(mesh, rows)
    traced = step.trace(train, batch)
    program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert program.count("tpu_custom_call") >= 4 and "all-reduce" in program
    assert "all-gather" not in program


def test_one_device_needs_no_sharding():
    x = jnp.ones((2, 3))
    assert parallel.on_each(lambda x: x, x, takes=None, gives=None) is x
    assert parallel.sum_over_heads(x) is x
    assert parallel.own_shape("layer_0/att/w0", (2, 3)) == (2, 3)
    assert parallel.constrain_rows(x, axis=0) is x
    assert parallel.constrain_layout(x) is x
    assert parallel.local_view(None, x) is x
