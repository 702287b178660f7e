"""A request in the engine: the host side of its answer."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rwkv7_jax.generation.sampling import SamplingParams
from rwkv7_jax.generation.streaming import RowText
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.requests import Answer, Ending, Piece, Request, TokenScore
from rwkv7_jax.serving.slots import Drawn
from rwkv7_jax.serving.start_states import Start
from rwkv7_jax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

OnPiece = Callable[[Piece], object]
OnEnd = Callable[[Answer], object]


class Earlier(NamedTuple):
    """A state before the tokens that a stop string may cut.

    Attributes:
        count: the number of prompt and answer tokens that it has read.
        state: the state of one row.
    """

    count: int
    state: RWKV7State


class Ticket:
    """A request in the engine, and its answer so far.

    Only the engine's thread changes it, except for `cancelled`.

    Attributes:
        request: the request.
        start: the start state.
        cancelled: whether the client has cancelled the request.
        options: the sampling options.
        row: the answer so far.
        cached_tokens: the number of prompt tokens that the cache saved reading.
        read: the number of prompt and answer tokens that the row of the batch has read.
        block_start: the value of `read` before the last block.
        earlier: an earlier state of the row, which has read no token that a stop string may cut;
            None if that also holds for the current state.
    """

    def __init__(
        self,
        request: Request,
        start: Start,
        options: SamplingParams,
        *,
        tokenizer: Tokenizer,
        on_piece: OnPiece,
        on_end: OnEnd,
    ):
        """Starts with nothing read; see `Engine.submit`."""
        self.request = request
        self.start = start
        self.cancelled = False
        self.options = options
        self._tokenizer = tokenizer
        self.row = RowText(tokenizer, request.stop_strings)
        self.cached_tokens = 0
        # The row reads the last prompt token when it decodes.
        self.read = len(request.prompt) - 1
        self.block_start = self.read
        self.earlier: Earlier | None = None
        # A set, because a client may name as many ids as the vocabulary has.
        self._stops = frozenset(request.stop_ids)
        self._scores: list[TokenScore] = []
        self._sent_scores = 0
        self._on_piece = on_piece
        self._on_end = on_end

    def cancel(self) -> None:
        """Cancels the request; its row is freed at the next tick."""
        self.cancelled = True

    def append(self, drawn: Drawn) -> Ending | None:
        """Adds a row's new tokens and sends the text that no stop string can cut any more.

        Returns:
            How the answer ended; None if it continues.
        """
        self.block_start = self.read
        self.read = len(self.request.prompt) + len(self.row.tokens) + len(drawn.tokens)
        room = self.request.tokens - len(self.row.tokens)
        tokens = drawn.tokens[:room]
        stops = self._stops
        stop = next((at for at, id in enumerate(tokens) if id in stops), None)
        self._note(drawn.scores)
        self._send(self.row.append(tokens[:stop]), self.row.settled)
        if self.row.ended is not None:
            return self.row.ended
        if stop is not None:
            return "stop_id"
        if len(tokens) == room:
            return "length"
        if drawn.broken:
            return "failed"
        return "stop_id" if drawn.stopped else None

    @property
    def kept(self) -> tuple[int, ...]:
        """Returns the ids of the prompt and the answer as the client will send them back."""
        tokens = list(self.row.tokens)
        if self.request.is_message:
            while tokens and self._tokenizer.token_bytes(tokens[-1]).isspace():
                tokens.pop()
        return (*self.request.prompt, *tokens)

    @property
    def certain(self) -> int:
        """Returns how many leading prompt and answer tokens no stop string can cut any more."""
        return len(self.request.prompt) + self.row.settled

    @property
    def as_drawn(self) -> int:
        """Returns how many leading prompt and answer tokens the row has read as they are.

        A stop string may begin inside a token. Other ids then spell the rest of that token.
        """
        if self.row.ended == "stop_string":
            return self.certain
        return len(self.request.prompt) + len(self.row.tokens)

    def _note(self, scores: Sequence[TokenScore]) -> None:
        """Stores scores, with the number of alternatives that the request asks for."""
        wanted = self.request.alternatives
        if wanted is None:
            return
        for score in scores:
            few = score.alternatives[:wanted]
            self._scores.append(score._replace(alternatives=few))

    def _send(self, text: str, certain: int) -> None:
        """Sends a piece: a text, and the unsent scores among the first `certain` tokens."""
        scores = tuple(self._scores[self._sent_scores : certain])
        self._sent_scores += len(scores)
        if text or scores:
            self._call(self._on_piece, Piece(text, scores))

    def end(self, ending: Ending, error: str | None = None) -> None:
        """Sends the text that was held back, then the answer."""
        certain = self.row.settled
        if self.row.ended is None:
            certain = len(self.row.tokens)
            self._send(self.row.end("length"), certain)
        answer = Answer(
            text=self.row.text,
            tokens=tuple(self.row.tokens),
            ended=ending,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            scores=tuple(self._scores[:certain]),
            error=error,
        )
        self._call(self._on_end, answer)

    def _call(self, receiver: Callable[..., object], what: object) -> None:
        # An error of one client's callback must not end the answers of the others.
        try:
            receiver(what)
        except Exception:
            _LOG.warning("a callback failed; its request is cancelled", exc_info=True)
            self.cancelled = True
