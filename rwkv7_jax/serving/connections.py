"""Limits on HTTP/1.1 connections: their number, and the time until a request is complete.

uvicorn closes a connection that is idle after an answer. It has no limit for a client that never
sends a request, or that sends the head or the rest of a body byte by byte.
"""

import asyncio
import json
import resource
import secrets
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rwkv7_jax.serving.fields import Refused

# Seconds from the first byte of a request to the end of its head.
_HEAD_SECONDS = 30

# The maximum number of connections, if the process may open as many files.
_MOST_CONNECTIONS = 4096

# Files reserved for other uses.
_OTHER_FILES = 128


def most_connections() -> int:
    """Returns the maximum number of open connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, soft - _OTHER_FILES))


class Connection(H11Protocol):
    """A connection that closes if its client sends no complete request in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Waits for the first request, or rejects one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            refused = Refused(
                "too many connections are open; try again later.",
                status=503,
                code="too_busy",
            )
            self._end_with(refused, {"Retry-After": "1"})
            return
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Parses the data and starts or stops the deadline of an incomplete request."""
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            self._end_deadline()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            # The unread rest of a body is complete.
            self._end_deadline()
            self._wait_for_request()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self._end_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timers of the connection."""
        self._end_deadline()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers data that is not an HTTP request."""
        self._end_with(Refused(msg), {})

    def _wait_for_request(self) -> None:
        """Gives the client the idle time between two requests."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_slow(self) -> None:
        """Closes a connection whose request was not complete in time."""
        if self.transport.is_closing():
            return
        if self.conn.our_state is not h11.IDLE:
            # The request was answered already; the rest of its body is missing.
            self.transport.close()
            return
        sentence = (
            f"the head of a request must be complete within {_HEAD_SECONDS} seconds."
        )
        self._end_with(Refused(sentence, status=408), {})

    def _end_with(self, refused: Refused, headers: dict[str, str]) -> None:
        """Sends an error outside any request and closes the connection."""
        body = json.dumps(refused.body()).encode()
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": secrets.token_hex(12),
        }
        response = h11.Response(
            status_code=refused.status,
            headers=list((fields | headers).items()),
            reason=HTTPStatus(refused.status).phrase.encode(),
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
