"""The HTTP server of an application: address, signals and shutdown."""

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
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rwkv7_jax.serving.access import LIVE
from rwkv7_jax.serving.connections import Connection
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.fields import Refused
from rwkv7_jax.serving.request_log import RequestLog

# Seconds that a stopping server waits for slow clients to read their last events.
_LAST_SECONDS = 5

# Seconds after which a client may retry while the model loads.
_RETRY_SECONDS = "5"

# Seconds between two checks whether the last answers are complete.
_CHECK_SECONDS = 0.05


def bind(host: str, port: int) -> socket.socket:
    """Listens on an address; clients wait until `starting` or `serve` answers them.

    Args:
        host: the address.
        port: the port; 0 for a free one.

    Raises:
        OSError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(
        (host, port),
        family=family,
        # "::" also stands for the addresses of IPv4.
        dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
    )


def _config(app: Starlette, *, keep_alive: int, last_seconds: int) -> uvicorn.Config:
    """Returns the settings of a server.

    Args:
        app: the application.
        keep_alive: the seconds after which an idle connection is closed.
        last_seconds: the seconds that a stopping server waits for its answers.
    """
    return uvicorn.Config(
        app,
        log_level="warning",
        # The default would close the logging handlers of the process and their streams.
        log_config=None,
        access_log=False,
        server_header=False,
        # Based on h11: httptools does not limit the size of headers.
        http=Connection,
        ws="none",
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=last_seconds,
    )


async def _live(request: Request) -> Response:
    del request
    return JSONResponse({"status": "starting"})


async def _not_ready(request: Request, error: Exception) -> Response:
    del request, error
    refused = Refused(
        "the model is still loading; try again later.", status=503, code="starting"
    )
    headers = {"Retry-After": _RETRY_SECONDS}
    return JSONResponse(refused.body(), refused.status, headers=headers)


@contextlib.contextmanager
def starting(listener: socket.socket, *, keep_alive: int) -> Iterator[None]:
    """Answers from a thread that the server is not ready, until the block ends.

    Connections after the block wait for `serve`.

    Args:
        listener: the socket, from `bind`; it stays open.
        keep_alive: the seconds after which an idle connection is closed.
    """
    app = Starlette(
        routes=[Route(LIVE, _live)],
        exception_handlers={404: _not_ready, 405: _not_ready},
        middleware=[Middleware(RequestLog, stream=None)],
    )
    config = _config(app, keep_alive=keep_alive, last_seconds=_LAST_SECONDS)
    server = uvicorn.Server(config)
    # The server closes the socket that it is given.
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
    """A server that ends with its engine, and that completes answers before it shuts down."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        *,
        on_ready: Callable[[], None],
        drain: float,
    ):
        """Stores the engine of the application; see `serve` for the other arguments."""
        super().__init__(config)
        self._engine = engine
        self._on_ready = on_ready
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to serve, then calls `on_ready`."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to shut down, which a closed engine also requires."""
        return await super().on_tick(counter) or self._engine.is_closed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shuts down: gracefully after SIGTERM, at once after another signal or a second one."""
        if self.should_exit or sig != signal.SIGTERM:
            self._drain = 0
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the engine and the server after a signal."""
        self._engine.refuse_more()
        end = asyncio.create_task(self._end_engine())
        await super().shutdown(sockets)
        await end

    async def _end_engine(self) -> None:
        """Ends the engine once its answers are complete or the drain time is over."""
        start = time.monotonic()
        while (
            self._engine.has_work
            and not self._engine.is_stalled
            and time.monotonic() - start < self._drain
        ):
            await asyncio.sleep(_CHECK_SECONDS)
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
    """Serves an application until a signal or an error of the engine ends it.

    Args:
        app: the application, from `make_app`.
        engine: the engine of the application.
        listener: the socket, from `bind`, also after `starting`; it is closed at the end.
        on_ready: called when clients can connect.
        drain: the seconds that open answers get to complete after SIGTERM.
        keep_alive: the seconds after which an idle connection is closed.

    Raises:
        Exception: the error that ended the engine.
    """
    config = _config(
        app, keep_alive=keep_alive, last_seconds=round(drain) + _LAST_SECONDS
    )
    with contextlib.closing(listener):
        server = _Server(config, engine, on_ready=on_ready, drain=drain)
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure
