"""Norms and ranks of a state's matrices, head by head."""

import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.evaluation.state_diagnosis import check_finite, ranks
from rwkv7_jax.model.state import RWKV7State, check_whole_state


def head_statistics(state: RWKV7State) -> dict[str, Float[np.ndarray, "L H"]]:
    """Computes norm, largest magnitude and effective rank of each head of a state of batch 1.

    Returns:
        "norm", "max" and "rank" of the WKV state, and for an upscaled state also "upscaled norm",
        "upscaled max" and "upscaled rank" of its memory.

    Raises:
        TypeError: `state` is not an `RWKV7State`.
        ValueError: `state` holds more than one sequence, or is not finite.
    """
    with prefix_errors("head_statistics"):
        check_whole_state(state, "`state`")
        if state.batch != 1:
            raise ValueError(f"`state` must hold one sequence; got {state.batch}.")
        check_finite(state)
    matrices = {"": state.wkv}
    if state.upscaled is not None:
        matrices["upscaled "] = state.upscaled.memory
    statistics = {}
    for prefix, matrix in matrices.items():
        # In float32 the squares of entries below 1e-19 would underflow.
        heads = np.asarray(matrix[:, 0], np.float64)
        statistics[f"{prefix}norm"] = np.sqrt(np.square(heads).sum((-2, -1)))
        # [L H] each: the axes of a head's matrix, Nv and Nk or M, are reduced.
        statistics[f"{prefix}max"] = np.abs(heads).max((-2, -1))
        statistics[f"{prefix}rank"] = ranks(matrix)
    return statistics
