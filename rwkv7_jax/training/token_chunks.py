"""Positions of a batch split into chunks, which are computed one after another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

# Positions (rows x tokens) whose logits exist at the same time.
CHUNK = 256


class Cut(NamedTuple):
    """How positions are split: into groups of `rows` rows and spans of `tokens` tokens.

    A chunk has all rows if they fit: a sharded batch then stays on its devices.

    Attributes:
        groups: of rows.
        rows: of a group.
        spans: of tokens.
        tokens: of a span.
    """

    groups: int
    rows: int
    spans: int
    tokens: int

    @classmethod
    def of(cls, rows: int, tokens: int, chunk: int) -> "Cut":
        """Splits [rows tokens] into chunks of equal size, of at most `chunk` positions."""
        groups = max(-(-rows // chunk), 1)
        # Equal sizes minimise the padding of the last chunk.
        rows = -(-rows // groups)
        spans = max(-(-tokens // max(chunk // max(rows, 1), 1)), 1)
        return cls(groups, rows, spans, -(-tokens // spans))

    def chunks(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "P C ..."]:
        """Splits an array, padded with zeros."""
        rows = self.rows * self.groups - x.shape[0]
        tokens = self.tokens * self.spans - x.shape[1]
        x = jnp.pad(x, ((0, rows), (0, tokens), *((0, 0),) * (x.ndim - 2)))
        # A group takes every `groups`-th row, so it has rows of every device.
        x = x.reshape(self.rows, self.groups, self.spans, self.tokens, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 2), (0, 1))
        # One axis of positions lets XLA write the gradient of the logits in place.
        return x.reshape(
            self.groups * self.spans, self.rows * self.tokens, *x.shape[4:]
        )

    def join(self, x: Shaped[Array, "P C ..."], rows: int, tokens: int) -> Array:
        """Joins chunks to [rows tokens ...]."""
        x = x.reshape(self.groups, self.spans, self.rows, self.tokens, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 1), (1, 2))
        x = x.reshape(self.rows * self.groups, self.spans * self.tokens, *x.shape[4:])
        return x[:rows, :tokens]


def map_token_chunks(
    per_token: Callable, *arrays: Shaped[Array, "B T ..."], chunk: int = CHUNK
) -> Any:
    """Applies `per_token` to one chunk of positions after another, and joins the results.

    The backward pass recomputes a chunk's intermediate values.

    Args:
        per_token: maps arrays [C ...] to a tree of arrays [C].
        *arrays: arrays to split; the last chunks are padded with zeros.
        chunk: the largest C.
    """
    rows, tokens = arrays[0].shape[:2]
    cut = Cut.of(rows, tokens, chunk)
    # Without the checkpoint, the scan would save every chunk's logits for the backward pass.
    per_chunk = jax.checkpoint(per_token)
    chunks = tuple(cut.chunks(x) for x in arrays)
    results = jax.lax.map(lambda xs: per_chunk(*xs), chunks)
    return jax.tree.map(lambda x: cut.join(x, rows, tokens), results)
