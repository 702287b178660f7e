"""A lower bound for the cost of a state tuning step: its matrix products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rwkv7_jax as rwkv
from rwkv7_jax.checkpoints.param_tree import official_tensors


def products_alone(
    config: rwkv.RWKV7Config, params: Any, positions: int
) -> Callable[[], Any]:
    """Makes a program of a step's matrix products, forward and to the inputs, and of nothing else.

    No order of the rest of the step can make it faster than this.

    Args:
        config: of the model.
        params: its weights.
        positions: tokens of the step.
    """
    # Embeddings are looked up, and the bonus is no matrix.
    others = ("emb.weight", "r_k")
    matrices = [
        jnp.asarray(x if x.shape[0] <= x.shape[1] else x.T)
        for name, x in official_tensors(params, config)
        if x.ndim == 2 and not name.endswith(others)
    ]
    # As in the loss of long rows, 256 positions at a time.
    pieces = positions // 256
    widths = {matrix.shape[0] for matrix in matrices}
    random = np.random.default_rng(3)
    inputs = {
        width: random.standard_normal((pieces, 256, width), np.float32)
        for width in widths
    }

    @jax.jit
    def multiply(matrices, inputs):
        def largest(matrix):
            return jax.lax.map(
                lambda x: jnp.max((x @ matrix) @ matrix.T), inputs[matrix.shape[0]]
            )

        return [largest(matrix) for matrix in matrices]

    return lambda: jax.block_until_ready(multiply(matrices, inputs))
