"""The host's side of generating: blocks of tokens become text, stop strings cut rows."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rwkv7_jax.generation import decode_loop as decoding
from rwkv7_jax.text.detokenizer import StreamingDetokenizer, Vocabulary, whole_tokens

# Tokens between two looks of the host, where text is streamed or stop strings are searched.
_BLOCK = 8

OnText = Callable[[str, int], object]


class RowText:
    """One row as the host sees it: tokens, certain text, and why it ended."""

    def __init__(self, tokenizer: Vocabulary | None, stop_strings: Sequence[str]):
        self.tokenizer, self.stream = tokenizer, StreamingDetokenizer(stop_strings)
        self.tokens, self.text, self.finished = [], "", None
        # Leading tokens that the model generated and that no stop string can cut any more.
        self.whole = 0

    def take(self, tokens: Sequence[int]) -> str:
        """Keep new tokens up to a stop string; the text that is certain now."""
        if self.tokenizer is None:
            self.tokens.extend(tokens)
            self.whole = len(self.tokens)
            return ""
        piece = ""
        for token in tokens:
            self.tokens.append(token)
            piece += self.stream.push(self.tokenizer.token_bytes(token))
            if self.stream.stopped:
                break
        self.whole, left = whole_tokens(self.tokens, self.stream.held, self.tokenizer)
        if self.stream.stopped:
            self.finished = "stop"
            rest = self.tokenizer.token_bytes(self.tokens[self.whole])[:left]
            self.tokens[self.whole :] = self.tokenizer.encode(rest)
        self.text += piece
        return piece

    def finish(self, reason: str) -> str:
        """The row has ended; the text that was held back."""
        self.finished = reason
        piece = self.stream.close()
        self.text += piece
        return piece


def decode_with_stop_strings(
    decode: Callable,
    read: Callable,
    run: decoding.DecodeState,
    *,
    rows: list[RowText],
    total: int,
    watched: bool,
    on_text: OnText,
) -> decoding.DecodeState:
    """The run after all rows have ended; `rows` hold their tokens, text and reasons.

    Runs at the beginning of earlier blocks are kept while a stop string may still cut into them.

    Args:
        decode: `decoding.decode` with everything but the run, `limit` and `capacity`.
        read: `(state, logits=, rows=) -> (state, logits)`, reads known tokens.
        run: where to start.
        rows: one a row, fresh.
        total: tokens a row at most.
        watched: the host looks at the tokens every few steps; otherwise once, at the end.
        on_text: called with every piece of certain text and its row.

    Raises:
        ValueError: the model's logits are not finite.
    """
    block = min(_BLOCK, total) if watched else total
    starts, done, capacity = [], 0, power_of_two(max(block, _BLOCK))
    while done < total and not all(row.finished for row in rows):
        starts.append((done, run))
        limit = min(block, total - done)
        run, new, lengths = decode(run, limit=np.int32(limit), capacity=capacity)
        done += limit
        cut = _take(rows, run, new=new, lengths=lengths, on_text=on_text)
        if cut.any():
            run = _reread(read, run, starts, rows=rows, cut=cut)
        safe = min((row.whole for row in rows if not row.finished), default=done)
        starts = _from(starts, safe)
    for index, row in enumerate(rows):
        if not row.finished:
            _emit(on_text, row.finish("length"), index)
    return run


def _from(starts: list, safe: int) -> list:
    """The starts beginning with the last one that no row can be cut before."""
    return starts[max(i for i, (done, _) in enumerate(starts) if done <= safe) :]


def _emit(on_text, piece: str, row: int) -> None:
    if piece:
        on_text(piece, row)


def _take(rows: list[RowText], run: decoding.DecodeState, *, new, lengths, on_text) -> np.ndarray:
    """The rows take their new tokens; which of them a stop string has ended."""
    new, lengths, status = jax.device_get((new, lengths, run.status))
    cut = np.zeros(len(rows), bool)
    for index, row in enumerate(rows):
        if row.finished:
            continue
        if status[index] == decoding.BROKEN:
            raise ValueError(
                f"generate: `params` and `state` must give finite logits; "
                f"row {index} got others behind new token {len(row.tokens) + lengths[index]}."
            )
        _emit(on_text, row.take(new[index, : lengths[index]].tolist()), index)
        cut[index] = row.finished is not None
        if status[index] == decoding.STOPPED and not cut[index]:
            _emit(on_text, row.finish("stop"), index)
    return cut


def _reread(
    read, run: decoding.DecodeState, starts: list, *, rows, cut: np.ndarray
) -> decoding.DecodeState:
    """The run with the rows that a stop string has cut stopped behind the tokens that they keep."""
    safe = min(row.whole for row, hit in zip(rows, cut, strict=True) if hit)
    done, before = _from(starts, safe)[0]
    again = [row.tokens[done:] if hit else [] for row, hit in zip(rows, cut, strict=True)]
    state, logits = read(before.state, logits=before.logits, rows=again)
    return decoding.stop_rows(run, cut, state=state, logits=logits)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()
