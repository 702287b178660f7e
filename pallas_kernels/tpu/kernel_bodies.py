"""WKV-7 on TPU: the bodies of the kernels, each for one chunk of tokens of some groups of heads.

Arrays stay [B, T, H*N]; heads share tiles: see `head_packing`. A grid step runs several groups of
heads through the stages of `packed_chunk_math` together, so that one group's instructions hide the
latency of another's results. The state stays in scratch memory from chunk to chunk.
"""

from collections.abc import Callable, Generator, Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.reference import WKVInputs
from pallas_kernels.tpu import packed_chunk_math as packed
from pallas_kernels.tpu.head_packing import (
    Masks,
    TileLayout,
    compact,
    expand,
    make_masks,
    stack,
)


def interleave(groups: Sequence[Generator[None, None, None]]) -> None:
    """Runs the groups' stages round-robin, so that their instructions can overlap."""
    # The compiler starts from the order in which instructions are traced.
    running = list(groups)
    while running:
        unfinished = []
        for group in running:
            try:
                next(group)
            except StopIteration:
                continue
            unfinished.append(group)
        running = unfinished


def _load(ref, g: int, width: int) -> Array:
    """Loads the lanes of group g in float32."""
    return ref[0, :, g * width : (g + 1) * width].astype(jnp.float32)


def _load_inputs(refs: WKVInputs, g: int, layout: TileLayout) -> WKVInputs:
    """Loads the lanes of group g of the six inputs."""
    keys = layout.heads * layout.keys
    values = layout.heads * layout.values
    return WKVInputs(
        r=_load(refs.r, g, keys),
        log_w=_load(refs.log_w, g, keys),
        k=_load(refs.k, g, keys),
        v=_load(refs.v, g, values),
        a=_load(refs.a, g, keys),
        b=_load(refs.b, g, keys),
    )


def _store(ref, g: int, x: Array) -> None:
    """Stores the lanes of group g in the block's dtype."""
    width = x.shape[1]
    ref[0, :, g * width : (g + 1) * width] = x.astype(ref.dtype)


def _borders(owners, chunk_of: Callable):
    """Tells whether this grid step is the first of its sequence, and whether it is the last.

    Args:
        owners: the sequence of each chunk of all rows, flat; None if each row is one sequence.
        chunk_of: maps the grid's last index to the index of the chunk.
    """
    step = pl.program_id(2)
    steps = pl.num_programs(2)
    is_first = step == 0
    is_last = step == steps - 1
    if owners is None:
        return is_first, is_last

    def owner(step):
        inside = jnp.clip(step, 0, steps - 1)
        return owners[pl.program_id(0) * steps + chunk_of(inside)]

    here = owner(step)
    return is_first | (owner(step - 1) != here), is_last | (owner(step + 1) != here)


def _forward_group(
    g: int,
    inputs: WKVInputs,
    y_ref,
    starts_ref,
    state,
    masks: Masks,
    layout: TileLayout,
) -> Generator[None, None, None]:
    """Computes one group's y and advances its state to the end of the chunk."""
    tokens = _load_inputs(inputs, g, layout)
    chunk = yield from packed.prepare(tokens, masks, layout)
    start = state[g]
    if starts_ref is not None:
        # Saved unscaled, unlike on GPUs: the backward pass scales it in float32.
        starts_ref[0, g, 0] = compact(start, layout)
    scaled = start * chunk.factors.mid
    # Rounded once for all products; the state itself stays float32.
    operand = scaled.astype(layout.dtype)
    written = yield from packed.writes(chunk, operand, layout)
    _store(y_ref, g, packed.outputs(chunk, written, operand, masks, layout))
    state[g] = packed.end_state(chunk, written, scaled, masks)


def forward_kernel(
    *refs, layout: TileLayout, save: bool, chunk_of: Callable, owners=None
) -> None:
    """Writes y of one chunk and, at the end of a sequence, the end states of some groups of heads.

    Args:
        *refs: r, log_w, k, v, a, b and the start states; then the outputs: y, the end states and,
            with `save`, the states before the chunk; then scratch memory for the states.
        layout: the sizes.
        save: whether to write the states before the chunk.
        chunk_of: maps the grid's last index to the index of the chunk.
        owners: for packed rows the sequence of each chunk; else None.
    """
    inputs = WKVInputs(*refs[:6])
    start_ref, y_ref, end_ref, *rest = refs[6:]
    starts_ref, state = rest if save else (None, *rest)
    masks = make_masks(layout)
    is_first, is_last = _borders(owners, chunk_of)

    # The grid's last axis runs in order, so scratch memory carries the states.
    @pl.when(is_first)
    def _():
        for g in range(layout.groups):
            state[g] = expand(start_ref[0, g], masks, layout)

    groups = []
    for g in range(layout.groups):
        groups.append(
            _forward_group(g, inputs, y_ref, starts_ref, state, masks, layout)
        )
    interleave(groups)

    @pl.when(is_last)
    def _():
        for g in range(layout.groups):
            end_ref[0, g] = compact(state[g], layout)


def _backward_group(
    g: int,
    inputs: WKVInputs,
    dy_ref,
    starts_ref,
    grad_refs: WKVInputs,
    dstate,
    masks: Masks,
    layout: TileLayout,
) -> Generator[None, None, None]:
    """Computes one group's gradients and moves the state gradient to the chunk's start."""
    tokens = _load_inputs(inputs, g, layout)
    dys = _load(dy_ref, g, layout.heads * layout.values)
    chunk = yield from packed.prepare(tokens, masks, layout)
    factors = chunk.factors
    dy = stack(dys, masks.value_head, layout)
    scaled = expand(starts_ref[0, g, 0], masks, layout) * factors.mid
    # G^ in float32: it is added to the state gradient below.
    dscaled = dstate[g] * factors.rest
    start = scaled.astype(layout.dtype)
    dend = dscaled.astype(layout.dtype)
    u, z = yield from packed.removals_and_gradients(chunk, dy, start, dend, layout)
    _store(grad_refs.v, g, packed.value_gradient(chunk, z, dy, dend, masks, layout))
    dstate[g] = packed.start_gradient(chunk, z, dy, dscaled, masks)
    pairs = packed.pair_gradients(chunk, u, z, dy)
    # A separate stage: the product above is the largest.
    yield
    grads = packed.key_gradients(chunk, pairs, u, z, dy, start, dend, masks, layout)
    yield
    ends = jnp.sum(scaled * dscaled, 0, keepdims=True)
    dlog_w = packed.decay_gradient(chunk, grads, ends, masks, layout)
    _store(grad_refs.r, g, (grads.r.inside + grads.r.outside) * factors.upto)
    _store(grad_refs.k, g, (grads.k.inside + grads.k.outside) * factors.after)
    _store(grad_refs.a, g, (grads.a.inside + grads.a.outside) * factors.before)
    _store(grad_refs.b, g, (grads.b.inside + grads.b.outside) * factors.after)
    _store(grad_refs.log_w, g, dlog_w)


def backward_kernel(*refs, layout: TileLayout, chunk_of: Callable, owners=None) -> None:
    """Writes the gradients of one chunk of some groups of heads; the last chunk runs first.

    Args:
        *refs: r, log_w, k, v, a, b, dy, the states before the chunk and the gradient of the end
            states; then the outputs: the gradients of the six inputs and of the start states; then
            scratch memory for the state gradients.
        layout: the sizes.
        chunk_of: maps the grid's last index to the index of the chunk.
        owners: for packed rows the sequence of each chunk; else None.
    """
    inputs = WKVInputs(*refs[:6])
    dy_ref, starts_ref, dend_ref = refs[6:9]
    grad_refs = WKVInputs(*refs[9:15])
    dstart_ref, dstate = refs[15:]
    masks = make_masks(layout)
    is_first, is_last = _borders(owners, chunk_of)

    @pl.when(is_first)
    def _():
        for g in range(layout.groups):
            dstate[g] = expand(dend_ref[0, g], masks, layout)

    groups = []
    for g in range(layout.groups):
        group = _backward_group(
            g, inputs, dy_ref, starts_ref, grad_refs, dstate, masks, layout
        )
        groups.append(group)
    interleave(groups)

    @pl.when(is_last)
    def _():
        for g in range(layout.groups):
            dstart_ref[0, g] = compact(dstate[g], layout)
