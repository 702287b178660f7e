"""The host's side of decoding: blocks of tokens become text, and stop strings cut rows."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rwkv7_jax.generation.decode_loop import (
    BROKEN,
    STOPPED,
    Decoded,
    Decoder,
    DecodeState,
)
from rwkv7_jax.sharding import to_host
from rwkv7_jax.text.detokenizer import (
    StreamingDetokenizer,
    Vocabulary,
    spell,
    whole_tokens,
)

# Tokens between two looks of the host, where text is streamed or stop strings are searched. More
# would cost tokens that a stop string cuts off again, fewer cost waiting.
WATCHED_BLOCK = 8

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
        drawn: every id that was drawn: `tokens` and the stop id, or in place of what a stop string
            cut off the ids up to the one that completed it.
        logps: the log-probability of each of them.
    """

    def __init__(self, tokenizer: Vocabulary | None, stop_strings: Sequence[str]):
        """Starts without tokens; without a tokenizer there is no text and no stop string."""
        self.tokens: list[int] = []
        self.text = ""
        self.ended: Ending | None = None
        self.stop_token: int | None = None
        self.settled = 0
        self.drawn: list[int] = []
        self.logps: list[float] = []
        self._tokenizer = tokenizer
        self._detokenizer = StreamingDetokenizer(stop_strings)

    def append(self, tokens: Sequence[int], logps: Sequence[float] = ()) -> str:
        """Keeps new tokens up to a stop string; returns the text that became certain.

        Args:
            tokens: new ids.
            logps: their log-probabilities, if anybody will ask for them.
        """
        if self._tokenizer is None:
            # No text, so no stop string can reach back into these tokens.
            self.tokens.extend(tokens)
            self._note(tokens, logps)
            self.settled = len(self.tokens)
            return ""
        piece = ""
        for token in tokens:
            self.tokens.append(token)
            piece += self._detokenizer.push(self._tokenizer.token_bytes(token))
            if self._detokenizer.stopped:
                break
        # As they were drawn, before a part of them is spelled with other ids.
        self._note(self.tokens[len(self.drawn) :], logps)
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

    def _note(self, drawn: Sequence[int], logps: Sequence[float]) -> None:
        self.drawn.extend(drawn)
        self.logps.extend(logps[: len(drawn)])

    def end(
        self, ending: Ending, stop_token: int | None = None, logp: float = 0.0
    ) -> str:
        """Ends the row; returns the text that was held back.

        Args:
            ending: how.
            stop_token: the stop id that was drawn.
            logp: its log-probability.
        """
        self.ended = ending
        if stop_token is not None:
            self.stop_token = stop_token
            self._note([stop_token], [logp])
        piece = self._detokenizer.close()
        self.text += piece
        return piece


def before_stop_string(
    tokens: Sequence[int], tokenizer: Vocabulary, stop_strings: Sequence[str]
) -> list[int] | None:
    """Returns the ids that `generate` keeps of ids that it drew; None where no stop string is."""
    row = RowText(tokenizer, stop_strings)
    row.append(tokens)
    return row.tokens if row.ended else None


class _Snapshot(NamedTuple):
    """A run at the beginning of a block, and the tokens generated before it."""

    done: int
    run: DecodeState


def decode_with_stop_strings(
    decoder: Decoder,
    run: DecodeState,
    rows: list[RowText],
    *,
    total: int,
    on_text: OnText,
    should_stop: Callable[[], bool],
) -> DecodeState:
    """Decodes until all rows have ended; `rows` take their tokens, text and endings.

    Snapshots of earlier blocks are kept while a stop string may still cut into them.

    Args:
        decoder: the model and its choices.
        run: where to start.
        rows: one for each row of the batch, fresh.
        total: tokens a row at most.
        on_text: called with every piece of certain text and its row.
        should_stop: asked before each block whether all rows end there.

    Raises:
        ValueError: the model's logits are not finite.
    """
    snapshots: list[_Snapshot] = []
    done = 0
    while done < total and not all(row.ended for row in rows) and not should_stop():
        snapshots.append(_Snapshot(done, run))
        limit = min(decoder.block, total - done)
        decoded = decoder.decode(run, limit=limit)
        run = decoded.run
        done += limit
        cut = _append(rows, decoded, on_text=on_text)
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


def _append(rows: list[RowText], decoded: Decoded, *, on_text: OnText) -> np.ndarray:
    """Gives the rows their new tokens; returns which of them a stop string has ended."""
    run = decoded.run
    # One transfer: each waits for the device.
    tokens, logps, lengths, status, stop_tokens = to_host(
        (decoded.tokens, decoded.logps, decoded.lengths, run.status, run.stop_tokens)
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
        count = lengths[index]
        piece = row.append(
            tokens[index, :count].tolist(), logps[index, :count].tolist()
        )
        _emit(on_text, piece, index)
        # A stop string in these tokens comes before the stop id that ended them on the device.
        cut[index] = row.ended is not None
        if status[index] == STOPPED and not cut[index]:
            ending = row.end(
                "stop_id", int(stop_tokens[index]), float(logps[index, count])
            )
            _emit(on_text, ending, index)
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
