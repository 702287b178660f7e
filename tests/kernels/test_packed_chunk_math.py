"""The TPU kernels' arithmetic, a restatement of `chunk_math`, against it on plain arrays.

No Pallas: one chunk of the heads of one tile, composed from the functions of each file. The TPU's
arithmetic is float32; `chunk_math` computes in float64 here, where it equals the definition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import WKV, assert_close

from pallas_kernels import chunk_math
from pallas_kernels.cases import MODES, Case, make_inputs
from pallas_kernels.reference import NAMES, WKVInputs
from pallas_kernels.tpu import kernel_bodies, packed_chunk_math
from pallas_kernels.tpu.head_packing import (
    TileLayout,
    compact,
    expand,
    make_masks,
    stack,
    unstack,
)

# Two heads of a tile, four, and one that fills it.
CASES = [
    Case(1, 32, 2, key_size=64, value_size=64),
    Case(1, 16, 4, key_size=32, value_size=64),
    Case(1, 64, 1, key_size=128, value_size=256),
]


def finish(generator):
    """Runs the stages of a generator and returns its result."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def layout_of(case, dtype="float32"):
    """One tile with all heads of the case, and its tokens as one chunk."""
    return TileLayout(
        chunk=case.tokens,
        heads=case.heads,
        keys=case.key_size,
        values=case.value_size,
        groups=1,
        dtype=jnp.dtype(dtype),
    )


def heads_apart(x, heads):
    """Splits [rows H*N] into [H rows N]."""
    return x.reshape(x.shape[0], heads, -1).swapaxes(0, 1)


@jax.jit
def by_chunk_math(inputs, state, dy, dend):
    """y, the end state, the six gradients and the start state's, heads first."""
    r, log_w, k, v, a, b, dy = (x[0].swapaxes(0, 1) for x in (*inputs, dy))
    halves = (jnp.sum(x, axis=-2)[..., None] for x in jnp.split(log_w, 2, axis=-2))
    arithmetic = chunk_math.Arithmetic(v.dtype)
    chunk = chunk_math.prepare(r, log_w, a, b, tuple(halves), arithmetic)
    written = chunk_math.write_products(chunk, k, v)
    states = (state[0].mT * chunk.mid, dend[0].mT * chunk.rest)
    y, end = chunk_math.forward(chunk, written, states[0])
    read = chunk_math.read_products(chunk)
    u = chunk_math.removals(chunk, read.inverse, written, states[0])
    z = chunk_math.removal_gradients(chunk, read.transposed, dy, states[1])
    grads = WKVInputs(**dict(chunk_math.gradients(chunk, written, u, z, states, dy)))
    dstart = chunk_math.state_gradient(chunk, z, dy, states[1]) * chunk.mid
    return y, (end * chunk.rest).mT, grads, dstart.mT


@functools.partial(jax.jit, static_argnames="layout")
def by_packed_chunk_math(inputs, state, dy, dend, layout):
    """The same nine arrays by the functions that the TPU kernels call; removals of both passes."""
    heads = layout.heads
    masks = make_masks(layout)
    tokens = WKVInputs(*(x[0].reshape(layout.chunk, -1) for x in inputs))
    state = state[0].swapaxes(0, 1).reshape(layout.values, -1)
    dend = dend[0].swapaxes(0, 1).reshape(layout.values, -1)
    chunk = finish(packed_chunk_math.prepare(tokens, masks, layout))
    factors = chunk.factors

    scaled = expand(state, masks, layout) * factors.mid
    start = scaled.astype(layout.dtype)
    written = finish(packed_chunk_math.writes(chunk, start, layout))
    y = packed_chunk_math.outputs(chunk, written, start, masks, layout)
    end = packed_chunk_math.end_state(chunk, written, scaled, masks)

    dy = stack(dy[0].reshape(layout.chunk, -1), masks.value_head, layout)
    dscaled = expand(dend, masks, layout) * factors.rest
    dend = dscaled.astype(layout.dtype)
    u, z = finish(
        packed_chunk_math.removals_and_gradients(chunk, dy, start, dend, layout)
    )
    dv = packed_chunk_math.value_gradient(chunk, z, dy, dend, masks, layout)
    dstart = packed_chunk_math.start_gradient(chunk, z, dy, dscaled, masks)
    pairs = packed_chunk_math.pair_gradients(chunk, u, z, dy)
    parts = packed_chunk_math.key_gradients(
        chunk, pairs, u, z, dy, start, dend, masks, layout
    )
    ends = jnp.sum(scaled * dscaled, 0, keepdims=True)
    grads = WKVInputs(
        r=sum(parts.r) * factors.upto,
        log_w=packed_chunk_math.decay_gradient(chunk, parts, ends, masks, layout),
        k=sum(parts.k) * factors.after,
        v=dv,
        a=sum(parts.a) * factors.before,
        b=sum(parts.b) * factors.after,
    )
    end = compact(end, layout)
    dstart = compact(dstart, layout)
    found = jax.tree.map(lambda x: heads_apart(x, heads), (y, end, grads, dstart))
    return found, (u, written[: layout.rows])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=["two heads", "four heads", "one head"])
def test_one_chunk_matches_chunk_math(case, mode):
    inputs, state = make_inputs(Case(**(vars(case) | {"mode": mode})))
    dy = jnp.sin(inputs.v)
    dend = jnp.cos(state)
    ours, removals = by_packed_chunk_math(inputs, state, dy, dend, layout_of(case))
    np.testing.assert_array_equal(*removals)
    arrays = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (inputs, state, dy, dend)
    )
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        theirs = jax.tree.map(np.asarray, by_chunk_math(*arrays))
    bars = WKV["float32"]
    y, end, grads, dstart = ours
    true_y, true_end, true_grads, true_dstart = theirs
    assert_close(y, true_y, bars["y"], "y")
    assert_close(end, true_end, bars["state"], "end")
    for name, grad, true in zip(NAMES, grads, true_grads, strict=True):
        assert_close(grad, true, bars["gradient"], f"gradient of {name}")
    assert_close(dstart, true_dstart, bars["gradient"], "gradient of the start state")


def test_sums_keep_16_bits_where_products_take_bfloat16():
    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    signs = np.tril(np.ones((16, 16), np.float32)) - np.eye(16, dtype=np.float32)
    layout = layout_of(CASES[1], "bfloat16")
    found = packed_chunk_math.sums(jnp.asarray(signs), jnp.asarray(x), layout)
    assert_close(found, signs @ np.float64(x), 2.0**-16)


@pytest.mark.parametrize("case", CASES, ids=["two heads", "four heads", "one head"])
def test_unpacking_inverts_packing(case):
    layout = layout_of(case)
    masks = make_masks(layout)
    tokens = jax.random.normal(
        jax.random.key(0), (case.tokens, case.heads * case.key_size)
    )
    state = jax.random.normal(
        jax.random.key(1), (case.value_size, case.heads * case.key_size)
    )
    stacked = stack(tokens, masks.key_head, layout)
    np.testing.assert_array_equal(unstack(stacked, masks.key_head, layout), tokens)
    np.testing.assert_array_equal(compact(expand(state, masks, layout), layout), state)


def test_interleaved_groups_alternate_until_the_last_one_ends():
    seen = []

    def group(name, stages):
        for stage in range(stages):
            seen.append(f"{name}{stage}")
            yield

    kernel_bodies.interleave([group("a", 1), group("b", 3), group("c", 2)])
    assert seen == ["a0", "b0", "c0", "b1", "c1", "b2"]
