"""The request log: one line per request, with an id that the client also receives."""

import contextlib
import datetime
import json
import re
import secrets
import time
from typing import TextIO

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv7_jax.serving.access import LIVE, READY
from rwkv7_jax.serving.fields import Refused

# A request id that a client or a proxy may give; others are replaced.
_ID = re.compile(rb"[\w.:/+=-]{1,128}")

# Programs request these paths every few seconds; their lines would hide the others.
_PROBES = (READY, LIVE, "/metrics")

# nginx's status for a client that disconnected before its response was complete.
_LEFT = 499


class RequestLog:
    """Middleware that adds `X-Request-Id` to each response and logs it once it is complete."""

    def __init__(self, app: ASGIApp, stream: TextIO | None):
        """Stores the arguments.

        Args:
            app: the wrapped application.
            stream: receives the lines; None disables the log.
        """
        self._app = app
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request and its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = _request_id(scope)
        start = time.monotonic()
        # The status that outer middleware gives to an unhandled error.
        status = 500
        complete = False
        left = False

        async def note_leaving() -> Message:
            nonlocal left
            message = await receive()
            left |= message["type"] == "http.disconnect" and not complete
            return message

        async def note_answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", id.encode())]
                message = {**message, "headers": headers}
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self._app(scope, note_leaving, note_answer)
        finally:
            self._write(scope, id, _LEFT if left else status, time.monotonic() - start)

    def _write(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        """Writes the line of a request; ignores a closed stream, which must not fail responses."""
        if self._stream is None or (scope["path"] in _PROBES and status == 200):
            return
        now = datetime.datetime.now(datetime.UTC)
        client = scope.get("client")
        line = {
            "time": now.isoformat(timespec="milliseconds"),
            "id": id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 3),
        }
        with contextlib.suppress(OSError, ValueError):
            print(json.dumps(line), file=self._stream, flush=True)


class UnexpectedErrors:
    """Middleware that answers 500 after an unhandled error, which the server logs.

    Starlette would answer outside all middleware, which then could not add headers.
    """

    def __init__(self, app: ASGIApp):
        """Wraps an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        has_begun = False

        async def note_answer(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, note_answer)
        except Exception as error:
            if scope["type"] == "http" and not has_begun:
                sentence = f"the server failed: {type(error).__name__}."
                body = Refused(sentence, status=500).body()
                # The server closes the connection of a request that failed.
                response = JSONResponse(body, 500, {"Connection": "close"})
                await response(scope, receive, send)
            raise


def _request_id(scope: Scope) -> str:
    """Returns the id that a request gives, or a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
