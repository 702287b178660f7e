"""A server process: it binds its address early, and ends with its engine."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the extra server is not installed")

from starlette.applications import Starlette

from rwkv7_jax.serving import http_server
from rwkv7_jax.serving.app import make_app
from rwkv7_jax.serving.http_server import bind, serve, starting


class Lost:
    """An engine whose device is lost."""

    is_closed = True
    has_work = False
    is_stalled = False
    failure = IndexError("the device has gone")

    def refuse_more(self):
        pass

    def close(self):
        pass


def test_a_server_ends_with_the_error_of_its_engine():
    ready = []
    with pytest.raises(IndexError, match="the device has gone"):
        serve(
            Starlette(),
            Lost(),
            bind("127.0.0.1", 0),
            on_ready=lambda: ready.append(True),
            drain=30,
            keep_alive=5,
        )
    assert ready


def get(address, path):
    """Asks with a connection of its own; returns the status, the headers and the body."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=20)) as one:
        one.request("GET", path)
        answered = one.getresponse()
        return answered.status, answered.headers, json.load(answered)


def test_a_server_that_makes_itself_ready_says_so_and_then_serves(engine):
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()
    with starting(listener, keep_alive=60):
        status, _, body = get(address, "/live")
        assert (status, body) == (200, {"status": "starting"})
        for path in ("/health", "/v1/models", "/nothing"):
            status, headers, body = get(address, path)
            assert (status, headers["Retry-After"]) == (503, "5")
            assert headers["X-Request-Id"]
            assert body["error"]["code"] == "starting"
    # A client that comes between the two waits.
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as early:
        early.request("GET", "/health")
        with served(engine, listener=listener):
            assert early.getresponse().status == 200
            assert get(address, "/live")[0] == 200


def test_a_server_that_cannot_make_itself_ready_leaves_its_address():
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()
    with listener, pytest.raises(IndexError), starting(listener, keep_alive=60):
        raise IndexError
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_a_second_server_cannot_bind_an_address():
    with bind("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_a_server_on_all_addresses_of_ipv6_also_has_those_of_ipv4():
    try:
        listener = bind("::", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@contextlib.contextmanager
def served(engine, *, keep_alive=60, listener=None):
    """Serves an engine from a thread; the engine's end is the server's."""
    listener = listener or bind("127.0.0.1", 0)
    address = listener.getsockname()
    ready = threading.Event()

    def work():
        serve(
            make_app(engine, name="base"),
            engine,
            listener,
            on_ready=ready.set,
            drain=30,
            keep_alive=keep_alive,
        )

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    try:
        yield address
    finally:
        engine.close()
        thread.join(60)
        assert not thread.is_alive()


def test_a_body_that_never_ends_does_not_delay_the_shutdown(engine):
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(served(engine))
        client = stack.enter_context(socket.create_connection(address, timeout=60))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
        )
        # The server has begun to read it.
        time.sleep(0.5)
        engine.close()
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    assert time.monotonic() - began < 20


def test_a_body_that_takes_too_long_is_rejected(engine, monkeypatch):
    monkeypatch.setattr("rwkv7_jax.serving.call_bodies._SECONDS", 0.5)
    with (
        served(engine) as address,
        socket.create_connection(address, timeout=20) as client,
    ):
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
        )
        received = b""
        # To the end: the server closes the connection.
        while part := client.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 408 ")


def test_a_connection_without_a_request_is_closed_after_its_time(engine, monkeypatch):
    named = {}
    make = http_server.uvicorn.Config

    def note(*arguments, **settings):
        named.update(settings)
        return make(*arguments, **settings)

    monkeypatch.setattr(http_server.uvicorn, "Config", note)
    asks = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    with (
        served(engine, keep_alive=1) as address,
        socket.create_connection(address, timeout=20) as client,
    ):
        client.sendall(asks)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        while client.recv(1000):
            pass
    # uvicorn's own time is five seconds.
    assert named["timeout_keep_alive"] == 1
