"""Forward and backward passes made of three GPU kernels, Pallas's or Triton's.

One program handles one head of a sequence, chunk by chunk. Where there are too few heads to fill a
GPU, the sequence is cut into segments that are walked at the same time: a first walk finds what
each segment makes of zeros and of the identity, which gives every segment its own start state.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.reference import State, WKVInputs

# Scaled states, one for each chunk of every segment, in the orientation that the kernels prefer.
Starts = Float[Array, "BS H C N1 N2"]
Values = Float[Array, "B T H Nv"]
# Programs that keep a large GPU busy.
PROGRAMS = 256
# Fewer chunks than this are not worth a segment.
SHORTEST = 8


def split(x: Float[Array, "B T H N"], segments: int) -> Float[Array, "BS TS H N"]:
    """Turns the segments of each row into rows of the batch."""
    batch, tokens = x.shape[:2]
    return x.reshape(batch * segments, tokens // segments, *x.shape[2:])


def _make_probes(state: State, segments: int) -> Float[Array, "BS H NvNk Nk"]:
    """Stacks zeros [Nv Nk] on the identity [Nk Nk], as the start state of every segment."""
    batch, heads, values, keys = state.shape
    # Below the first Nv rows of zeros, the identity: ones at (Nv + i, i).
    rows = jnp.eye(values + keys, keys, -values)
    return jnp.broadcast_to(rows, (batch * segments, heads, *rows.shape))


def _pad_values(
    x: Float[Array, "BS TS H Nv"], state: State
) -> Float[Array, "BS TS H NvNk"]:
    """Appends zeros for the identity's rows, into which no token writes."""
    keys = state.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, keys)))


def chain_segments(
    probe_ends: Float[Array, "BS H NvNk Nk"], state: State, *, reverse: bool
) -> Float[Array, "BS H Nv Nk"]:
    """Computes every segment's start state from the first one's.

    Args:
        probe_ends: what the segments make of the states of `_make_probes`.
        state: the first segment's start state; with `reverse` the last one's end gradient.
        reverse: walk from the last segment to the first.
    """
    values = state.shape[2]

    # Highest precision: the errors of this product would pass through all later segments.
    def step(state, probe_end):
        # A segment is affine: its tokens write `written`, and turn a start state S into S kept.
        written, kept = jnp.split(probe_end, [values], axis=2)
        # written [B H Nv Nk], kept [B H Nk Nk]: the product of the segment's transitions.
        return jnp.matmul(state, kept, precision="highest") + written, state

    by_segment = probe_ends.reshape(state.shape[0], -1, *probe_ends.shape[1:]).swapaxes(
        0, 1
    )
    # by_segment [S B H NvNk Nk]; few and small products, next to the walk over the tokens.
    _, starts = jax.lax.scan(step, state, by_segment, reverse=reverse)
    return starts.swapaxes(0, 1).reshape(-1, *state.shape[1:])


class ForwardKernel(Protocol):
    """The kernel that walks the chunks forward."""

    def __call__(
        self,
        inputs: WKVInputs,
        state: State,
        choice: tiles.GPU,
        save: bool | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Returns the end state; unless `save` is None also y; if it is true also each S^."""
        ...


class StateKernel(Protocol):
    """The kernel that walks the chunks backward."""

    def __call__(
        self,
        inputs: WKVInputs,
        dy: Array,
        dend: State,
        choice: tiles.GPU,
        save: bool,
        interpret: bool,
    ) -> Sequence[Array]:
        """Returns the start state's gradient and, with `save`, each chunk's G^."""
        ...


class GradientsKernel(Protocol):
    """The kernel for the gradients of the inputs, one program for each chunk."""

    def __call__(
        self,
        inputs: WKVInputs,
        dy: Array,
        starts: Array,
        ends: Array,
        choice: tiles.GPU,
        interpret: bool,
    ) -> Sequence[Array]:
        """Returns the six gradients, from each chunk's S^ and G^."""
        ...


class _Plan(NamedTuple):
    """How one call is cut.

    Attributes:
        choice: tiles, with the chunk that the call asks for.
        segments: segments of each sequence, a power of two.
    """

    choice: tiles.GPU
    segments: int

    def cut(self, x: Array) -> Array:
        """Pads with zeros to full segments of full chunks, and splits into segments."""
        # A token of zeros changes neither the state nor a gradient.
        missing = -x.shape[1] % (self.choice.chunk * self.segments)
        return split(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), self.segments)

    def cut_inputs(self, inputs: WKVInputs) -> WKVInputs:
        """Casts the inputs to the kernels' dtypes and cuts them."""
        dtype = inputs.v.dtype
        return WKVInputs(
            r=self.cut(inputs.r.astype(dtype)),
            # In float32: the error of a sum of logarithms is a relative error of the decay.
            log_w=self.cut(inputs.log_w.astype(jnp.float32)),
            k=self.cut(inputs.k.astype(dtype)),
            v=self.cut(inputs.v),
            a=self.cut(inputs.a.astype(dtype)),
            b=self.cut(inputs.b.astype(dtype)),
        )


class KernelSet(NamedTuple):
    """Three kernels and how they are tiled: an implementation of the op.

    Attributes:
        table: of `tiles`.
        forward_kernel: walks the chunks forward.
        state_kernel: walks them backward.
        gradients_kernel: computes the inputs' gradients.
    """

    table: dict
    forward_kernel: ForwardKernel
    state_kernel: StateKernel
    gradients_kernel: GradientsKernel

    def _plan(self, inputs: WKVInputs, chunk: int | None) -> _Plan:
        """Chooses the tiles and the number of segments."""
        batch, tokens, heads, keys = inputs.r.shape
        v = inputs.v
        choice = tiles.for_gpu(
            self.table, keys, v.shape[3], v.dtype, tiles.capability()
        )
        choice = choice._replace(chunk=chunk or choice.chunk)
        # Doubled while the GPU is not full and each segment is long enough to pay for the probes.
        segments = 1
        while (
            2 * segments * batch * heads <= PROGRAMS
            and tokens >= 2 * segments * SHORTEST * choice.chunk
        ):
            segments *= 2
        return _Plan(choice, segments)

    def _forward(
        self,
        inputs: WKVInputs,
        state: State,
        chunk: int | None,
        save: bool,
        interpret: bool,
    ) -> tuple[Array, ...]:
        batch, tokens, heads, values = inputs.v.shape
        plan = self._plan(inputs, chunk)
        choice, segments = plan
        cut = plan.cut_inputs(inputs)
        if segments > 1:
            # Both probes in one walk: the identity's rows are more value channels.
            wide = cut._replace(v=_pad_values(cut.v, state))
            probes = _make_probes(state, segments)
            (probe_ends,) = self.forward_kernel(wide, probes, choice, None, interpret)
            state = chain_segments(probe_ends, state, reverse=False)
        end, y, *starts = self.forward_kernel(cut, state, choice, save, interpret)
        y = y.reshape(batch, -1, heads, values)[:, :tokens]
        # The end state of a sequence is that of its last segment.
        return y, end[segments - 1 :: segments], *starts

    def forward(
        self,
        inputs: WKVInputs,
        state: State,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Values, State]:
        """Computes y and the state after the last token.

        Args:
            inputs: bfloat16 or float32; matrix products take operands of v's dtype.
            state: float32.
            chunk: tokens of a chunk; None takes the table's.
            interpret: run in Pallas's interpreter, for tests.
        """
        y, end = self._forward(inputs, state, chunk, False, interpret)
        return y, end

    def forward_saving(
        self,
        inputs: WKVInputs,
        state: State,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Values, State, Starts]:
        """Computes what `forward` does, and the scaled state of every chunk."""
        y, end, starts = self._forward(inputs, state, chunk, True, interpret)
        return y, end, starts

    def backward(
        self,
        inputs: WKVInputs,
        starts: Starts,
        dy: Values,
        dend: State,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[WKVInputs, State]:
        """Computes the gradients of the six inputs and of the start state.

        Args:
            inputs: as given to `forward_saving`.
            starts: the states that `forward_saving` returned.
            dy: gradient of y.
            dend: gradient of the last state.
            chunk: as given to `forward_saving`.
            interpret: run in Pallas's interpreter, for tests.
        """
        batch, tokens, heads, _ = dy.shape
        plan = self._plan(inputs, chunk)
        choice, segments = plan
        cut = plan.cut_inputs(inputs)
        dy = plan.cut(dy.astype(cut.v.dtype))
        if segments > 1:
            # Probes of the gradient: the walk backwards is affine in it as well.
            wide = _pad_values(dy, dend)
            probes = _make_probes(dend, segments)
            (probe_ends,) = self.state_kernel(
                cut, wide, probes, choice, False, interpret
            )
            dend = chain_segments(probe_ends, dend, reverse=True)
        dstart, ends = self.state_kernel(cut, dy, dend, choice, True, interpret)
        grads = self.gradients_kernel(cut, dy, starts, ends, choice, interpret)

        def join(grad, x):
            joined = grad.reshape(batch, -1, heads, grad.shape[3])
            return joined[:, :tokens].astype(x.dtype)

        grads = jax.tree.map(join, WKVInputs(*grads), inputs)
        # The start state's gradient is that of each sequence's first segment.
        return grads, dstart[::segments]
