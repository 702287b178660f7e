"""The host's side of decoding: blocks of tokens become text, and stop strings cut rows."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from rwkv7_jax.generation.decode_loop import (
    BROKEN,
    STOPPED,
    Decoder,
    DecodeState,
)
from rwkv7_jax.text.detokenizer import (
    StreamingDetokenizer,
    Vocabulary,
    spell,
    whole_tokens,
)

# Tokens between two looks of the host, where text is streamed or stop strings are searched.
_BLOCK = 8

OnText = Callable[[str, int], object]

Ending = Literal["stop_id", "stop_string", "length"]


class RowText:
    """One row as the host sees it.

    Attributes:
        tokens: ids that are kept.
        text: the part of their text that is certain.
        ended: how the row ended; None while it runs.
        stop_token: the stop id that ended the row; None where none did.
        settled: leading tokens that the model generated and that no stop string can cut any more.
    """

    def __init__(self, tokenizer: Vocabulary | None, stop_strings: Sequence[str]):
        """Starts without tokens; without a tokenizer there is no text and no stop string."""
        self.tokens: list[int] = []
        self.text = ""
        self.ended: Ending | None = None
        self.stop_token: int | None = None
        self.settled = 0
        self._tokenizer = tokenizer
        self._detokenizer = StreamingDetokenizer(stop_strings)

    def append(self, tokens: Sequence[int]) -> str:
        """Keeps new tokens up to a stop string; returns the text that became certain."""
        if self._tokenizer is None:
            # No text, so no stop string can reach back into these tokens.
            self.tokens.extend(tokens)
            self.settled = len(self.tokens)
            return ""
        piece = ""
        for token in tokens:
            self.tokens.append(token)
            piece += self._detokenizer.push(self._tokenizer.token_bytes(token))
            if self._detokenizer.stopped:
                break
        self.settled, left = whole_tokens(
            self.tokens, self._detokenizer.pending_bytes, self._tokenizer
        )
        if self._detokenizer.stopped:
            self.ended = "stop_string"
            # The stop string began inside a token: other ids spell the bytes in front of it. Where
            # the vocabulary has none, the text alone has these bytes.
            rest = self._tokenizer.token_bytes(self.tokens[self.settled])[:left]
            self.tokens[self.settled :] = spell(rest, self._tokenizer)
        self.text += piece
        return piece

    def end(self, ending: Ending, stop_token: int | None = None) -> str:
        """Ends the row; returns the text that was held back."""
        self.ended = ending
        self.stop_token = stop_token
        piece = self._detokenizer.close()
        self.text += piece
        return piece


class _Snapshot(NamedTuple):
    """A run at the beginning of a block, and the tokens generated before it."""

    done: int
    run: DecodeState


def block_size(total: int, *, watched: bool) -> int:
    """Returns the number of tokens that are generated between two looks of the host.

    Args:
        total: tokens a row at most.
        watched: the host looks at the tokens every few steps; otherwise once, at the end.
    """
    # A larger block costs tokens that a stop string cuts off again, a smaller one costs waiting.
    return min(_BLOCK, total) if watched else total


def decode_with_stop_strings(
    decoder: Decoder,
    run: DecodeState,
    rows: list[RowText],
    *,
    total: int,
    on_text: OnText,
) -> DecodeState:
    """Decodes until all rows have ended; `rows` take their tokens, text and endings.

    Snapshots of earlier blocks are kept while a stop string may still cut into them.

    Args:
        decoder: the model and its choices.
        run: where to start.
        rows: one for each row of the batch, fresh.
        total: tokens a row at most.
        on_text: called with every piece of certain text and its row.

    Raises:
        ValueError: the model's logits are not finite.
    """
    snapshots: list[_Snapshot] = []
    done = 0
    while done < total and not all(row.ended for row in rows):
        snapshots.append(_Snapshot(done, run))
        limit = min(decoder.block, total - done)
        run, tokens, lengths = decoder.decode(run, limit=limit)
        done += limit
        cut = _append(rows, run, tokens, lengths, on_text=on_text)
        if cut.any():
            run = _cut_rows(decoder, run, snapshots, rows=rows, cut=cut)
        settled = min((row.settled for row in rows if not row.ended), default=done)
        snapshots = _still_needed(snapshots, settled)
    # The text that was held back in case a stop string would follow.
    for index, row in enumerate(rows):
        if not row.ended:
            _emit(on_text, row.end("length"), index)
    return run


def _still_needed(snapshots: list[_Snapshot], settled: int) -> list[_Snapshot]:
    """Drops snapshots older than the last one that lies within the `settled` tokens."""
    newest = 0
    for index, snapshot in enumerate(snapshots):
        if snapshot.done <= settled:
            newest = index
    return snapshots[newest:]


def _emit(on_text: OnText, piece: str, row: int) -> None:
    if piece:
        on_text(piece, row)


def _append(
    rows: list[RowText],
    run: DecodeState,
    tokens,
    lengths,
    *,
    on_text: OnText,
) -> np.ndarray:
    """Gives the rows their new tokens; returns which of them a stop string has ended."""
    # One transfer: each waits for the device.
    tokens, lengths, status, stop_tokens = jax.device_get(
        (tokens, lengths, run.status, run.stop_tokens)
    )
    cut = np.zeros(len(rows), bool)
    for index, row in enumerate(rows):
        if row.ended:
            # It has stopped on the device too, so nothing of it is new.
            continue
        if status[index] == BROKEN:
            raise ValueError(
                f"generate: `params` and `state` must give finite logits; "
                f"row {index} got others after new token {len(row.tokens) + lengths[index]}."
            )
        piece = row.append(tokens[index, : lengths[index]].tolist())
        _emit(on_text, piece, index)
        # A stop string in these tokens comes before the stop id that ended them on the device.
        cut[index] = row.ended is not None
        if status[index] == STOPPED and not cut[index]:
            _emit(on_text, row.end("stop_id", int(stop_tokens[index])), index)
    return cut


def _cut_rows(
    decoder: Decoder,
    run: DecodeState,
    snapshots: list[_Snapshot],
    *,
    rows: list[RowText],
    cut: np.ndarray,
) -> DecodeState:
    """Stops the rows in `cut` after exactly the tokens that they keep.

    A state cannot be rolled back, so these rows read their last tokens again from a snapshot.
    """
    settled = min(row.settled for row, is_cut in zip(rows, cut, strict=True) if is_cut)
    before = _still_needed(snapshots, settled)[0]
    again: list[list[int]] = []
    for row, is_cut in zip(rows, cut, strict=True):
        again.append(row.tokens[before.done :] if is_cut else [])
    return run.stop_rows(cut, decoder.read(before.run, again))
