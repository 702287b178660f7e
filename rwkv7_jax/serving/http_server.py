"""An HTTP server with OpenAI's interface: routes, streams, errors.

The engine's thread calls back; what it says goes through a queue of asyncio to the one coroutine
that answers the client. A client that leaves cancels its request.
"""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from rwkv7_jax.serving import protocol
from rwkv7_jax.serving.engine import Engine, Ticket
from rwkv7_jax.serving.protocol import Call, Refused, Served
from rwkv7_jax.serving.requests import Answer, TooBusy

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError:
    raise ImportError(
        "serve: the server needs the packages starlette and uvicorn: "
        "pip install 'rwkv7_jax[server]'."
    ) from None

# Bytes of a body at most.
MOST_BYTES = 2**24

# Caches and proxies must not buffer a stream.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# Seconds that a stopped server waits for its open connections.
_LAST_SECONDS = 5

# The pieces of an answer's text, and last the answer.
_Events = asyncio.Queue[str | Answer]

# A client's names for what the engine says about a request.
_FIELDS = {
    "tokens": "max_tokens",
    "stop_ids": "stop_token_ids",
    "stop_strings": "stop",
}


def make_app(engine: Engine, *, name: str) -> Starlette:
    """Makes the application; it starts the engine's thread, and ends it.

    Args:
        engine: not started.
        name: of the model, for clients.
    """
    served = Served(name, engine.state_names, engine.tokenizer, engine.longest_answer)
    routes = _Routes(engine, served)
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/states", routes.states),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        ],
        exception_handlers={
            Refused: _refused,
            HTTPException: _http_error,
            Exception: _failed,
        },
        lifespan=routes.lifespan,
    )


class _Routes:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, served: Served):
        """Stores the engine, and what clients may name."""
        self._engine = engine
        self._served = served

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Runs the engine while the server runs."""
        del app
        self._engine.start()
        yield
        await asyncio.to_thread(self._engine.close)

    async def health(self, request: Request) -> Response:
        """Says whether the server answers."""
        del request
        if self._engine.is_closed:
            raise Refused("the engine has ended.", status=503)
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Lists the model, by itself and with each state."""
        del request
        return JSONResponse(protocol.models_body(self._served))

    async def states(self, request: Request) -> Response:
        """Lists the start states."""
        del request
        return JSONResponse(protocol.states_body(self._served))

    async def complete(self, request: Request) -> Response:
        """Continues a text."""
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        body = await _read_json(request)
        # The engine's thread may reach asyncio's loop by `call_soon_threadsafe` alone.
        events: _Events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: str | Answer) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        # In a thread: encoding a long text would hold up the streams of other clients.
        call, ticket = await run_in_threadpool(
            self._submit, body, tell, is_chat=is_chat
        )
        if call.stream:
            return _EventStream(_stream(call, events), ticket)
        answer = await _whole(request, events, ticket)
        _refuse_unfinished(answer)
        return JSONResponse(protocol.answer_body(call, answer))

    def _submit(
        self, body: Any, tell: Callable[[str | Answer], None], *, is_chat: bool
    ) -> tuple[Call, Ticket]:
        """Submits a call; errors of the engine name the fields of the body."""
        call = protocol.read_call(body, self._served, is_chat=is_chat)
        try:
            ticket = self._engine.submit(call.request, on_text=tell, on_end=tell)
        except TooBusy as error:
            raise Refused(str(error), status=429, code="too_busy") from None
        except (TypeError, ValueError) as error:
            sentence = str(error).removeprefix("submit: ")
            for ours, theirs in _FIELDS.items():
                sentence = sentence.replace(f"`{ours}`", f"`{theirs}`")
            name = re.search(r"`(\w+)`", sentence)
            raise Refused(sentence, name and name[1]) from None
        return call, ticket


async def _read_json(request: Request) -> Any:
    """Reads the body of a call.

    Raises:
        Refused: it is too long, or no JSON.
    """
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(
                f"the body must have at most {MOST_BYTES:,} bytes.", status=413
            )
    try:
        return json.loads(data)
    # Deep nesting ends in the second one.
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}.") from None


async def _whole(request: Request, events: _Events, ticket: Ticket) -> Answer:
    """Waits for the end of an answer; a client that disconnects cancels it."""
    watcher = asyncio.create_task(_cancel_when_gone(request, ticket))
    try:
        event = await events.get()
        while isinstance(event, str):
            event = await events.get()
        return event
    finally:
        watcher.cancel()


async def _cancel_when_gone(request: Request, ticket: Ticket) -> None:
    """Cancels the request once its client has disconnected."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()
    ticket.cancel()


class _EventStream(StreamingResponse):
    """A stream of events whose request is cancelled if the client disconnects."""

    def __init__(self, content: AsyncIterator[str], ticket: Ticket):
        """Stores the events to send, and the request that they answer."""
        super().__init__(
            content, media_type="text/event-stream", headers=_STREAM_HEADERS
        )
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Has no effect on a request that is complete.
            self._ticket.cancel()


async def _stream(call: Call, events: _Events) -> AsyncIterator[str]:
    """Yields the events of an answer as it is made."""
    if call.is_chat:
        yield _event(protocol.chunk(call, None))
    event = await events.get()
    # An answer without text still has its opening.
    text = protocol.first_text(call, event if isinstance(event, str) else "")
    if text:
        yield _event(protocol.chunk(call, text))
    while isinstance(event, str):
        event = await events.get()
        if isinstance(event, str):
            yield _event(protocol.chunk(call, event))
    try:
        _refuse_unfinished(event)
    except Refused as refused:
        yield _event(refused.body())
        return
    finish = protocol.finish_reason(event)
    yield _event(protocol.chunk(call, "", finish=finish))
    if call.include_usage:
        yield _event(protocol.usage_chunk(call, event))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _refuse_unfinished(answer: Answer) -> None:
    """Raises for an answer that failed or was cancelled."""
    if answer.ended == "failed":
        raise Refused(f"the answer failed: {answer.error}.", status=500)
    if answer.ended == "cancelled":
        raise Refused("the server is being stopped.", status=503)


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}."
    body = Refused(text, status=error.status_code).body()
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    del request
    # The client has disconnected, so this response is never read.
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    body = Refused(f"the server failed: {type(error).__name__}.", status=500).body()
    return JSONResponse(body, 500)


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, before anything slow is done for it.

    Args:
        host: address to listen at.
        port: 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


class _Server(uvicorn.Server):
    """A server that ends its answers before it waits for the clients who get them."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        """Takes the engine that the answers come from."""
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server after a signal."""
        await asyncio.to_thread(self._engine.close)
        await super().shutdown(sockets)


def serve(engine: Engine, listener: socket.socket, *, name: str) -> None:
    """Answers at an address until a signal ends it.

    Args:
        engine: not started.
        listener: from `listen`; it is closed at the end.
        name: of the model, for clients.
    """
    config = uvicorn.Config(
        make_app(engine, name=name),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    with contextlib.closing(listener):
        _Server(config, engine).run(sockets=[listener])
