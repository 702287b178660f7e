"""The host side of decoding: detokenizes blocks of tokens and cuts rows at stop strings."""

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

# Tokens per block when text is streamed or stop strings are searched. Larger blocks waste tokens
# after a stop string; smaller ones make the host wait more often.
WATCHED_BLOCK = 8

OnText = Callable[[str, int], object]

Ending = Literal["stop_id", "stop_string", "length"]


class RowText:
    """One row on the host.

    Attributes:
        tokens: the kept ids.
        text: their text, as far as it is certain.
        ended: how the row ended; None while it runs.
        stop_token: the stop id that ended the row; None if none did.
        settled: number of leading generated tokens that no stop string can cut any more.
        drawn: every sampled id: the kept ids and the stop id, or all ids up to the one that
            completed a stop string.
        logps: the log-probability of each id in `drawn`.
    """

    def __init__(self, tokenizer: Vocabulary | None, stop_strings: Sequence[str]):
        """Starts without tokens; without a tokenizer there are no text and no stop strings."""
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
        """Appends new tokens up to a stop string; returns the text that became certain.

        Args:
            tokens: new ids.
            logps: their log-probabilities; empty if not needed.
        """
        if self._tokenizer is None:
            # Without text no stop string can cut these tokens.
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
        # Recorded before a stop string replaces a partly cut token by other ids.
        self._note(self.tokens[len(self.drawn) :], logps)
        self.settled, left = whole_tokens(
            self.tokens, self._detokenizer.pending_bytes, self._tokenizer
        )
        if self._detokenizer.stopped:
            self.ended = "stop_string"
            # If the stop string begins inside a token, other ids replace the bytes before it. If
            # the vocabulary cannot encode them, only the text has these bytes.
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
            ending: how the row ended.
            stop_token: the stop id that was sampled, if any.
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
    """Returns the ids that `generate` keeps before a stop string; None without a stop string."""
    row = RowText(tokenizer, stop_strings)
    row.append(tokens)
    return row.tokens if row.ended else None


class _Snapshot(NamedTuple):
    """The decode state at the start of a block, and the number of tokens generated before it."""

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
    """Decodes until all rows have ended; stores their tokens, text and endings in `rows`.

    Keeps snapshots of earlier blocks as long as a stop string may still cut into them.

    Args:
        decoder: the model, weights and sampling options.
        run: the state to start from.
        rows: one new `RowText` per row of the batch.
        total: maximum number of tokens per row.
        on_text: called with each piece of certain text and its row.
        should_stop: called before each block; if it returns true, all rows end there.

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
    # Emits the text that was held back as a possible stop string.
    for index, row in enumerate(rows):
        if not row.ended:
            _emit(on_text, row.end("length"), index)
    return run


def _still_needed(snapshots: list[_Snapshot], settled: int) -> list[_Snapshot]:
    """Drops the snapshots before the last one that is within the `settled` tokens."""
    newest = 0
    for index, snapshot in enumerate(snapshots):
        if snapshot.done <= settled:
            newest = index
    return snapshots[newest:]


def _emit(on_text: OnText, piece: str, row: int) -> None:
    if piece:
        on_text(piece, row)


def _append(rows: list[RowText], decoded: Decoded, *, on_text: OnText) -> np.ndarray:
    """Appends the new tokens to the rows; returns a mask of the rows that a stop string ended."""
    run = decoded.run
    # One transfer, because each transfer waits for the device.
    tokens, logps, lengths, status, stop_tokens = to_host(
        (decoded.tokens, decoded.logps, decoded.lengths, run.status, run.stop_tokens)
    )
    cut = np.zeros(len(rows), bool)
    for index, row in enumerate(rows):
        if row.ended:
            # It has stopped on the device too, so it has no new tokens.
            continue
        if status[index] == BROKEN:
            raise ValueError(
                f"generate: `params` and `state` must give finite logits; row {index} "
                f"got non-finite ones after new token {len(row.tokens) + lengths[index]}."
            )
        count = lengths[index]
        piece = row.append(
            tokens[index, :count].tolist(), logps[index, :count].tolist()
        )
        _emit(on_text, piece, index)
        # A stop string in these tokens comes before a stop id that ended them on the device.
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
    """Stops the rows in `cut` exactly after their kept tokens.

    A state cannot be rolled back, so these rows reread their last tokens from a snapshot.
    """
    settled = min(row.settled for row, is_cut in zip(rows, cut, strict=True) if is_cut)
    before = _still_needed(snapshots, settled)[0]
    again: list[list[int]] = []
    for row, is_cut in zip(rows, cut, strict=True):
        again.append(row.tokens[before.done :] if is_cut else [])
    return run.stop_rows(cut, decoder.read(before.run, again))
