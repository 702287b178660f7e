"""The layers' parts of a state after the last token: one layer's arrays, or all layers stacked."""

from typing import Any, NamedTuple

from jaxtyping import Array

from rwkv7_jax.model.state import RWKV7State


class LayerMemories(NamedTuple):
    """One layer's memories after the last token; the scan stacks them over layers.

    Attributes:
        att_shift: the last token's input of the time mix, [B D].
        wkv: the WKV state, [B H Nv Nk]; a TPU's decoding loop has tiles of it.
        ffn_shift: the last token's input of the channel mix, [B D].
        memory: the upscaled memory; None if it is absent or never changes.
    """

    att_shift: Array
    wkv: Any
    ffn_shift: Array
    memory: Array | None


def state_after(before: RWKV7State, memories: LayerMemories) -> RWKV7State:
    """Returns the state after the last token, of one layer or stacked over layers.

    Its leaves have the dtypes of `before`, as a loop's carry requires.

    Args:
        before: the state before the tokens.
        memories: of the same layers.
    """
    upscaled = before.upscaled
    # A static memory comes back as None and is passed on without a copy.
    if upscaled is not None and memories.memory is not None:
        upscaled = upscaled.replace(memory=memories.memory)
    return RWKV7State(
        att_shift=memories.att_shift.astype(before.att_shift.dtype),
        wkv=memories.wkv,
        ffn_shift=memories.ffn_shift.astype(before.ffn_shift.dtype),
        upscaled=upscaled,
    )
