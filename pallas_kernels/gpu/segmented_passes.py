"""Forward and backward passes made of GPU kernels, in Pallas or Triton.

One program computes one head of a sequence, chunk by chunk. If there are too few heads to fill a
GPU, the sequence is split into segments that run in parallel. A first pass (the probes) runs each
segment from zeros and from the identity, from which every segment's start state follows.
"""

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.gpu.partitioning import unpartitioned
from pallas_kernels.packed_rows import Owners, chunk_spans
from pallas_kernels.reference import State, WKVInputs

# Scaled states, one for each chunk of every segment, in the orientation that the kernels prefer.
Starts = Float[Array, "BS H C N1 N2"]
Values = Float[Array, "B T H Nv"]
# The first chunk of each sequence of packed rows, and the one after its last.
Spans = Int[Array, "S 2"]
# Measured on an H100, heads of 64 in bfloat16: see docs/kernels.md.
# Multiprocessors, on each of which two programs run at a time.
CORES = 132
# Time of two programs that share a multiprocessor, relative to one alone.
PAIR = 1.25
# Time to chain one segment to the next, in chunks.
LINK = 2
# Minimum number of chunks of a segment.
SHORTEST = 8


def split(x: Float[Array, "B T H N"], segments: int) -> Float[Array, "BS TS H N"]:
    """Turns the segments of each row into rows of the batch."""
    batch, tokens = x.shape[:2]
    return x.reshape(batch * segments, tokens // segments, *x.shape[2:])


class Probes(NamedTuple):
    """The first pass over the segments, which finds how each maps its start state to its end.

    Attributes:
        segments: segments of a sequence.
        values: Nv, the rows of zeros or of the true start state; the identity's rows follow.
        reverse: run from the last segment to the first.
    """

    segments: int
    values: int
    reverse: bool

    def is_idle(self, row, first_value):
        """Tells whether a program has nothing to compute; works on concrete and traced numbers.

        No segment starts from the end of the last one. The first segment runs from the true start
        state, so it does not need the identity.

        Args:
            row: of the batch of segments.
            first_value: the first of the program's rows of the state.
        """
        segment = row % self.segments
        first, last = (self.segments - 1, 0) if self.reverse else (0, self.segments - 1)
        return (segment == last) | ((segment == first) & (first_value >= self.values))

    def start_states(self, state: State) -> Float[Array, "BS H NvNk Nk"]:
        """Stacks zeros on the identity [Nk Nk]; for the first segment the state on zeros."""
        batch, heads, values, keys = state.shape
        # Below the first Nv rows of zeros, the identity: ones at (Nv + i, i).
        rows = jnp.eye(values + keys, keys, -values)
        probes = jnp.broadcast_to(rows, (batch, self.segments, heads, *rows.shape))
        true_start = jnp.pad(state, ((0, 0), (0, 0), (0, keys), (0, 0)))
        first = self.segments - 1 if self.reverse else 0
        probes = probes.at[:, first].set(true_start)
        return probes.reshape(-1, *probes.shape[2:])


def _pad_values(
    x: Float[Array, "BS TS H Nv"], state: State
) -> Float[Array, "BS TS H NvNk"]:
    """Appends zeros for the identity's rows, into which no token writes."""
    keys = state.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, keys)))


def chain_segments(
    probe_ends: Float[Array, "BS H NvNk Nk"], state: State, probes: Probes
) -> Float[Array, "BS H Nv Nk"]:
    """Computes every segment's start state from the first one's.

    Args:
        probe_ends: the segments' end states from `probes.start_states`; the last one's is unused.
        state: the first segment's start state; with `reverse` the last one's end gradient.
        probes: how the segments were probed.
    """
    values = state.shape[2]

    # Highest precision: errors of this product propagate through all later segments.
    def step(state, probe_end):
        # A segment is an affine map: it turns a start state S into S kept + written.
        # The first segment's `written` is its true end state, and its `kept` is zero.
        written, kept = jnp.split(probe_end, [values], axis=2)
        # written [B H Nv Nk], kept [B H Nk Nk]: the product of the segment's transitions.
        return jnp.matmul(state, kept, precision="highest") + written, state

    by_segment = probe_ends.reshape(state.shape[0], -1, *probe_ends.shape[1:]).swapaxes(
        0, 1
    )
    # by_segment [S B H NvNk Nk]: the products are few and small next to the pass over the tokens.
    _, starts = jax.lax.scan(step, state, by_segment, reverse=probes.reverse)
    return starts.swapaxes(0, 1).reshape(-1, *state.shape[1:])


def _walk_time(programs: int) -> float:
    """Estimates the time of this many programs; one alone on a multiprocessor takes 1."""
    pairs, rest = divmod(programs, 2 * CORES)
    if rest > CORES:
        return PAIR * (pairs + 1)
    return PAIR * pairs + min(rest, 1)


def choose_segments(heads: int, chunks: int, values: int, keys: int, rows: int) -> int:
    """Chooses the number of segments of a sequence: the power of two with the shortest time.

    The unit of time is a chunk of a program that has a multiprocessor to itself. Programs of
    segments are short, and chaining takes `LINK` per segment. Two segments never pay off, since the
    probes run first.

    Args:
        heads: heads of all rows of the batch.
        chunks: chunks of the sequence.
        values: Nv.
        keys: Nk.
        rows: rows of the state in a program.
    """
    blocks = -(-values // rows)
    probe_blocks = -(-(values + keys) // rows)

    def time(segments):
        if segments == 1:
            return chunks * _walk_time(heads * blocks)
        # The first segment runs without the identity, the last not at all: see `Probes.is_idle`.
        probing = heads * (blocks + (segments - 2) * probe_blocks)
        walks = _walk_time(probing) + _walk_time(segments * heads * blocks)
        return chunks / segments * walks + LINK * segments

    candidates = [1]
    while 2 * candidates[-1] * SHORTEST <= chunks:
        candidates.append(2 * candidates[-1])
    # `min` returns the first of equals: fewer segments need less memory.
    return min(candidates, key=time)


class _Plan(NamedTuple):
    """How one call is split.

    Attributes:
        choice: tiles, with the chunk length of the call.
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
            # Guarding one of the arrays is enough.
            r=unpartitioned(self.cut(inputs.r.astype(dtype))),
            # In float32: the error of a sum of logarithms is a relative error of the decay.
            log_w=self.cut(inputs.log_w.astype(jnp.float32)),
            k=self.cut(inputs.k.astype(dtype)),
            v=self.cut(inputs.v),
            a=self.cut(inputs.a.astype(dtype)),
            b=self.cut(inputs.b.astype(dtype)),
        )


def _spans(owners: Owners | None, state: State) -> Spans | None:
    """Computes the chunks of each row of `state`; None without packed rows."""
    if owners is None:
        return None
    return chunk_spans(owners, state.shape[0] // owners.shape[0])


class KernelSet(abc.ABC):
    """An implementation of the op by three kernels, and optionally a fourth for single tokens.

    Tokens are bfloat16 or float32, states float32; matrix products take operands of v's dtype.

    Attributes:
        table: its table in `tiles`.
    """

    table: ClassVar[dict]

    @abc.abstractmethod
    def forward_kernel(
        self,
        inputs: WKVInputs,
        state: State,
        choice: tiles.GPU,
        save: bool,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Runs the chunks forward.

        Returns the end state; without `probes` also y; with `save` also each chunk's S^. With
        `spans` there is one state per span, which runs through the chunks of its span.
        """

    @abc.abstractmethod
    def state_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        dend: State,
        choice: tiles.GPU,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Runs the chunks backward.

        Returns the start state's gradient and, without `probes`, each chunk's G^.
        """

    @abc.abstractmethod
    def gradients_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        starts: Array,
        ends: Array,
        choice: tiles.GPU,
        interpret: bool,
    ) -> Sequence[Array]:
        """Computes the six gradients from each chunk's S^ and G^, with one program per chunk."""

    def token_kernel(
        self, inputs: WKVInputs, state: State, interpret: bool
    ) -> tuple[Array, Array] | None:
        """Computes a single token: y and the end state, which may alias the start state.

        Returns None if the implementation has no such kernel and computes a whole chunk.
        """
        del inputs, state, interpret
        return None

    def _plan(
        self, inputs: WKVInputs, owners: Owners | None, chunk: int | None
    ) -> _Plan:
        """Chooses the tiles and the number of segments."""
        batch, tokens, heads, keys = inputs.r.shape
        v = inputs.v
        choice = tiles.for_gpu(
            self.table, keys, v.shape[3], v.dtype, tiles.capability()
        )
        choice = choice._replace(chunk=chunk or choice.chunk)
        # Packed rows have enough programs: one for each sequence.
        if owners is not None:
            return _Plan(choice, segments=1)
        # Both passes use the forward tile: the backward pass reads the states saved there.
        segments = choose_segments(
            heads=batch * heads,
            chunks=-(-tokens // choice.chunk),
            values=v.shape[3],
            keys=keys,
            rows=choice.forward.values,
        )
        return _Plan(choice, segments)

    def _forward(
        self,
        inputs: WKVInputs,
        state: State,
        owners: Owners | None,
        chunk: int | None,
        save: bool,
        interpret: bool,
    ) -> tuple[Array, ...]:
        batch, tokens, heads, values = inputs.v.shape
        plan = self._plan(inputs, owners, chunk)
        choice, segments = plan
        cut = plan.cut_inputs(inputs)
        if segments > 1:
            # Both probes in one pass: the identity's rows are additional value channels.
            wide = cut._replace(v=_pad_values(cut.v, state))
            probes = Probes(segments, values, reverse=False)
            (probe_ends,) = self.forward_kernel(
                wide, probes.start_states(state), choice, False, probes, None, interpret
            )
            state = chain_segments(probe_ends, state, probes)
        spans = _spans(owners, state)
        end, y, *starts = self.forward_kernel(
            cut, state, choice, save, None, spans, interpret
        )
        y = y.reshape(batch, -1, heads, values)[:, :tokens]
        # The end state of a sequence is that of its last segment.
        return y, end[segments - 1 :: segments], *starts

    def forward(
        self,
        inputs: WKVInputs,
        state: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Values, State]:
        """Computes y and the state after the last token."""
        if owners is None and inputs.r.shape[1] == 1:
            found = self.token_kernel(inputs, state, interpret)
            if found is not None:
                return found
        y, end = self._forward(inputs, state, owners, chunk, False, interpret)
        return y, end

    def forward_saving(
        self,
        inputs: WKVInputs,
        state: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Values, State, Starts]:
        """Computes what `forward` does, and the scaled state of every chunk."""
        y, end, starts = self._forward(inputs, state, owners, chunk, True, interpret)
        return y, end, starts

    def backward(
        self,
        inputs: WKVInputs,
        starts: Starts,
        dy: Values,
        dend: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[WKVInputs, State]:
        """Computes the gradients of the six inputs and of the start state."""
        batch, tokens, heads, values = dy.shape
        plan = self._plan(inputs, owners, chunk)
        choice, segments = plan
        cut = plan.cut_inputs(inputs)
        dy = plan.cut(dy.astype(cut.v.dtype))
        if segments > 1:
            # The backward pass is affine in the gradient, so it is probed in the same way.
            wide = _pad_values(dy, dend)
            probes = Probes(segments, values, reverse=True)
            (probe_ends,) = self.state_kernel(
                cut, wide, probes.start_states(dend), choice, probes, None, interpret
            )
            dend = chain_segments(probe_ends, dend, probes)
        spans = _spans(owners, dend)
        dstart, ends = self.state_kernel(cut, dy, dend, choice, None, spans, interpret)
        grads = self.gradients_kernel(cut, dy, starts, ends, choice, interpret)

        def join(grad, x):
            joined = grad.reshape(batch, -1, heads, grad.shape[3])
            return joined[:, :tokens].astype(x.dtype)

        grads = jax.tree.map(join, WKVInputs(*grads), inputs)
        # The start state's gradient is that of each sequence's first segment.
        return grads, dstart[::segments]
