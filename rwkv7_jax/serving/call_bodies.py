"""The bodies of calls as they arrive: how long, how slow, and how many at once they may be.

A connection costs nothing, so clients must not decide how much the server holds for them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request

from rwkv7_jax.serving.fields import Refused, stopped

# Bytes of a body at most.
MOST_BYTES = 2**24

# Bytes of all bodies that are there, whole or in part.
_MOST_HELD = 2**28

# A body of so few bytes is taken however many others there are.
_FEW_BYTES = 2**16

# Seconds in which a body must be complete.
_SECONDS = 60

# Seconds between two looks whether a body still can be answered.
_LOOK_SECONDS = 0.2

# Bodies that are read as JSON at once: each may take twenty times its bytes.
_MOST_PARSED = 4


class CallBodies:
    """Reads bodies, and counts the bytes of those that are there."""

    def __init__(self, is_open: Callable[[], bool]):
        """Starts without a body.

        Args:
            is_open: tells whether calls can still be answered.
        """
        self._is_open = is_open
        self._held = 0
        self._turns = asyncio.Semaphore(_MOST_PARSED)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yields the body of a call when it is its turn to be parsed.

        Raises:
            Refused: it is too long or too slow, too many others are there, or the server is being
                stopped.
        """
        data = bytearray()
        try:
            await self._receive(request, data)
            async with self._turns:
                yield bytes(data)
        finally:
            self._held -= len(data)

    async def _receive(self, request: Request, data: bytearray) -> None:
        """Appends what arrives to `data` until it is complete or the server is stopped."""
        reading = asyncio.create_task(self._append(request, data))
        try:
            async with asyncio.timeout(_SECONDS):
                while not reading.done():
                    if not self._is_open():
                        raise stopped()
                    await asyncio.wait({reading}, timeout=_LOOK_SECONDS)
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
        """Refuses a body of which so many bytes are there."""
        if size > MOST_BYTES:
            raise Refused(
                f"the body must have at most {MOST_BYTES:,} bytes.", status=413
            )
        if size > _FEW_BYTES and self._held > _MOST_HELD:
            raise Refused(
                "too many long bodies come at once; try again later.",
                status=429,
                code="too_busy",
            )
