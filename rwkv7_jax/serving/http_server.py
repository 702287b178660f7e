"""A process that serves an application: its address, its signals, and its end."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from rwkv7_jax.serving.connections import Connection
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.starting import make_starting_app

# Seconds that a stopped server waits for clients that read their last events slowly.
_LAST_SECONDS = 5

# Seconds between two looks whether the last answers are complete.
_LOOK_SECONDS = 0.05


def bind(host: str, port: int) -> socket.socket:
    """Takes an address, before anything slow is done for it; `starting` listens there.

    Args:
        host: address to listen at.
        port: 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    try:
        # A server that ended a moment ago does not keep its address.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except BaseException:
        taken.close()
        raise
    return taken


def _listen(listener: socket.socket, backlog: int) -> None:
    """Begins to listen; uvloop's server would pass over the error.

    Raises:
        ValueError: another program listens at the address.
    """
    try:
        listener.listen(backlog)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise ValueError(
            f"serve: another program began to listen at {host}:{port} while this one made itself "
            f"ready; take another `--port`: {error}."
        ) from None


def _config(app: Starlette, *, keep_alive: int, last_seconds: int) -> uvicorn.Config:
    """Makes the settings of a server.

    Args:
        app: that answers.
        keep_alive: seconds after which a connection without a request is closed.
        last_seconds: after which a stopped server waits for no answer.
    """
    return uvicorn.Config(
        app,
        log_level="warning",
        # uvicorn's own would close the handlers that the process has, and what they write to.
        log_config=None,
        access_log=False,
        server_header=False,
        # Of the parser h11: the other one of uvicorn bounds no header.
        http=Connection,
        ws="none",
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=last_seconds,
    )


@contextlib.contextmanager
def starting(listener: socket.socket, *, keep_alive: int) -> Iterator[None]:
    """Answers from a thread that the server is not ready, while it makes itself so.

    Connections that come after the block wait for `serve`.

    Args:
        listener: from `bind`; it stays open.
        keep_alive: seconds after which a connection without a request is closed.

    Raises:
        ValueError: another program listens at the address since it was taken.
    """
    app = make_starting_app()
    config = _config(app, keep_alive=keep_alive, last_seconds=_LAST_SECONDS)
    _listen(listener, config.backlog)
    server = uvicorn.Server(config)
    # It closes what it is given.
    own = listener.dup()
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [own]}, name="starting", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """A server whose end is that of its engine, and that lets answers end before it does."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        *,
        on_ready: Callable[[], None],
        drain: float,
    ):
        """Takes the engine that the answers come from."""
        super().__init__(config)
        self._engine = engine
        self._on_ready = on_ready
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Tells whether to end, which an engine without a device can only do."""
        return await super().on_tick(counter) or self._engine.is_closed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the server: in peace after SIGTERM, at once after another signal or a second one."""
        if self.should_exit or sig != signal.SIGTERM:
            self._drain = 0
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server after a signal."""
        self._engine.refuse_more()
        end = asyncio.create_task(self._end_engine())
        await super().shutdown(sockets)
        await end

    async def _end_engine(self) -> None:
        """Ends the engine once its answers are complete, or the time for them is over."""
        start = time.monotonic()
        while (
            self._engine.has_work
            and not self._engine.is_stalled
            and time.monotonic() - start < self._drain
        ):
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.to_thread(self._engine.close)


def serve(
    app: Starlette,
    engine: Engine,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    drain: float,
    keep_alive: int,
) -> None:
    """Answers at an address until a signal, or an error of the engine, ends it.

    Args:
        app: from `make_app`.
        engine: the application's.
        listener: from `bind`, also after `starting`; it is closed at the end.
        on_ready: called when clients are answered.
        drain: seconds that SIGTERM leaves to answers which have begun.
        keep_alive: seconds after which a connection without a request is closed.

    Raises:
        ValueError: another program listens at the address since it was taken.
        Exception: what ended the engine.
    """
    config = _config(
        app, keep_alive=keep_alive, last_seconds=round(drain) + _LAST_SECONDS
    )
    with contextlib.closing(listener):
        _listen(listener, config.backlog)
        server = _Server(config, engine, on_ready=on_ready, drain=drain)
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure
