"""Forward and backward passes from three GPU kernels, whoever wrote these.

A head of a sequence is one program's work, chunk by chunk. Where there are too few heads to fill a
GPU, the sequence is cut into segments that are walked at the same time: a first walk finds what
each segment makes of zeros and of the identity, which gives every segment its own start.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.reference import Inputs, State

# Scaled states, one a chunk of every segment, in the orientation that the kernels like.
Starts = Float[Array, "BS H C N1 N2"]
Values = Float[Array, "B T H Nv"]
# Programs that keep a large GPU busy, and the fewest chunks that are worth a segment.
PROGRAMS, SHORTEST = 256, 8


def split(x: Float[Array, "B T H N"], segments: int) -> Float[Array, "BS TS H N"]:
    """Segments as rows of the batch."""
    return x.reshape(x.shape[0] * segments, x.shape[1] // segments, *x.shape[2:])


def _probes(state: State, segments: int) -> Float[Array, "BS H NvNk Nk"]:
    """Zeros and the identity, one above the other, as every segment's start."""
    rows = jnp.eye(state.shape[2] + state.shape[3], state.shape[3], -state.shape[2])
    return jnp.broadcast_to(rows, (state.shape[0] * segments, state.shape[1], *rows.shape))


def _widen(x: Float[Array, "BS TS H Nv"], state: State) -> Float[Array, "BS TS H NvNk"]:
    """Zeros for the identity's rows, into which no token writes."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, state.shape[3])))


def chain_segments(
    found: Float[Array, "BS H NvNk Nk"], state: State, *, reverse: bool
) -> Float[Array, "BS H Nv Nk"]:
    """Every segment's start, from `state` and what the segments make of `_probes`."""

    def step(state, found):
        written, kept = jnp.split(found, [state.shape[2]], axis=2)
        return jnp.matmul(state, kept, precision="highest") + written, state

    by_segment = found.reshape(state.shape[0], -1, *found.shape[1:]).swapaxes(0, 1)
    _, starts = jax.lax.scan(step, state, by_segment, reverse=reverse)
    return starts.swapaxes(0, 1).reshape(-1, *state.shape[1:])


class KernelSet(NamedTuple):
    """Three kernels and how they are tiled.

    Attributes:
        table: of `tiles`.
        forward_kernel: (inputs, state, choice, save, interpret) to the end state and, unless `save`
            is None, y and, if it is true, S^ of every chunk.
        state_kernel: (r, log_w, a, b, dy, dend, choice, save, interpret) to the start state's
            gradient and, if `save`, G^ of every chunk.
        gradients_kernel: (inputs, dy, S^, G^, choice, interpret) to the six gradients.
    """

    table: dict
    forward_kernel: Callable
    state_kernel: Callable
    gradients_kernel: Callable

    def _plan(self, inputs: Inputs, chunk: int | None) -> tuple[tuple[Array, ...], tiles.GPU, int]:
        """Whole segments of whole chunks in the kernels' dtypes; their tiles; their number."""
        (batch, tokens, heads, keys), v = inputs[0].shape, inputs[3]
        choice = tiles.for_gpu(self.table, keys, v.shape[3], v.dtype, tiles.capability())
        choice = choice._replace(chunk=chunk or choice.chunk)
        segments = 1
        while (
            2 * segments * batch * heads <= PROGRAMS
            and tokens >= 2 * segments * SHORTEST * choice.chunk
        ):
            segments *= 2
        r, log_w, *rest = inputs
        arrays = (r.astype(v.dtype), log_w.astype(jnp.float32), *(x.astype(v.dtype) for x in rest))
        return tuple(self._cut(x, choice, segments) for x in arrays), choice, segments

    def _cut(self, x: Array, choice: tiles.GPU, segments: int) -> Array:
        """Padded with zeros, which change nothing, and split."""
        missing = -x.shape[1] % (choice.chunk * segments)
        return split(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), segments)

    def _forward(self, inputs: Inputs, state: State, chunk, save: bool, interpret):
        batch, tokens, heads, values = inputs[3].shape
        cut, choice, segments = self._plan(inputs, chunk)
        if segments > 1:
            wide = (*cut[:3], _widen(cut[3], state), *cut[4:])
            probes = _probes(state, segments)
            (found,) = self.forward_kernel(wide, probes, choice, None, interpret)
            state = chain_segments(found, state, reverse=False)
        end, y, *starts = self.forward_kernel(cut, state, choice, save, interpret)
        y = y.reshape(batch, -1, heads, values)[:, :tokens]
        return y, end[segments - 1 :: segments], *starts

    def forward(
        self, inputs: Inputs, state: State, *, chunk: int | None = None, interpret: bool = False
    ) -> tuple[Values, State]:
        """What every token reads, and the state behind the last.

        Args:
            inputs: r, log_w, k, v, a, b; bfloat16 or float32 by v, of which products are made.
            state: float32.
            chunk: tokens of a chunk; None takes the table's.
            interpret: run in Pallas's interpreter, for tests.
        """
        return self._forward(inputs, state, chunk, False, interpret)

    def forward_saving(
        self, inputs: Inputs, state: State, *, chunk: int | None = None, interpret: bool = False
    ) -> tuple[Values, State, Starts]:
        """As `forward`, and the scaled states of every chunk."""
        return self._forward(inputs, state, chunk, True, interpret)

    def backward(
        self,
        inputs: Inputs,
        starts: Starts,
        dy: Values,
        dend: State,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[tuple[Array, ...], State]:
        """Gradients of the six inputs and the start state, from what `forward_saving` kept."""
        batch, tokens, heads, _ = dy.shape
        cut, choice, segments = self._plan(inputs, chunk)
        dy = self._cut(dy.astype(cut[3].dtype), choice, segments)
        read = (cut[0], cut[1], cut[4], cut[5])
        if segments > 1:
            wide, probes = _widen(dy, dend), _probes(dend, segments)
            (found,) = self.state_kernel(*read, wide, probes, choice, False, interpret)
            dend = chain_segments(found, dend, reverse=True)
        dstart, ends = self.state_kernel(*read, dy, dend, choice, True, interpret)
        grads = self.gradients_kernel(cut, dy, starts, ends, choice, interpret)
        whole = (x.reshape(batch, -1, heads, x.shape[3])[:, :tokens] for x in grads)
        pairs = zip(whole, inputs, strict=True)
        return tuple(g.astype(x.dtype) for g, x in pairs), dstart[::segments]
