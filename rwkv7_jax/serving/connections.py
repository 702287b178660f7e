"""Limits on HTTP/1.1 connections: their number, and the time that a client may take.

uvicorn closes a connection that is idle after an answer. It has no limit for a client that never
sends a request, that sends the head or the rest of a body byte by byte, or that does not read its
answer.
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

# Seconds in which a client must read some of the data that waits for it.
_READ_SECONDS = 60

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
    """A connection that closes if its client does not send a request or read its answer in time."""

    _deadline: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Waits for the first request, or rejects one connection too many."""
        super().connection_made(transport)
        # Calls `pause_writing` for any unsent data: a closing connection waits for all of it.
        transport.set_write_buffer_limits(high=0)
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
        self._end_read_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stops answering until the client has read everything, for which it has some time."""
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        """Continues to answer."""
        super().resume_writing()
        self._end_read_timer()

    def _start_read_timer(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(
            _READ_SECONDS, self._check_reading, unsent
        )

    def _check_reading(self, before: int) -> None:
        """Closes a connection whose client has read nothing since `before` bytes were unsent."""
        if self.transport.get_write_buffer_size() < before:
            self._start_read_timer()
        else:
            # `close` would wait for the client.
            self.transport.abort()

    def _end_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

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
        sentence = (
            f"the head of a request must be complete within {_HEAD_SECONDS} seconds."
        )
        self._end_with(Refused(sentence, status=408), {})

    def _end_with(self, refused: Refused, headers: dict[str, str]) -> None:
        """Sends an error, unless an answer has begun, and closes the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # The rest of a body, after the answer to its request, is missing or invalid.
            self.transport.close()
            return
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
