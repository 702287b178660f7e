"""Request bodies as they arrive, with limits on size, time and concurrency.

A connection costs a client nothing, so the server must limit the memory that it uses for clients.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request

from rwkv7_jax.serving.fields import Refused, stopped

# The maximum size of a body in bytes.
MOST_BYTES = 2**24

# The maximum size of all bodies in memory, complete or not, in bytes.
_MOST_HELD = 2**28

# A body of at most this many bytes is accepted even beyond `_MOST_HELD`.
_FEW_BYTES = 2**16

# The timeout in seconds for a complete body.
_SECONDS = 60

# Seconds between two checks whether the server still accepts calls.
_CHECK_SECONDS = 0.2

# How many bodies are parsed concurrently: parsed JSON may take twenty times the bytes of its text.
_MOST_PARSED = 4


class CallBodies:
    """The reader of all bodies; it counts the bytes in memory."""

    def __init__(self, is_open: Callable[[], bool]):
        """Starts without a body.

        Args:
            is_open: returns whether the server still accepts calls.
        """
        self._is_open = is_open
        self._held = 0
        self._turns = asyncio.Semaphore(_MOST_PARSED)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yields the body of a call once it may be parsed.

        Raises:
            Refused: the body is too long or too slow, too many long bodies arrive at once, or the
                server is shutting down.
        """
        data = bytearray()
        try:
            await self._receive(request, data)
            async with self._turns:
                yield bytes(data)
        finally:
            self._held -= len(data)

    async def _receive(self, request: Request, data: bytearray) -> None:
        """Appends to `data` until the body is complete; raises if the server is shutting down."""
        reading = asyncio.create_task(self._append(request, data))
        try:
            async with asyncio.timeout(_SECONDS):
                while not reading.done():
                    if not self._is_open():
                        raise stopped()
                    await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
                await reading
        except TimeoutError:
            raise Refused(
                f"the body must be complete within {_SECONDS} seconds.", status=408
            ) from None
        finally:
            reading.cancel()

    async def _append(self, request: Request, data: bytearray) -> None:
        async for part in request.stream():
            data += part
            self._held += len(part)
            self._check(len(data))

    def _check(self, size: int) -> None:
        """Raises if a body of which `size` bytes have arrived exceeds a limit."""
        if size > MOST_BYTES:
            raise Refused(
                f"the body must have at most {MOST_BYTES:,} bytes.", status=413
            )
        if size > _FEW_BYTES and self._held > _MOST_HELD:
            raise Refused(
                "too many long bodies arrive at once; try again later.",
                status=429,
                code="too_busy",
            )
