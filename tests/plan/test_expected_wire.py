"""The bytes that a step sends, computed from the sharding of the weights."""

import functools

import jax
import pytest
from jax.sharding import PartitionSpec

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.plan.collectives import wire_bytes
from rwkv7_jax.plan.expected_wire import expected_wire_bytes
from rwkv7_jax.plan.steps import describe_weights
from rwkv7_jax.sharding import specs

CONFIG = RWKV7Config(vocab_size=512, num_layers=3, width=128)
TOKENS = 64


@functools.cache
def weights_of(dtype):
    return describe_weights(CONFIG, dtype, None)


def sent(sizes, dtype="bfloat16", *, trained=False, tokens=TOKENS, **choices):
    weights = weights_of(dtype)
    state = {"wkv": jax.ShapeDtypeStruct((3, 1, 2, 64, 64), "float32")}
    return expected_wire_bytes(
        weights,
        sizes,
        trained=weights if trained else state,
        dtype="bfloat16",
        tokens=tokens,
        **choices,
    )


def gathered_bytes(sizes):
    """Return the bfloat16 bytes of the sharded matrices that are gathered twice, and once."""
    weights = weights_of("bfloat16")
    pairs = zip(
        jax.tree.leaves(weights),
        jax.tree.leaves(
            specs(sizes, weights), is_leaf=lambda x: isinstance(x, PartitionSpec)
        ),
        strict=True,
    )
    total = sum(2 * leaf.size for leaf, spec in pairs if any(spec))
    embedding = 2 * weights["emb"]["weight"].size
    first = weights["layer_0"]
    once = 2 * weights["head"]["weight"].size
    for leaf, spec in zip(
        jax.tree.leaves(first),
        jax.tree.leaves(
            specs(sizes, {"layer_0": first}),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        ),
        strict=True,
    ):
        once += 2 * leaf.size * any(spec)
    return total - embedding - once, once


def test_one_device_sends_nothing():
    assert sent({}) == 0 and sent({}, "float32", trained=True) == 0


def test_the_devices_of_a_stack_share_the_states_that_they_update():
    sizes = {"data": 8}
    stack = [jax.ShapeDtypeStruct((8, 3, 1, 2, 64, 64), "float32")] * 3
    sent = expected_wire_bytes(
        weights_of("bfloat16"),
        sizes,
        trained=(),
        dtype="bfloat16",
        tokens=TOKENS,
        microbatches=2,
        stack=stack,
    )
    assert sent == 7 / 8 * 3 * 4 * 8 * 3 * 2 * 64 * 64


def test_a_frozen_matrix_is_gathered_once_per_pass_and_the_head_once():
    sizes = {"data": 1, "fsdp": 4}
    twice, once = gathered_bytes(sizes)
    state = wire_bytes("all-reduce", 4, 4 * 3 * 2 * 64 * 64)
    rows = wire_bytes("all-to-all", 4, TOKENS * 128 * 2)
    expected = 0.75 * (2 * twice + once) + state + rows
    assert sent(sizes) == pytest.approx(expected)


def test_training_adds_one_reduce_scatter_at_the_compute_dtype():
    sizes = {"data": 1, "fsdp": 4}
    twice, once = gathered_bytes(sizes)
    trained = sent(sizes, "float32", trained=True, tokens=0)
    small = trained - 0.75 * (3 * twice + 2 * once)
    # Vectors and norms, which each device has, are averaged by all.
    assert 0 < small < 0.03 * trained
    # These alone are as wide as the weights.
    narrow = sent(sizes, trained=True, tokens=0)
    assert narrow == pytest.approx(trained - small / 2)
    # Rows of the embedding go to their readers, and their gradients come back.
    rows = wire_bytes("all-to-all", 4, TOKENS * 128 * 2)
    assert sent(sizes, trained=True) == pytest.approx(narrow + 2 * rows)


def test_groups_of_devices_average_the_gradients_of_their_shards():
    one = {"data": 1, "fsdp": 4}
    two = {"data": 2, "fsdp": 4}
    weights = weights_of("bfloat16")
    in_shards = sum(gathered_bytes(one)) + 2 * weights["emb"]["weight"].size
    whole = sum(2 * leaf.size for leaf in jax.tree.leaves(weights)) - in_shards
    # All eight devices average what is not sharded, no longer four.
    further = wire_bytes("all-reduce", 8, whole) - wire_bytes("all-reduce", 4, whole)
    averaged = wire_bytes("all-reduce", 2, in_shards // 4)
    added = sent(two, trained=True, tokens=0) - sent(one, trained=True, tokens=0)
    assert added == pytest.approx(averaged + further)


def test_tensor_parallelism_sends_activations_instead_of_weights():
    sizes = {"data": 1, "tensor": 2}
    rows = TOKENS * 128 * 2
    summed = wire_bytes("all-reduce", 2, rows)
    back = wire_bytes("all-gather", 2, rows)
    # Two a block in the forward pass and two in the backward pass; the states stay where they are.
    assert sent(sizes) == pytest.approx(3 * 4 * summed + back)
    assert sent(sizes, recomputed=True) == pytest.approx(3 * 5 * summed + back)
    assert sent(sizes, tokens=0) == 0
    # Two groups average the gradients of the states' halves.
    halves = wire_bytes("all-reduce", 2, 4 * 3 * 2 * 64 * 64 // 2)
    assert sent({"data": 2, "tensor": 2}, tokens=0) == halves


def test_each_microbatch_gathers_the_weights_again():
    sizes = {"data": 2, "fsdp": 4}
    once = sent(sizes, trained=True)
    assert sent(sizes, trained=True, microbatches=4) == 4 * once


def test_data_parallel_traffic_barely_depends_on_the_group_count():
    few = sent({"data": 8, "fsdp": 1}, trained=True)
    many = sent({"data": 256, "fsdp": 1}, trained=True)
    assert many / few == pytest.approx((255 / 256) / (7 / 8))
