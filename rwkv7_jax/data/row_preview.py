"""Rows of a batch as text, to inspect training data."""

import numpy as np

from rwkv7_jax.data.batching import row_sizes
from rwkv7_jax.text.tokenizer import Tokenizer


def preview_row(
    tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer
) -> tuple[str, int]:
    """Returns a row's text, with tokens outside the loss in double brackets, and its padding.

    The second result is the number of padding tokens: trailing zeros outside the loss.

    Args:
        tokens: ids [T + 1]; the first is only an input, never a target.
        mask: loss weights [T] of the targets.
        tokenizer: decodes the ids; an id without bytes is shown as `<id>`.
    """
    in_loss = np.concatenate([[False], mask > 0])
    length = int(row_sizes(tokens[None], mask[None])[0])
    padding = len(tokens) - length
    if not length:
        return "", padding
    # Positions at which the text enters or leaves the loss.
    edges = np.flatnonzero(np.diff(in_loss[:length])) + 1
    text = ""
    for positions in np.split(np.arange(length), edges):
        spelled = b""
        for token in tokens[positions]:
            spelled += tokenizer.token_bytes(int(token)) or b"<%d>" % int(token)
        # Decoded as one piece, because a character may span several tokens.
        piece = spelled.decode("utf-8", errors="replace")
        text += piece if in_loss[positions[0]] else f"[[{piece}]]"
    return text, padding
