"""Continuous batching: requests wait in a queue, get a row of the batch, and decode together.

One thread uses the device. Each tick prefills one chunk of a prompt for each free row, which bounds
how long the other requests wait, and decodes a block of tokens in every row. A recurrent state
makes this simple: admitting a request writes one row, whose size does not grow with the text.
"""

import atexit
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_ids,
    check_instance,
    check_not_intercepted,
    check_runnable,
    check_tokenizer,
    first_line,
    prefix_errors,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.answer_states import AnswerStates
from rwkv7_jax.serving.prefix_cache import PrefixCache
from rwkv7_jax.serving.prompts import Prompts, Reader
from rwkv7_jax.serving.requests import (
    MOST_ALTERNATIVES,
    Closed,
    Ending,
    Request,
    TooBusy,
    TooLong,
)
from rwkv7_jax.serving.slots import BLOCK, Slots
from rwkv7_jax.serving.start_states import StartStates
from rwkv7_jax.serving.ticket import OnEnd, OnPiece, Ticket
from rwkv7_jax.serving.watchdog import Watchdog
from rwkv7_jax.text.detokenizer import check_stop_strings
from rwkv7_jax.text.tokenizer import Tokenizer

_CACHE_BYTES = 2**28

# After this many consecutive failed ticks the device is assumed broken, not a request.
_MOST_FAILURES = 3

# Seconds between two checks whether a closing thread can still end.
_CHECK_SECONDS = 1.0

_LOG = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite"


class Engine:
    """A model, its start states, and its open requests.

    The tokens of an answer depend only on the request, not on its row, on other requests or on its
    arrival time. The rows of the model are independent, and sampling depends only on the seed of
    the request and the index of the token. Without a cache, results are bit-exact. A cached prefix
    was read in other chunks, so results after it may differ by rounding.

    Attributes:
        model: the model.
        tokenizer: the tokenizer of the model.
        longest_prompt: the maximum number of prompt tokens.
        longest_answer: the maximum number of new tokens.
        most_waiting: the maximum number of requests that wait for a row.
        is_open: whether the engine accepts requests.
        is_closed: whether the engine has ended.
        failure: the error that ended the engine; None if there was none.
    """

    def __init__(
        self,
        model: RWKV7,
        params: Params,
        tokenizer: Tokenizer,
        states: Mapping[str, RWKV7State],
        *,
        slots: int = 8,
        queue: int = 1024,
        longest_prompt: int = 65536,
        longest_answer: int = 8192,
        cache_bytes: int = _CACHE_BYTES,
        watchdog: Watchdog | None = None,
    ):
        """Creates free rows; decoding compiles in `warm_up` or at the first request.

        Args:
            model: the model.
            params: the weights.
            tokenizer: the tokenizer of the model.
            states: start states by name, each of one sequence.
            slots: the number of requests that decode together.
            queue: the maximum number of requests that wait for a row.
            longest_prompt: the maximum number of prompt tokens.
            longest_answer: the maximum number of new tokens.
            cache_bytes: the memory for cached states after prompts and answers; 0 disables the
                cache.
            watchdog: detects a tick that takes too long; None allows two minutes.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range, the tokenizer has fewer ids than the model, a
                state belongs to another model, upscaled states cannot be rows of one batch, or it
                is called inside `flax.linen.intercept_methods`.
        """
        with prefix_errors("Engine"):
            check_runnable(model, params)
            check_tokenizer(tokenizer, "token_bytes", "stop_ids", "vocab_size")
            # An id without a token would end the answers of all requests, not only its own.
            if tokenizer.vocab_size < model.config.vocab_size:
                raise ValueError(
                    f"`tokenizer` must have the model's {model.config.vocab_size} ids; got "
                    f"{tokenizer.vocab_size} (`with_vocab_size` adds unused ones)."
                )
            check_count(slots, 1, "`slots`")
            check_count(queue, 1, "`queue`")
            check_count(longest_prompt, 1, "`longest_prompt`")
            check_count(longest_answer, 1, "`longest_answer`")
            check_count(cache_bytes, 0, "`cache_bytes`")
            if watchdog is not None:
                check_instance(watchdog, Watchdog, "`watchdog`")
            self._states = StartStates(model.config, states)
        self.model = model
        self.tokenizer = tokenizer
        self.longest_prompt = longest_prompt
        self.longest_answer = longest_answer
        self.most_waiting = queue
        nothing = self._states.get(None).state
        self._slots = Slots(model, params, tokenizer, nothing, slots=slots)
        self._cache = PrefixCache(cache_bytes)
        self._answers = AnswerStates(self._slots, self._cache)
        self._prompts = Prompts(self._slots, self._cache)
        self._taken: list[Ticket | None] = [None] * slots
        self._watchdog = watchdog or Watchdog()
        # Guards what other threads use: the queue, the ways from it to a row, `is_open` and
        # `is_closed`.
        self._lock = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self.is_open = True
        self.is_closed = False
        self.failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, *, on_piece: OnPiece, on_end: OnEnd) -> Ticket:
        """Adds a request to the queue; may be called from any thread.

        Args:
            request: the prompt and how to continue it.
            on_piece: called by the engine's thread with each piece of the answer.
            on_end: called once with the answer.

        Raises:
            UnknownState: no state has the name that the request gives.
            TooLong: the prompt has too many tokens.
            TooBusy: the queue is full.
            Closed: the engine accepts no more requests.
            ValueError: a number is out of range, an id is outside the vocabulary, or it is called
                inside `flax.linen.intercept_methods`.
            TypeError: an argument has the wrong type.
        """
        with prefix_errors("submit"):
            check_not_intercepted()
            check_instance(request, Request, "`request`")
            check_function(on_piece, "`on_piece`")
            check_function(on_end, "`on_end`")
            request = self._checked(request)
            options = self._slots.options_of(request)
            start = self._states.get(request.state)
        ticket = Ticket(
            request,
            start,
            options,
            tokenizer=self.tokenizer,
            on_piece=on_piece,
            on_end=on_end,
        )
        with self._lock:
            if not self.is_open:
                raise Closed("the engine accepts no more requests.")
            if len(self._waiting) >= self.most_waiting:
                raise TooBusy("the queue is full; try again later.")
            self._waiting.append(ticket)
            self._lock.notify()
        return ticket

    def _checked(self, request: Request) -> Request:
        """Checks everything about a request but its sampling options and its start state.

        Returns:
            The request, whose prompt is a tuple of ids.
        """
        vocab_size = self.model.config.vocab_size
        prompt = check_ids(request.prompt, vocab_size, "`prompt`")
        length = len(prompt)
        check_count(length, 1, "the length of `prompt`")
        if length > self.longest_prompt:
            raise TooLong(
                f"submit: the length of `prompt` must be at most {self.longest_prompt}; "
                f"got {length}."
            )
        check_count(request.tokens, 1, "`tokens`", most=self.longest_answer)
        check_count(request.seed, 0, "`seed`", most=2**63 - 1)
        if request.alternatives is not None:
            most = MOST_ALTERNATIVES
            check_count(request.alternatives, 0, "`alternatives`", most=most)
        check_ids(request.stop_ids, vocab_size, "`stop_ids`")
        check_stop_strings(request.stop_strings)
        if isinstance(request.prompt, tuple):
            return request
        # A list may change while the request waits, and an array is not true or false.
        return dataclasses.replace(request, prompt=tuple(prompt.tolist()))

    @property
    def state_names(self) -> tuple[str, ...]:
        """Returns the names of the start states that requests may give."""
        return self._states.names()

    def put_state(self, name: str, state: RWKV7State) -> None:
        """Adds a start state, or replaces the one of the same name, for later requests.

        Args:
            name: the name for requests.
            state: the state of one sequence.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the state belongs to another model, or its memory differs in kind or size
                from that of the initial states.
        """
        with prefix_errors("put_state"):
            check_instance(name, str, "`name`")
            self._states.put(name, state)

    def remove_state(self, name: str) -> None:
        """Removes a start state; earlier requests still start from it.

        Raises:
            UnknownState: no state has the name.
        """
        with prefix_errors("remove_state"):
            self._states.remove(name)

    @property
    def decoding(self) -> int:
        """Returns the number of requests that have a row."""
        return sum(ticket is not None for ticket in self._taken)

    @property
    def waiting(self) -> int:
        """Returns the number of requests in the queue or in prefill."""
        return len(self._waiting) + len(self._prompts)

    def start(self) -> None:
        """Starts the engine's thread unless it was started; `close` ends it.

        Raises:
            Closed: the engine was closed.
        """
        with self._lock:
            if self.is_closed:
                raise Closed("the engine was closed; create another one.")
            if self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._run, name="engine", daemon=True
            )
            self._thread.start()
        # A thread that still computes while the interpreter exits would abort the process.
        atexit.register(self.close)

    def refuse_more(self) -> None:
        """Accepts no more requests; open ones continue."""
        self.is_open = False

    def close(self) -> None:
        """Ends the thread after its tick; all open requests end as cancelled.

        A thread whose device does not answer is abandoned.
        """
        with self._lock:
            self.is_open = False
            self.is_closed = True
            self._lock.notify()
        if self._thread is not None:
            while self._thread.is_alive() and not self.is_stalled:
                self._thread.join(_CHECK_SECONDS)
            atexit.unregister(self.close)
        self._end_all("cancelled", None)

    def warm_up(self) -> None:
        """Compiles every program that requests need; call it before `start`.

        Raises:
            RuntimeError: the thread is running.
            ValueError: it is called inside `flax.linen.intercept_methods`.
        """
        self._check_may_tick()
        # Longest first: a longer prompt would find a shorter one in the cache and skip its program.
        for width in sorted(self._slots.widths(), reverse=True):
            prompt = (0,) * min(width + 1, self.longest_prompt)
            tokens = min(BLOCK, self.longest_answer)
            request = Request(prompt, tokens=tokens, temperature=0.0)
            self.submit(request, on_piece=lambda _: None, on_end=lambda _: None)
            while self.tick():
                pass
        self._cache.clear()

    def _run(self) -> None:
        """Runs ticks until the engine is closed or an error cannot be recovered from."""
        failures = 0
        try:
            while self._wait_for_work():
                try:
                    with self._watchdog.watch():
                        self._tick()
                    failures = 0
                except Exception as error:
                    _LOG.exception("all open requests fail")
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    self._end_all("failed", reason)
                    failures += 1
                    if failures == _MOST_FAILURES:
                        raise
                    # The arrays of the rows may be partly updated, or donated and deleted.
                    self._slots.reset()
                    # The failed device call may have been to compute some of these states.
                    self._cache.clear()
        except Exception as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self.is_open = False
                self.is_closed = True
            self._end_all("cancelled", None)

    def _wait_for_work(self) -> bool:
        """Waits for work; returns False once the engine is closed."""
        with self._lock:
            self._lock.wait_for(lambda: self.is_closed or self.has_work)
            return not self.is_closed

    @property
    def has_work(self) -> bool:
        """Returns whether a request is open."""
        with self._lock:
            return self.decoding > 0 or self.waiting > 0

    @property
    def is_stalled(self) -> bool:
        """Returns whether a call of the device takes too long; it may never raise an error."""
        return self._watchdog.is_over

    def tick(self) -> bool:
        """Prefills a chunk of every prompt that will get a row, and decodes at most one block.

        Returns:
            Whether a request is still open.

        Raises:
            RuntimeError: the engine's thread is running.
            ValueError: it is called inside `flax.linen.intercept_methods`.
        """
        self._check_may_tick()
        return self._tick()

    def _check_may_tick(self) -> None:
        with prefix_errors("Engine"):
            check_not_intercepted()
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError(
                "Engine: `tick` and `warm_up` must be called before `start`; its thread is running."
            )

    def _tick(self) -> bool:
        self._end_cancelled()
        self._begin_reading()
        for reader in self._prompts.read_chunks():
            self._take_row(reader)
        if self.decoding:
            self._decode_block()
        return self.has_work

    def _end_cancelled(self) -> None:
        """Ends cancelled requests in the queue, in prefill and in decoding."""
        with self._lock:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        gone += self._prompts.remove(lambda ticket: ticket.cancelled)
        for ticket in gone:
            ticket.end("cancelled")
        cancelled: dict[int, Ending] = {}
        for slot, ticket in enumerate(self._taken):
            if ticket is not None and ticket.cancelled:
                cancelled[slot] = "cancelled"
        self._release(cancelled)

    def _begin_reading(self) -> None:
        """Takes the oldest requests from the queue, one per free row."""
        with self._lock:
            while self._waiting and len(self._prompts) < self._taken.count(None):
                self._prompts.add(self._waiting.popleft())

    def _take_row(self, reader: Reader) -> None:
        """Assigns a row to a request whose prompt is read."""
        ticket = reader.ticket
        slot = self._taken.index(None)
        self._slots.take(
            slot,
            reader.state,
            token=ticket.request.prompt[-1],
            seed=ticket.request.seed,
            options=ticket.options,
        )
        with self._lock:
            # Only now, so that an error above ends the request with the others. If it is gone,
            # `close` has ended it, because the device did not answer for long.
            if self._prompts.remove(lambda one: one is ticket):
                self._taken[slot] = ticket

    def _decode_block(self) -> None:
        """Decodes a block and ends the complete requests."""
        ended: dict[int, Ending] = {}
        scored = False
        limits = np.zeros(len(self._taken), np.int32)
        for slot, ticket in enumerate(self._taken):
            if ticket is not None:
                left = ticket.request.tokens - len(ticket.row.tokens)
                limits[slot] = min(left, BLOCK)
                scored |= ticket.request.alternatives is not None
        before = self._slots.states()
        for slot, drawn in enumerate(self._slots.decode(limits, scored=scored)):
            ticket = self._taken[slot]
            if ticket is None:
                continue
            ending = ticket.append(drawn)
            if ending is None:
                self._answers.note_block(ticket, slot, before)
                continue
            ended[slot] = ending
            if ending != "failed":
                self._answers.keep(ticket, slot, before)
        self._release(ended)

    def _release(self, ended: Mapping[int, Ending]) -> None:
        """Frees rows and ends their requests."""
        if not ended:
            return
        rows = np.zeros(len(self._taken), bool)
        rows[list(ended)] = True
        self._slots.free(rows)
        for slot, ending in ended.items():
            ticket = self._taken[slot]
            self._taken[slot] = None
            assert ticket is not None
            ticket.end(ending, _NOT_FINITE if ending == "failed" else None)

    def _end_all(self, ending: Ending, error: str | None) -> None:
        """Ends every open request."""
        with self._lock:
            tickets = list(self._waiting)
            self._waiting.clear()
            tickets += self._prompts.remove(lambda _: True)
            tickets += [ticket for ticket in self._taken if ticket is not None]
            self._taken = [None] * len(self._taken)
        for ticket in tickets:
            ticket.end(ending, error)
