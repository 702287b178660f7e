"""A checkpoint of one mesh is restored bit-exactly on another, and every bit flip is detected."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import differing
from saved_steps import IDENTITY, PROGRESS, damage, files_of, open_checkpoints

from rwkv7_jax import sharding
from rwkv7_jax.runs.resume import step_directories
from rwkv7_jax.runs.resume.checksums import changed_leaves, leaf_checksums
from rwkv7_jax.training.train_step import TrainState

ROWS = 2
MESHES = {
    "fsdp 2": {"fsdp": 2},
    "data 2": {"data": 2},
    "tensor 2": {"tensor": 2},
    "one device": None,
}


def mesh_of(name):
    """A mesh of the two devices; None for one."""
    sizes = MESHES[name]
    return None if sizes is None else sharding.make_mesh(sizes, ROWS)


def train_state(step=3):
    """A state with sharded weights and moments, and with leaves that are not sharded."""
    noise = np.random.default_rng(step)
    params = {
        "head": {"weight": jnp.asarray(noise.normal(size=(12, 8)), jnp.bfloat16)},
        "layers": {
            "att": {
                "w2": jnp.asarray(noise.normal(size=(2, 3, 8)), jnp.float32),
                "w0": jnp.asarray(noise.normal(size=(2, 8)), jnp.float32),
                "output": {"weight": jnp.asarray(noise.normal(size=(2, 8, 8)))},
            }
        },
        "wkv": jnp.asarray(noise.normal(size=(2, 1, 2, 4, 4)), jnp.float32),
    }
    count = jnp.asarray(step, jnp.int32)
    moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(step=count, params=params, opt_state=moments, skipped=count)


def saved(folder, mesh, *steps):
    """Saves states that are placed on a mesh."""
    checkpoints = open_checkpoints(folder)
    for step in steps:
        placed = sharding.place(mesh, train_state(step))
        checkpoints.save(placed, PROGRESS, IDENTITY)
    checkpoints.close()
    return folder


def restored(folder, mesh):
    """Restores the newest valid state into the shards of a mesh."""
    shapes = sharding.abstract_shards(mesh, jax.eval_shape(train_state))
    found, _ = open_checkpoints(folder).restore(shapes, IDENTITY, train_state)
    return found


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", MESHES)
def test_a_state_moves_between_meshes_bit_exactly(tmp_path, before, after):
    saved(tmp_path / "steps", mesh_of(before), 3)
    mesh = mesh_of(after)
    found = restored(tmp_path / "steps", mesh)
    assert differing(found, train_state()) == []
    if mesh is not None:
        wanted = jax.tree.leaves(sharding.shardings(mesh, found))
        for leaf, placed in zip(jax.tree.leaves(found), wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)


@pytest.mark.slow
def test_each_of_200_flipped_bits_in_shards_is_detected(tmp_path, capfd):
    mesh = mesh_of("fsdp 2")
    folder = saved(tmp_path / "steps", mesh, 3, 6)
    step = folder / "6"
    files = files_of(step)
    before = {path: path.read_bytes() for path in files}
    draw = random.Random(0)
    for index in range(200):
        path = files[index % len(files)]
        damage(path, draw.randrange(8 * len(before[path])))
        found = restored(folder, mesh)
        assert differing(found, train_state(3)) == [], path
        said = capfd.readouterr().err
        assert "step 6 is damaged: " in said
        (folder / step_directories.BAD / "6").rename(step)
        path.write_bytes(before[path])
    assert differing(restored(folder, mesh), train_state(6)) == []


def test_a_wrong_value_in_one_shard_is_reported_by_its_leaf():
    mesh = mesh_of("fsdp 2")
    state = train_state(3)
    checksums = leaf_checksums(sharding.place(mesh, state))
    matrix = state.params["head"]["weight"]
    head = {"weight": matrix.at[-1, -1].add(1.0)}
    wrong = dataclasses.replace(state, params=state.params | {"head": head})
    assert changed_leaves(checksums, sharding.place(mesh, state)) == []
    assert changed_leaves(checksums, sharding.place(mesh, wrong)) == [
        "params/head/weight"
    ]
