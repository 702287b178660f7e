"""How the GPU kernels' sequences are cut into segments that are walked at the same time."""

import functools

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
from pallas_kernels import tiles, wkv7_reference
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.gpu import pallas_calls
from pallas_kernels.gpu.segmented_passes import KernelSet, Probes, choose_segments

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


class PlainKernels(KernelSet):
    """The kernels in plain JAX; what they save is the start and the gradient of a segment's end."""

    table = tiles.PALLAS_GPU

    def forward_kernel(self, inputs, state, choice, save, probes, spans, interpret):
        y, end = wkv7_reference(inputs, state)
        if probes is not None:
            return [end]
        return [end, y, state[:, :, None]] if save else [end, y]

    def state_kernel(self, inputs, dy, dend, choice, probes, spans, interpret):
        # Neither the values nor the start state affect its gradient.
        run = functools.partial(wkv7_reference, inputs._replace(v=jnp.zeros_like(dy)))
        _, pull = jax.vjp(run, jnp.zeros_like(dend))
        (dstart,) = pull((dy, dend))
        return [dstart] if probes is not None else [dstart, dend]

    def gradients_kernel(self, inputs, dy, starts, ends, choice, interpret):
        _, pull = jax.vjp(wkv7_reference, inputs, starts[:, :, 0])
        return list(pull((dy, ends))[0])


def test_segments_of_any_kernels_match_the_definition(monkeypatch):
    inputs, state = make_inputs(Case(2, 60, 2, 16, 32, "slow"))
    dy = jnp.sin(inputs.v)
    dend = jnp.cos(state)
    name = "pallas_kernels.gpu.segmented_passes.choose_segments"
    monkeypatch.setattr(name, lambda **sizes: 4)
    kernels = PlainKernels()

    @jax.jit
    def both_passes(inputs, state, dy, dend):
        y, end, starts = kernels.forward_saving(inputs, state, chunk=16)
        grads, dstate = kernels.backward(inputs, starts, dy, dend, chunk=16)
        return y, end, (*grads, dstate)

    found = jax.tree.leaves(both_passes(inputs, state, dy, dend))
    expected = jax.tree.leaves(wkv_reference.both(inputs, state, dy, dend))
    for left, right in zip(found, expected, strict=True):
        assert_close(left, right, WKV["float32"]["gradient"])


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
