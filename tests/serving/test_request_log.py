"""The request log: one line per request, with the id that its answer also has."""

import datetime
import io
import json

import pytest
from asgi_client import Client

pytest.importorskip("starlette", reason="the extra server is not installed")

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from rwkv7_jax.serving.app import make_app
from rwkv7_jax.serving.request_log import RequestLog


async def answer(request):
    return JSONResponse({}, int(request.path_params["status"]))


async def fail(request):
    raise RuntimeError("secret")


async def stream(request):
    async def parts():
        yield "a"
        # The client disconnects meanwhile.
        while not await request.is_disconnected():
            yield "b"

    return StreamingResponse(parts())


ROUTES = Starlette(
    routes=[
        Route("/health", lambda request: JSONResponse({})),
        Route("/status/{status}", answer, methods=["GET", "POST"]),
        Route("/fail", fail),
        Route("/stream", stream),
    ]
)


class Log(io.StringIO):
    """A stream of lines."""

    def lines(self):
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def client(log):
    return Client(RequestLog(ROUTES, log))


def test_a_request_is_a_line_with_the_id_of_its_answer(client, log):
    answers = [client.get("/status/200"), client.post("/status/429", {})]
    for line, answered in zip(log.lines(), answers, strict=True):
        assert line["id"] == answered.headers["x-request-id"]
        assert line["status"] == answered.status_code
        assert 0 <= line["seconds"] < 60
        then = datetime.datetime.fromisoformat(line["time"])
        assert then.utcoffset() == datetime.timedelta(0)
    first, second = log.lines()
    assert (first["method"], first["path"]) == ("GET", "/status/200")
    assert (second["method"], second["path"]) == ("POST", "/status/429")
    assert first["id"] != second["id"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a-B_c.9:/+=", True), ("", False), ('a"b', False), ("a" * 129, False)],
)
def test_the_request_id_of_a_proxy_is_kept(client, log, given, kept):
    answered = client.get("/status/200", x_request_id=given)
    (line,) = log.lines()
    assert line["id"] == answered.headers["x-request-id"]
    assert (line["id"] == given) == kept


def test_a_disconnect_and_an_error_have_their_status(client, log):
    client.request("GET", "/stream", leaves=True)
    client.get("/fail")
    assert [line["status"] for line in log.lines()] == [499, 500]


def test_probes_are_logged_only_if_they_fail(log):
    Client(RequestLog(ROUTES, log)).get("/health")
    assert not log.lines()
    Client(RequestLog(Starlette(), log)).get("/health")
    assert [line["status"] for line in log.lines()] == [404]


def test_a_closed_log_does_not_prevent_an_answer(log):
    log.close()
    assert Client(RequestLog(ROUTES, log)).get("/status/200").status_code == 200


def test_requests_have_ids_with_and_without_a_log(engine, log):
    for stream in (None, log):
        app = make_app(engine, name="base", key="secret", request_log=stream)
        refused = Client(app).get("/v1/models", x_request_id="one")
        assert (refused.status_code, refused.headers["x-request-id"]) == (401, "one")
    assert [line["status"] for line in log.lines()] == [401]
