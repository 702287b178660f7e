"""The recurrence of one layer: the WKV op on its state, and on its upscaled memory if there is one.

The model calls the op only here.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import WKVInputs
from pallas_kernels.tpu import token_step
from rwkv7_jax.array_types import Heads, Lengths, SegmentIds
from rwkv7_jax.model.segments import Segments
from rwkv7_jax.model.time_shards import wkv7_along_time
from rwkv7_jax.model.upscaled_memory import Upscaled
from rwkv7_jax.sharding import TENSOR, mesh_sizes, on_each, row_axes, time_axis

# One layer's arrays from `RWKV7.trace`, by name.
LayerTrace = Mapping[str, Array]

# One layer's WKV state.
LayerWkv = Float[Array, "S H Nv Nk"] | token_step.TiledState


def wkv_inputs_of(trace: LayerTrace) -> WKVInputs:
    """Selects the inputs of the WKV op from one layer's trace."""
    return WKVInputs(*(trace[name] for name in WKVInputs._fields))


def wkv7_sharded(
    inputs: WKVInputs,
    state: Float[Array, "S H Nv Nk"],
    *,
    implementation: str | None = None,
    lengths: Lengths | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[Float[Array, "B T H Nv"], Float[Array, "S H Nv Nk"]]:
    """Runs the WKV op, on a mesh sharded over rows and heads.

    If the devices do not divide the rows or heads evenly, each device computes all of them.
    """

    def op(inputs: WKVInputs, state: Array, lengths: Any, segment_ids: Any):
        return pallas_kernels.wkv7(
            *inputs,
            state,
            implementation=implementation,
            lengths=lengths,
            segment_ids=segment_ids,
        )

    sizes = mesh_sizes()
    batch, _, heads, _ = inputs.r.shape
    rows = row_axes(batch, sizes) or None
    divides = TENSOR in sizes and heads % sizes[TENSOR] == 0
    own_heads = TENSOR if divides else None
    of_tokens = PartitionSpec(rows, None, own_heads)
    # The states of a row are adjacent, so they are on the row's device.
    of_states = PartitionSpec(rows, own_heads)
    of_rows = PartitionSpec(rows)
    return on_each(
        op,
        inputs,
        state,
        lengths,
        segment_ids,
        takes=(of_tokens, of_states, of_rows, of_rows),
        gives=(of_tokens, of_states),
    )


def recurrence(
    inputs: WKVInputs,
    icl_rate: Heads,
    wkv: LayerWkv,
    upscaled: Upscaled | None,
    *,
    implementation: str | None,
    lengths: Lengths | None,
    segments: Segments | None = None,
) -> tuple[Heads, LayerWkv, Float[Array, "..."] | None]:
    """Reads and updates one layer's memories at every token.

    Args:
        inputs: the layer's inputs of the WKV op.
        icl_rate: the in-context learning rate.
        wkv: the WKV state before the first token. A single token's may be tiled (see
            `model.unrolled`).
        upscaled: the layer's upscaled memory, without the axis L, or None.
        implementation: the implementation of the WKV op; None picks the best.
        lengths: the number of real tokens of each row.
        segments: the sequences of each row, if several share it.

    Returns:
        The values read; the WKV state after the last token; the upscaled memory after the last
        token, or None if it is absent or never changes.
    """
    op = functools.partial(
        wkv7_sharded,
        implementation=implementation,
        lengths=lengths,
        segment_ids=None if segments is None else segments.ids,
    )
    axis = time_axis()
    if axis is not None:
        op = functools.partial(wkv7_along_time, op, axis=axis)

    def read_wkv(wkv: LayerWkv) -> tuple[Heads, LayerWkv]:
        if isinstance(wkv, token_step.TiledState):
            live = None if lengths is None else jnp.asarray(lengths) > 0
            return token_step.step(inputs, wkv, live)
        return op(inputs, wkv)

    if upscaled is None:
        return *read_wkv(wkv), None
    form = upscaled.form
    if form.replaces_wkv:
        read, memory = form.read(upscaled, inputs, icl_rate, op)
        # The WKV state is returned unread: the paper's memory replaces it.
        return read.astype(inputs.r.dtype), wkv, memory
    y, wkv = read_wkv(wkv)
    read, memory = form.read(upscaled, inputs, icl_rate, op)
    # Summed in y's dtype, so an empty memory does not change y.
    return y + read.astype(y.dtype), wkv, memory
