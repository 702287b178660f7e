"""How long a connection may be without a whole request, and how many there may be; no clock."""

import asyncio
import functools
import json

import pytest

pytest.importorskip("uvicorn", reason="the extra server is not installed")

import uvicorn
from uvicorn.server import ServerState

from rwkv7_jax.serving import connections
from rwkv7_jax.serving.connections import Connection, most_connections

HEAD = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"

KEEP_ALIVE = 75
HEAD_SECONDS = 30
READ_SECONDS = 60


class Timer:
    """A call that a test makes."""

    def __init__(self, seconds, call):
        self.seconds = seconds
        self.call = call
        self.is_set = True

    def cancel(self):
        self.is_set = False


class Loop:
    """A loop whose time does not pass."""

    def __init__(self):
        self.create_task = asyncio.get_running_loop().create_task
        self.timers = []

    def call_later(self, seconds, call, *arguments):
        call = functools.partial(call, *arguments)
        self.timers.append(Timer(seconds, call))
        return self.timers[-1]

    def waiting(self):
        return [timer.seconds for timer in self.timers if timer.is_set]

    def fire(self):
        (timer,) = [timer for timer in self.timers if timer.is_set]
        timer.is_set = False
        timer.call()


class Line(asyncio.Transport):
    """A client's end of a connection."""

    def __init__(self):
        super().__init__()
        self.received = b""
        self.closed = False
        self.aborted = False
        self.unsent = 0
        self.limit = None

    def write(self, data):
        self.received += data

    def set_write_buffer_limits(self, high=None, low=None):
        self.limit = high

    def get_write_buffer_size(self):
        return self.unsent

    def abort(self):
        self.aborted = True

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def answer(scope, receive, send):
    """Answers without the body of the request."""
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def connect(state=None):
    """Opens a connection; returns it with its line and its loop."""
    config = uvicorn.Config(
        answer, http=Connection, ws="none", timeout_keep_alive=KEEP_ALIVE
    )
    loop = Loop()
    one = Connection(config, state or ServerState(), {}, _loop=loop)
    line = Line()
    one.connection_made(line)
    return one, line, loop


async def rest():
    """Lets the tasks of answers run."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario):
    """Runs a scenario in a loop of its own."""
    asyncio.run(scenario())


def error_of(line):
    head, _, body = line.received.partition(b"\r\n\r\n")
    assert b"X-Request-Id: " in head and b"Connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_client_that_says_nothing_is_left_after_the_time_between_requests():
    async def scenario():
        one, line, loop = connect()
        assert loop.waiting() == [KEEP_ALIVE]
        loop.fire()
        assert line.closed and not line.received
        one.connection_lost(None)
        assert not loop.waiting()

    run(scenario)


def test_a_head_that_comes_byte_by_byte_has_one_time_for_all_bytes():
    async def scenario():
        one, line, loop = connect()
        for byte in GET[:-1]:
            one.data_received(bytes([byte]))
            assert loop.waiting() == [HEAD_SECONDS]
        loop.fire()
        assert line.closed
        status, error = error_of(line)
        assert status == 408 and "within 30 seconds" in error["message"]

    run(scenario)


def test_a_head_in_time_is_answered_and_the_next_one_has_a_time_of_its_own():
    async def scenario():
        one, line, loop = connect()
        for _ in range(2):
            one.data_received(GET[:9])
            assert loop.waiting() == [HEAD_SECONDS]
            one.data_received(GET[9:])
            assert loop.waiting() == []
            await rest()
            assert loop.waiting() == [KEEP_ALIVE]
        assert line.received.count(b"200 OK") == 2 and not line.closed

    run(scenario)


def test_requests_that_come_together_are_answered():
    async def scenario():
        one, line, loop = connect()
        one.data_received(GET + GET + GET[:5])
        await rest()
        assert line.received.count(b"200 OK") == 2
        assert loop.waiting() == [KEEP_ALIVE]
        one.data_received(GET[5:9])
        assert loop.waiting() == [HEAD_SECONDS]

    run(scenario)


def test_a_body_that_nobody_waits_for_has_a_time_too():
    async def scenario():
        one, line, loop = connect()
        one.data_received(HEAD)
        await rest()
        assert b"200 OK" in line.received
        for _ in range(3):
            one.data_received(b"a")
            assert loop.waiting() == [HEAD_SECONDS]
        sent = line.received
        loop.fire()
        assert line.closed and line.received == sent

    run(scenario)


def test_after_a_body_that_nobody_waited_for_the_next_request_may_come():
    async def scenario():
        one, line, loop = connect()
        one.data_received(HEAD)
        await rest()
        one.data_received(b"a" * 4)
        one.data_received(b"a" * 5)
        assert loop.waiting() == [KEEP_ALIVE]
        one.data_received(GET)
        await rest()
        assert line.received.count(b"200 OK") == 2 and not line.closed

    run(scenario)


def test_what_is_no_request_is_told_in_the_form_of_all_errors():
    async def scenario():
        one, line, loop = connect()
        one.data_received(b"\x16\x03\x01 tls\r\n\r\n")
        assert line.closed and not loop.waiting() == [HEAD_SECONDS]
        status, error = error_of(line)
        assert (status, error["type"]) == (400, "invalid_request_error")

    run(scenario)


def test_an_invalid_rest_of_an_answered_body_ends_the_connection():
    async def scenario():
        one, line, _ = connect()
        one.data_received(CHUNKED)
        await rest()
        assert b"200 OK" in line.received
        sent = line.received
        one.data_received(b"no size\r\n")
        assert line.closed and line.received == sent

    run(scenario)


def test_an_invalid_body_that_is_not_answered_yet_is_rejected():
    async def scenario():
        one, line, _ = connect()
        one.data_received(CHUNKED + b"no size\r\n")
        await rest()
        assert line.closed and error_of(line)[0] == 400

    run(scenario)


def test_connections_beyond_the_limit_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(connections, "most_connections", lambda: 2)

    async def scenario():
        state = ServerState()
        first, _, _ = connect(state)
        _, second, _ = connect(state)
        _, line, loop = connect(state)
        assert line.closed and not loop.waiting() and not second.closed
        status, error = error_of(line)
        assert (status, error["code"]) == (503, "too_busy")
        assert b"Retry-After: 1" in line.received
        # The one that was refused leaves, and so does the first.
        state.connections -= {
            first,
            *[one for one in state.connections if one.transport is line],
        }
        _, fourth, _ = connect(state)
        assert not fourth.closed

    run(scenario)


def test_a_client_that_reads_nothing_is_left():
    async def scenario():
        one, line, loop = connect()
        # Any unsent data counts, because a connection that closes waits until it is read.
        assert line.limit == 0
        one.data_received(GET)
        assert not loop.waiting()
        line.unsent = 9
        one.pause_writing()
        await rest()
        # The answer waits for the client.
        assert loop.waiting() == [READ_SECONDS] and not line.received
        loop.fire()
        assert line.aborted
        one.connection_lost(None)
        await rest()
        assert not loop.waiting() and not line.received

    run(scenario)


def test_a_client_that_reads_slowly_gets_its_whole_answer():
    async def scenario():
        one, line, loop = connect()
        one.data_received(GET)
        line.unsent = 9
        one.pause_writing()
        for left in (8, 1):
            line.unsent = left
            loop.fire()
            assert loop.waiting() == [READ_SECONDS] and not line.aborted
        one.resume_writing()
        assert not loop.waiting()
        await rest()
        assert b"200 OK" in line.received and loop.waiting() == [KEEP_ALIVE]

    run(scenario)


def test_an_answer_that_is_not_read_ends_with_its_connection():
    async def scenario():
        one, line, loop = connect()
        one.data_received(GET)
        await rest()
        line.unsent = 9
        one.pause_writing()
        assert sorted(loop.waiting()) == [READ_SECONDS, KEEP_ALIVE]
        one.connection_lost(ConnectionResetError())
        assert not loop.waiting() and not line.aborted

    run(scenario)


@pytest.mark.parametrize(
    ("files", "most"), [(1024, 896), (100, 1), (10**6, 4096), (-1, 4096)]
)
def test_connections_leave_files_for_the_rest(monkeypatch, files, most):
    monkeypatch.setattr(connections.resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (files, files))
    assert most_connections() == most
