"""A process that serves: it takes its address early, and ends with its engine."""

import socket

import pytest

pytest.importorskip("starlette", reason="the extra server is not installed")

from starlette.applications import Starlette

from rwkv7_jax.serving.http_server import bind, serve


class Lost:
    """An engine whose device has gone."""

    is_closed = True
    has_work = False
    failure = IndexError("the device has gone")

    def refuse_more(self):
        pass

    def close(self):
        pass


def test_a_server_ends_with_its_engine_by_the_engine_s_error():
    ready = []
    with pytest.raises(IndexError, match="the device has gone"):
        serve(
            Starlette(),
            Lost(),
            bind("127.0.0.1", 0),
            on_ready=lambda: ready.append(True),
            drain=30,
        )
    assert ready


def test_an_address_that_was_taken_refuses_clients_until_it_is_served():
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConnectionRefusedError):
        socket.create_connection(taken.getsockname(), timeout=5)
