"""An HTTP application with OpenAI's API: routes, streams and errors.

The callbacks of the engine's thread put their events into an asyncio queue. One coroutine per call
reads the queue and responds to the client. If the client disconnects, its requests are cancelled.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TextIO

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.serving.answer_bodies import (
    AnswerBodies,
    model_body,
    models_body,
    states_body,
)
from rwkv7_jax.serving.engine import Engine, Ticket
from rwkv7_jax.serving.fields import TOO_LONG, Refused, stopped
from rwkv7_jax.serving.protocol import Call, Served, read_call
from rwkv7_jax.serving.requests import Answer, Closed, Piece, TooBusy, TooLong
from rwkv7_jax.text.tokenizer import Tokenizer

try:
    from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send

    from rwkv7_jax.serving.access import LIVE, READY, access_checks
    from rwkv7_jax.serving.call_bodies import CallBodies
    from rwkv7_jax.serving.metrics import Metrics
    from rwkv7_jax.serving.request_log import RequestLog, UnexpectedErrors
except ImportError:
    raise ImportError(
        "serve: the server needs the packages of the extra `server`: "
        "pip install 'rwkv7_jax[server]'."
    ) from None

# If the body of a request was not read to its end, the connection cannot be reused.
_ERROR_HEADERS = {
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
}

# Caches and proxies must not buffer a stream.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# Seconds without an event after which a stream sends a keep-alive comment.
_QUIET_SECONDS = 10

# Pairs of the index of an answer and an event: its pieces, and finally the complete answer.
_Events = asyncio.Queue[tuple[int, Piece | Answer]]

# The names in the API of the arguments that the engine's errors name.
_FIELDS = {
    "tokens": "max_tokens",
    "stop_ids": "stop_token_ids",
    "stop_strings": "stop",
}


def make_app(
    engine: Engine,
    *,
    name: str,
    key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    refresh: Callable[[], None] = lambda: None,
    request_log: TextIO | None = None,
) -> Starlette:
    """Creates the application, which starts and ends the engine's thread.

    Args:
        engine: an engine that was not started.
        name: the name of the model for clients.
        key: the key that clients must send; None accepts every client.
        origins: origins of the pages that may read responses in a browser; "*" for all. Without a
            key, requests from pages of other sites are rejected.
        hosts: host names, besides those of this machine, that a server without a key accepts; None
            for any.
        refresh: called in any thread before states are looked up.
        request_log: receives a line of JSON per request; None disables the log.
    """
    served = Served(
        name=name,
        states=(),
        tokenizer=engine.tokenizer,
        most_bytes=engine.longest_prompt * _longest_token(engine.tokenizer),
        longest_answer=engine.longest_answer,
        most_answers=engine.most_waiting,
        started=int(time.time()),
    )
    routes = _Routes(engine, served, refresh)
    return Starlette(
        routes=[
            Route(READY, routes.health),
            Route(LIVE, routes.live),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.model),
            Route("/v1/states", routes.states),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        ],
        exception_handlers={
            Refused: _refused,
            ClientDisconnect: _left,
            HTTPException: _http_error,
        },
        middleware=[
            Middleware(RequestLog, stream=request_log),
            *access_checks(key, origins, hosts),
            Middleware(UnexpectedErrors),
        ],
        lifespan=routes.lifespan,
    )


def _longest_token(tokenizer: Tokenizer) -> int:
    """Returns the number of bytes of the vocabulary's longest token."""
    return max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))


class _Routes:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, served: Served, refresh: Callable[[], None]):
        """Stores the engine, and what the server offers besides the engine's states."""
        self._engine = engine
        self._constants = served
        self._refresh = refresh
        self._bodies = CallBodies(lambda: engine.is_open)
        self._metrics = Metrics(
            decoding=lambda: engine.decoding, waiting=lambda: engine.waiting
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Runs the engine while the server runs."""
        del app
        self._engine.start()
        yield
        await asyncio.to_thread(self._engine.close)

    async def health(self, request: Request) -> Response:
        """Responds with status 200 while the server accepts calls, and with 503 afterwards."""
        del request
        if not self._engine.is_open:
            raise stopped()
        self._check_device()
        return JSONResponse({"status": "ok"})

    async def live(self, request: Request) -> Response:
        """Returns 200 while the device answers, also while the server drains."""
        del request
        self._check_device()
        return JSONResponse({"status": "ok"})

    def _check_device(self) -> None:
        """Rejects requests if the device does not answer; only a new process can help."""
        if self._engine.is_stalled:
            raise Refused("the device does not answer.", status=503, code="stalled")

    async def metrics(self, request: Request) -> Response:
        """Returns the metrics for Prometheus."""
        del request
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _served(self) -> Served:
        """Returns what the server offers now."""
        self._refresh()
        return dataclasses.replace(self._constants, states=self._engine.state_names)

    async def models(self, request: Request) -> Response:
        """Lists the base model, and the model with each state."""
        del request
        return JSONResponse(models_body(await run_in_threadpool(self._served)))

    async def model(self, request: Request) -> Response:
        """Describes the model with a name."""
        served = await run_in_threadpool(self._served)
        return JSONResponse(model_body(served, request.path_params["model"]))

    async def states(self, request: Request) -> Response:
        """Lists the start states."""
        del request
        return JSONResponse(states_body(await run_in_threadpool(self._served)))

    async def complete(self, request: Request) -> Response:
        """Continues a text."""
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        events: _Events = asyncio.Queue()
        loop = asyncio.get_running_loop()
        async with self._bodies.read(request) as body:
            # In a thread, because encoding a long text would block the streams of other clients.
            call, tickets = await run_in_threadpool(
                self._submit, body, events, loop, is_chat=is_chat
            )
        bodies = AnswerBodies(call, self._engine.tokenizer)
        if call.stream:
            return _EventStream(_stream(call, bodies, events), tickets)
        answers = await _whole(request, events, tickets)
        for answer in answers:
            if problem := _problem(answer):
                raise problem
        return JSONResponse(bodies.whole(answers))

    def _submit(
        self,
        body: bytes,
        events: _Events,
        loop: asyncio.AbstractEventLoop,
        *,
        is_chat: bool,
    ) -> tuple[Call, list[Ticket]]:
        """Submits all requests of a call, or none of them."""
        self._check_device()
        try:
            fields = parse_json(body)
        except ValueError as error:
            raise Refused(f"the body is not JSON: {error}.") from None
        call = read_call(fields, self._served(), is_chat=is_chat)
        tickets: list[Ticket] = []
        for index, request in enumerate(call.requests):
            # Other threads may use an asyncio loop only through `call_soon_threadsafe`.
            def tell(event: Piece | Answer, index: int = index) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

            watched = self._metrics.watch(tell)
            try:
                ticket = self._engine.submit(request, on_piece=watched, on_end=watched)
            except (Closed, TooBusy, TypeError, ValueError) as error:
                _cancel(tickets)
                if isinstance(error, TooBusy):
                    self._metrics.refuse()
                raise _as_refused(error, is_chat=is_chat) from None
            tickets.append(ticket)
        return call, tickets


def _as_refused(error: Exception, *, is_chat: bool) -> Refused:
    """Converts an error of the engine to one that names the fields of the body."""
    if isinstance(error, TooBusy):
        return Refused(str(error), status=429, code="too_busy")
    if isinstance(error, Closed):
        return stopped()
    sentence = str(error).removeprefix("submit: ")
    for ours, theirs in _FIELDS.items():
        sentence = sentence.replace(f"`{ours}`", f"`{theirs}`")
    if is_chat:
        sentence = sentence.replace("`prompt`", "`messages`")
    name = re.search(r"`(\w+)`", sentence)
    code = TOO_LONG if isinstance(error, TooLong) else None
    return Refused(sentence, name and name[1], code=code)


def _cancel(tickets: Sequence[Ticket]) -> None:
    """Cancels requests; this has no effect on complete ones."""
    for ticket in tickets:
        ticket.cancel()


async def _whole(
    request: Request, events: _Events, tickets: Sequence[Ticket]
) -> list[Answer]:
    """Waits for all complete answers; cancels them if the client disconnects."""
    watcher = asyncio.create_task(_cancel_when_gone(request, tickets))
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(tickets):
            index, event = await events.get()
            if isinstance(event, Answer):
                answers[index] = event
        return [answers[index] for index in range(len(tickets))]
    finally:
        watcher.cancel()


async def _cancel_when_gone(request: Request, tickets: Sequence[Ticket]) -> None:
    """Cancels the requests once their client has disconnected."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()
    _cancel(tickets)


class _EventStream(StreamingResponse):
    """A stream of events whose requests are cancelled if the client disconnects."""

    def __init__(self, content: AsyncIterator[str], tickets: Sequence[Ticket]):
        """Stores the events to send and the requests that produce them."""
        super().__init__(
            content, media_type="text/event-stream", headers=_STREAM_HEADERS
        )
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._tickets)


async def _stream(
    call: Call, bodies: AnswerBodies, events: _Events
) -> AsyncIterator[str]:
    """Yields the events of a call's answers as they are generated."""
    for opening in bodies.openings():
        yield _event(opening)
    answers: dict[int, Answer] = {}
    sent = time.monotonic()
    while len(answers) < len(call.requests):
        try:
            quiet = sent + _QUIET_SECONDS - time.monotonic()
            index, event = await asyncio.wait_for(events.get(), quiet)
        except TimeoutError:
            # A comment keeps proxies from closing a quiet connection. Pieces do not suffice,
            # because a function call is held back until it is complete.
            yield ": waiting\n\n"
            sent = time.monotonic()
            continue
        if isinstance(event, Piece):
            made = bodies.piece(index, event)
        elif problem := _problem(event):
            yield _event(problem.body())
            return
        else:
            answers[index] = event
            made = bodies.end(index, event)
        for body in made:
            yield _event(body)
            sent = time.monotonic()
    if call.include_usage:
        yield _event(bodies.usage_event([answers[index] for index in sorted(answers)]))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _problem(answer: Answer) -> Refused | None:
    """Returns the error for an answer that failed or was cancelled; None for others."""
    if answer.ended == "failed":
        return Refused(f"the answer failed: {answer.error}.", status=500)
    if answer.ended == "cancelled":
        return stopped()
    return None


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    return JSONResponse(
        error.body(), error.status, headers=_ERROR_HEADERS.get(error.status)
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}."
    body = Refused(text, status=error.status_code).body()
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _left(request: Request, error: Exception) -> Response:
    # The client disconnected before its body was complete, so nobody reads this response.
    del request, error
    return Response(status_code=499)
