"""The model, generation and scores on two devices whose weights lie in shards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType
from tiny_models import QUICK, SCANNED, lively, random_state, tokens
from tolerances import SAME, assert_close, assert_trees_close

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.scoring import map_rows, token_nats
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, repeat
from rwkv7_jax.observer.files import save_observer
from rwkv7_jax.observer.observer import init_observer
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import (
    TrainState,
    make_eval_step,
    make_train_step,
)
from rwkv7_jax.tuning.state_tuning import state_loss
from rwkv7_jax.tuning.upscaling import upscale

ROWS, LENGTH = 4, 7
# Its scan over layers gathers weights in shards layer by layer.
DEEP = RWKV7(SCANNED)
MODEL = RWKV7(QUICK)
AXES = ("fsdp", "sequence", "tensor")
LENGTHS = (LENGTH, 0, 3, 1)


@pytest.fixture(scope="module", params=AXES)
def mesh(request):
    return sharding.make_mesh({request.param: 2}, ROWS)


def in_shards(mesh, function, config=QUICK):
    """Runs a function of weights under a mesh, with the weights in shards."""
    with sharding.use_mesh(mesh):
        return function(sharding.place(mesh, lively(config)))


@functools.cache
def alone(function, config=QUICK):
    """Returns what a function of weights gives on one device: once, for all meshes."""
    return function(lively(config))


def rows_for(axes, choices):
    """Pairs axes and choices with rows that devices share, or that each device has all of.

    Any two of the three meet.
    """
    return [
        (axis, choice, (ROWS, 3)[(i + j) % 2])
        for i, axis in enumerate(axes)
        for j, choice in enumerate(choices)
    ]


@functools.cache
def make_call(method, rows):
    ids = tokens(rows, LENGTH, SCANNED)
    lengths = jnp.asarray(LENGTHS[:rows])
    state = random_state(SCANNED, rows)

    @jax.jit
    def call(params):
        return DEEP.apply({"params": params}, ids, state, lengths, method=method)

    return call


# The plain call is part of the gradients below; a method by its function differs by its name only.
CALLS = [*rows_for(AXES, ("hidden", "trace")), ("tensor", RWKV7.trace, 3)]


@pytest.mark.parametrize(("mesh", "method", "rows"), CALLS, indirect=["mesh"])
def test_every_method_matches_one_device(mesh, method, rows):
    call = make_call(method, rows)
    found = in_shards(mesh, call, SCANNED)
    assert_trees_close(found, alone(call, SCANNED), SAME["op"])


@functools.cache
def make_slope(remat, rows):
    model = RWKV7(dataclasses.replace(SCANNED, remat=remat))
    ids = tokens(rows, LENGTH, SCANNED)
    lengths = jnp.asarray(LENGTHS[:rows])
    counts = np.arange(LENGTH) < np.asarray(LENGTHS[:rows])[:, None]
    state = random_state(SCANNED, rows)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope(params):
        logits, end = model.apply({"params": params}, ids, state, lengths)
        return jnp.mean(jnp.square(logits) * counts[..., None]), (logits, end)

    return slope


@pytest.mark.parametrize(
    ("mesh", "remat", "rows"),
    rows_for(AXES, ("none", "op", "block")),
    indirect=["mesh"],
)
def test_calls_and_gradients_of_sharded_weights_match_one_device(mesh, remat, rows):
    slope = make_slope(remat, rows)
    gradient, results = in_shards(mesh, slope, SCANNED)
    expected, expected_results = alone(slope, SCANNED)
    assert_trees_close(results, expected_results, SAME["op"])
    assert_trees_close(gradient, expected, SAME["model"])


def axes_of_collectives(sizes):
    """The mesh axes of every kind of collective of a call on devices that need not exist."""
    ids = tokens(ROWS, LENGTH + 1, QUICK)
    state = random_state(QUICK, ROWS)
    automatic = (AxisType.Auto,) * len(sharding.AXES)
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=automatic)
    found = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in ("psum", "ppermute", "all_gather", "all_to_all"):
                key = "axes" if name == "psum" else "axis_name"
                axes = np.atleast_1d(equation.params[key])
                found.setdefault(name, set()).update(map(str, axes))
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    def call(params):
        return MODEL.apply({"params": params}, ids, state)

    with jax.sharding.use_abstract_mesh(mesh):
        visit(jax.make_jaxpr(call)(lively(QUICK)).jaxpr)
    return found


@pytest.mark.parametrize(
    ("other", "added"),
    [
        ("tensor", {"psum": {"tensor"}}),
        ("sequence", {"psum": {"sequence"}, "ppermute": {"sequence"}}),
    ],
)
def test_on_a_mesh_of_several_axes_each_collective_runs_along_its_own(other, added):
    gathers = {"all_gather": {"fsdp"}, "all_to_all": {"fsdp"}}
    found = axes_of_collectives({"data": 2, "fsdp": 2, other: 2})
    assert found == gathers | added


@functools.cache
def make_call_of_vectors():
    state = random_state(QUICK, ROWS)

    @jax.jit
    def call(params):
        vectors = lively(QUICK)["emb"]["weight"][tokens(ROWS, LENGTH, QUICK)]
        return MODEL.apply({"params": params}, vectors, state)

    return call


def test_vectors_in_place_of_tokens_are_read_as_on_one_device(mesh):
    call = make_call_of_vectors()
    assert_trees_close(in_shards(mesh, call), alone(call), SAME["op"])


@functools.cache
def make_call_of_a_shared_memory():
    ids = tokens(ROWS, LENGTH, QUICK)
    wide = upscale(MODEL, lively(QUICK), ids, size=48, dynamics="static")
    noise = np.random.default_rng(0).normal(size=wide.upscaled.memory.shape)
    memory = jnp.asarray(noise, jnp.float32)
    one = wide.replace(upscaled=wide.upscaled.replace(memory=memory))
    state = init_state(QUICK, ROWS).replace(upscaled=one.upscaled)

    @jax.jit
    def call(params):
        return MODEL.apply({"params": params}, ids, state)

    return call


def test_a_shared_upscaled_memory_is_read_by_every_row(mesh):
    call = make_call_of_a_shared_memory()
    # Through the memory's features, which are squares of sums.
    assert_trees_close(in_shards(mesh, call), alone(call), SAME["model"])


def test_the_papers_memory_works_on_a_sequence_axis():
    ids = tokens(ROWS, LENGTH, QUICK)
    wide = upscale(MODEL, lively(QUICK), ids, size=24, dynamics="replace")
    state = repeat(wide, ROWS)

    @jax.jit
    def call(params):
        return MODEL.apply({"params": params}, ids, state)

    mesh = sharding.make_mesh({"sequence": 2}, ROWS)
    assert_trees_close(in_shards(mesh, call), alone(call), SAME["model"])


def draw(params):
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    state = init_state(QUICK)
    key = jax.random.key(0)
    return generate(MODEL, params, prompts, state, tokens=6, key=key).tokens


def test_generation_matches_one_device(mesh):
    for left, right in zip(in_shards(mesh, draw), alone(draw), strict=True):
        np.testing.assert_array_equal(left, right)


def unplaced(mesh):
    """Calls of programs on a mesh, of weights that lie on one device, by the caller's name."""
    params = lively(QUICK)
    state = init_state(QUICK)
    ids = np.asarray(tokens(ROWS, LENGTH, QUICK))
    batch = {"tokens": ids, "mask": np.ones((ROWS, LENGTH - 1), np.float32)}
    tx = optax.sgd(0.1)
    step = make_train_step(pretrain_loss(MODEL), tx, mesh=mesh)
    train = TrainState.create(params, tx)
    host = jax.tree.map(np.asarray, params)
    return {
        "RWKV7": lambda: MODEL.apply({"params": host}, ids, repeat(state, ROWS)),
        "generate": lambda: generate(MODEL, params, [1], tokens=1, temperature=0),
        "token_nats": lambda: token_nats(MODEL, params, state, ids),
        "make_eval_step": lambda: make_eval_step(pretrain_loss(MODEL))(params, batch),
        "make_train_step": lambda: step(train, batch),
    }


def test_weights_on_no_mesh_are_rejected_before_compilation():
    mesh = sharding.make_mesh({"data": 2}, ROWS)
    for caller, call in unplaced(mesh).items():
        # The mesh of a step is its own.
        outside = caller == "make_train_step"
        sentence = (
            f"^{caller}: .* must be placed on the 2 devices of the mesh by sharding"
        )
        with sharding.use_mesh(None if outside else mesh):
            with pytest.raises(ValueError, match=sentence):
                call()


def test_functions_that_run_nothing_accept_weights_on_no_mesh(tmp_path):
    mesh = sharding.make_mesh({"data": 2}, ROWS)
    params = jax.tree.map(np.asarray, lively(QUICK))
    tx = optax.sgd(0.1)
    with sharding.use_mesh(mesh):
        # The step puts the weights of its loss there.
        step = make_train_step(state_loss(MODEL, params), tx, mesh=mesh)
        observer, weights = init_observer(QUICK, QUICK, jax.random.key(0))
        save_observer(tmp_path / "observer", observer, weights)
    train = sharding.place(mesh, TrainState.create(init_state(QUICK), tx))
    ids = np.asarray(tokens(ROWS, LENGTH, QUICK))
    batch = {"tokens": ids, "mask": np.ones((ROWS, LENGTH - 1), np.float32)}
    _, metrics = step(train, sharding.shard_batch(mesh, batch))
    assert np.isfinite(metrics["loss_nats"])


def score(params):
    ids = np.asarray(tokens(5, LENGTH, QUICK))
    return token_nats(MODEL, params, init_state(QUICK), ids, rows=2)


def test_windows_are_padded_to_rows_that_devices_share():
    mesh = sharding.make_mesh({"fsdp": 2}, 2)
    ids = np.asarray(tokens(5, LENGTH, QUICK))
    read = []

    def per_token(start, part):
        read.append(part.shape[0])
        assert sharding.row_axes(part.shape[0], mesh.shape) == ("fsdp",)
        return part

    with sharding.use_mesh(mesh):
        joined = map_rows(per_token, init_state(QUICK), ids, rows=1)
    assert read == [2, 2, 2]
    assert joined.tolist() == ids.tolist()
    assert sharding.filled_rows(8, {"data": 3, "fsdp": 4, "tensor": 5}) == 12


def test_scores_match_one_device(mesh):
    assert_close(in_shards(mesh, score), alone(score), SAME["op"])


@functools.cache
def make_call_of_ids_out_of_range():
    ids = jnp.asarray([[QUICK.vocab_size, -1, 0]] * ROWS)

    @jax.jit
    def call(ids, params):
        return MODEL.apply({"params": params}, ids, init_state(QUICK, ROWS))[0]

    # An argument: ids that a program knows while it is traced are checked.
    return functools.partial(call, ids)


def test_sharded_embeddings_map_ids_out_of_range_to_zeros(mesh):
    call = make_call_of_ids_out_of_range()
    assert_close(in_shards(mesh, call), alone(call), SAME["op"])
