"""A state as layers read it and write it: one layer's leaves, or all of them stacked."""

from typing import NamedTuple

from jaxtyping import Array

from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.model.upscaled_memory import Upscaled


class LayerState(NamedTuple):
    """The part of a state that one layer reads: the same leaves without the axis L.

    `RWKV7` scans over such a tuple whose leaves are all layers' and still have the axis L.

    Attributes:
        att_shift: [B D].
        wkv: [B H Nv Nk].
        ffn_shift: [B D].
        upscaled: the upscaled memory, each leaf without the axis L; or None.
    """

    att_shift: Array
    wkv: Array
    ffn_shift: Array
    upscaled: Upscaled | None


class LayerMemories(NamedTuple):
    """What one layer remembers after the last token; stacked over layers by the scan.

    Attributes:
        att_shift: the last token's input of the time mix, [B D].
        wkv: the WKV state, [B H Nv Nk].
        ffn_shift: the last token's input of the channel mix, [B D].
        memory: the upscaled memory, or None where it is absent or never changes.
    """

    att_shift: Array
    wkv: Array
    ffn_shift: Array
    memory: Array | None


def layer_states(state: RWKV7State) -> LayerState:
    """Returns the leaves of a state in the form that layers read, still stacked over layers."""
    return LayerState(
        att_shift=state.att_shift,
        wkv=state.wkv,
        ffn_shift=state.ffn_shift,
        upscaled=state.upscaled,
    )


def joined_state(states: LayerState) -> RWKV7State:
    """Inverts `layer_states`."""
    return RWKV7State(**states._asdict())


def state_after(before: LayerState, memories: LayerMemories) -> LayerState:
    """Returns the state after the last token, of one layer or stacked over layers.

    Args:
        before: the state that was read.
        memories: of the same layers.
    """
    upscaled = before.upscaled
    # A static memory comes back as None: it is handed on as it was, without a copy.
    if upscaled is not None and memories.memory is not None:
        upscaled = upscaled.replace(memory=memories.memory)
    return LayerState(
        att_shift=memories.att_shift,
        wkv=memories.wkv,
        ffn_shift=memories.ffn_shift,
        upscaled=upscaled,
    )
