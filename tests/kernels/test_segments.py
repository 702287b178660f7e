"""How the GPU kernels' sequences are cut into segments that are walked at the same time."""

import abstract_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from tolerances import WKV, assert_close

import pallas_kernels
from pallas_kernels import wkv7_reference
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.gpu import pallas_calls
from pallas_kernels.gpu.segmented_passes import (
    Probes,
    chain_segments,
    choose_segments,
    split,
)

HEAD = {"values": 64, "keys": 64, "rows": 64}


def test_two_segments_are_never_chosen():
    chosen = {
        choose_segments(heads=heads, chunks=chunks, **HEAD)
        for heads in range(1, 300)
        for chunks in (1, 15, 16, 31, 32, 64, 128, 1024)
    }
    assert 2 not in chosen
    assert {1, 4} <= chosen


@pytest.mark.parametrize(
    ("heads", "chunks", "expected"),
    [
        # A full GPU, or a sequence too short for four segments of eight chunks.
        (264, 1024, 1),
        (128, 1024, 1),
        (1, 31, 1),
        (1, 32, 4),
        # The fastest of 1, 2, 4, 8 and 16 on an H100, forward and forward with backward.
        (16, 128, 8),
        (32, 128, 8),
        (64, 128, 4),
        (96, 128, 1),
        (128, 128, 1),
    ],
)
def test_the_number_of_segments_minimizes_the_time(heads, chunks, expected):
    assert choose_segments(heads=heads, chunks=chunks, **HEAD) == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_only_the_last_segment_and_the_identity_of_the_first_are_skipped(reverse):
    probes = Probes(segments=4, values=64, reverse=reverse)
    idle = {
        (row, first)
        for row in range(8)
        for first in (0, 64)
        if probes.is_idle(row, first)
    }
    last, first = (0, 3) if reverse else (3, 0)
    expected = {(last, 0), (last, 64), (first, 64)}
    assert idle == expected | {(row + 4, value) for row, value in expected}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_start_of_every_segment_follows_from_the_probes(reverse):
    """In plain JAX: the op runs the segments from the probes, or its gradient runs them back."""
    keys, values = 16, 32
    inputs, state = make_inputs(Case(2, 15, 2, keys, values, "slow"))
    dy = jnp.sin(inputs.v)
    cut = jax.tree.map(lambda x: split(x, 3), inputs)
    probes = Probes(3, values, reverse=reverse)

    @jax.jit
    def run(inputs, state, dy):
        (_, end), pull = jax.vjp(wkv7_reference, inputs, state)
        return pull((dy, state))[1] if reverse else end

    def widen(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, keys)))

    wide = cut._replace(v=widen(cut.v))
    ends = run(wide, probes.start_states(state), widen(split(dy, 3)))
    starts = chain_segments(ends, state, probes).reshape(2, 3, *state.shape[1:])
    for segment in range(3):
        passed = slice(5 * segment + 5, None) if reverse else slice(5 * segment)
        others = [x[:, passed] for x in inputs]
        _, end, grads = wkv_reference.both(others, state, dy[:, passed], state)
        expected = grads[-1] if reverse else end
        assert_close(starts[:, segment], expected, WKV["float32"]["state"])


def test_the_programs_of_segments_are_valid():
    tokens = jax.ShapeDtypeStruct((1, 1024, 12, 64), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((1, 12, 64, 64), jnp.float32)
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu")):
        traced = jax.jit(pallas_kernels.wkv7).trace(*[tokens] * 6, state)
        lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def parse(operation):
        if "mhlo.backend_config" in operation.attributes:
            code = operation.attributes["mhlo.backend_config"]["ir"].value_bytes
            # JAX does not check what it hands to Triton; parsing does.
            with ir.Context() as context:
                dialect.register_dialect(context)
                found.append(ir.Module.parse(code))
        return ir.WalkResult.ADVANCE

    lowered.operation.walk(parse)
    # The probes of the segments' start states, and the pass itself.
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(32, 64), (64, 32)], ids=["tall", "wide"])
def test_segments_match_a_single_pass(monkeypatch, sizes):
    keys, values = sizes
    inputs, state = make_inputs(Case(2, 70, 1, keys, values, "slow"))
    dy = jnp.sin(inputs.v)
    dend = jax.random.normal(jax.random.key(1), state.shape)
    kernels = pallas_calls.KERNELS

    def both_passes(segments):
        name = "pallas_kernels.gpu.segmented_passes.choose_segments"
        monkeypatch.setattr(name, lambda **sizes: segments)
        y, end, starts = kernels.forward_saving(inputs, state, chunk=16, interpret=True)
        grads = kernels.backward(inputs, starts, dy, dend, chunk=16, interpret=True)
        return jax.tree.map(np.asarray, (y, end, grads))

    alone = jax.tree.leaves(both_passes(1))
    for segments in (2, 4):
        found = jax.tree.leaves(both_passes(segments))
        for left, right in zip(found, alone, strict=True):
            assert_close(left, right, WKV["float32"]["gradient"])
