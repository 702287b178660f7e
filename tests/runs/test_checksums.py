"""Fingerprints: what changes them, and what does not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7_jax.runs.resume.checksums import (
    changed_leaves,
    leaf_checksums,
    tree_checksum,
)
from rwkv7_jax.sharding.layout import path_name
from rwkv7_jax.training.train_step import TrainState

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")
SHAPES = ((), (2, 1, 4))


def drawn(dtype: str, shape: tuple, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed)
    if dtype == "bool":
        return noise.integers(0, 2, shape).astype(bool)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.frombuffer(
        noise.bytes(kind.itemsize * int(np.prod(shape))), kind
    ).reshape(shape)


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    raw = bytearray(array.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)


def lanes(array) -> str:
    return leaf_checksums({"x": jnp.asarray(array)})["x"][2]


@settings(max_examples=150)
@given(
    st.sampled_from([d for d in DTYPES if d != "bool"]),
    st.sampled_from(SHAPES),
    st.integers(0, 9),
    st.data(),
)
def test_any_single_bit_changes_both_lanes(dtype, shape, seed, data):
    array = drawn(dtype, shape, seed)
    bit = data.draw(st.integers(0, 8 * array.nbytes - 1))
    one = lanes(array)
    two = lanes(flipped(array, bit))
    assert one[:8] != two[:8] and one[8:] != two[8:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_entries_change_the_checksum(dtype):
    array = (
        np.zeros((3, 5), bool)
        if dtype == "bool"
        else np.zeros((3, 5), jnp.dtype(dtype))
    )
    array[0, 1] = 1
    moved = [np.roll(array, steps, axis) for steps, axis in ((1, 0), (1, 1), (2, 1))]
    assert len({lanes(array), *map(lanes, moved)}) == 4


def test_the_checksums_equal_those_of_numpy():
    def mixed(x):
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    array = drawn("float32", (4, 6))
    i, j = np.indices(array.shape).astype(np.uint32)
    place = np.zeros_like(i)
    for axis, along in enumerate((i, j)):
        place = mixed(place + along * np.uint32(0x9E3779B1) + np.uint32(axis + 1))
    words = array.view(np.uint32)
    sums = [
        mixed(words ^ mixed(place + np.uint32(seed))).sum(dtype=np.uint32)
        for seed in (0x9E3779B1, 0x7FEB352D)
    ]
    assert lanes(array) == "".join(f"{int(s):08x}" for s in sums)


def test_a_sharded_array_has_the_same_fingerprint():
    array = drawn("float32", (4, 6))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    for axes in (("data", None), (None, "data"), ()):
        spec = jax.sharding.PartitionSpec(*axes)
        spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        assert lanes(spread) == lanes(array)


def test_a_random_key_is_hashed_by_its_data():
    keys = [leaf_checksums(jax.random.key(seed)) for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]


def test_damaged_missing_and_extra_leaves_are_named():
    tree = {"a": jnp.ones(3), "b": [jnp.zeros(2), jnp.ones((), jnp.int32)]}
    before = leaf_checksums(tree)
    assert changed_leaves(before, tree) == []
    assert changed_leaves(before, tree | {"a": jnp.ones(3).at[1].set(2)}) == ["a"]
    assert changed_leaves(before, tree | {"a": jnp.ones(3, jnp.int32)}) == ["a"]
    assert changed_leaves(before, tree | {"a": jnp.ones((3, 1))}) == ["a"]
    assert changed_leaves(before, {"b": tree["b"], "c": jnp.ones(1)}) == ["a", "c"]


def test_names_and_bits_change_the_fingerprint_of_a_tree():
    trees = [{"a": jnp.ones(3)}, {"b": jnp.ones(3)}, {"a": jnp.ones(3).at[0].set(0)}]
    assert len({tree_checksum(tree) for tree in trees}) == 3
    assert tree_checksum(trees[0]) == tree_checksum({"a": np.ones(3, np.float32)})


class Pair(NamedTuple):
    first: jax.Array
    second: dict


def test_leaves_are_named_by_their_path_without_brackets_or_quotes():
    count = jnp.zeros(())
    params = {"layers": {"w0": jnp.ones(2)}, "head": (jnp.ones(1), [jnp.ones(3)])}
    train = TrainState(
        step=count, params=params, opt_state=Pair(count, {"mu": count}), skipped=count
    )
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)]
    assert names == [
        "step",
        "params/head/0",
        "params/head/1/0",
        "params/layers/w0",
        "opt_state/first",
        "opt_state/second/mu",
        "skipped",
    ]
