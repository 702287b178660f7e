"""Rows of a batch as text, for people who want to see what a model is trained on."""

import numpy as np

from rwkv7_jax.text.tokenizer import Tokenizer


def preview_row(
    tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer
) -> tuple[str, int]:
    """Returns a row's text, with what the loss leaves out in double brackets, and its padding.

    Padding is tokens 0 at the end that do not count; its length is the second result.

    Args:
        tokens: ids [T + 1]; the first is an input alone, never a target.
        mask: weights [T] of the targets; 0 leaves one out of the loss.
        tokenizer: for the text of an id; ids that spell nothing are shown as `<id>`.
    """
    in_loss = np.concatenate([[False], mask > 0])
    is_content = (tokens != 0) | in_loss
    padding = int(np.argmax(is_content[::-1]))
    length = len(tokens) - padding
    # Positions at which the text enters the loss or leaves it.
    edges = np.flatnonzero(np.diff(in_loss[:length])) + 1
    text = ""
    for positions in np.split(np.arange(length), edges):
        spelled = b""
        for token in tokens[positions]:
            spelled += tokenizer.token_bytes(int(token)) or b"<%d>" % int(token)
        # Decoded as one piece: a character may consist of several tokens.
        piece = spelled.decode("utf-8", errors="replace")
        text += piece if in_loss[positions[0]] else f"[[{piece}]]"
    return text, padding
