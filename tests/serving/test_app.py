"""What clients get: whole answers, streams and errors, from an engine with fixed answers."""

import asyncio
import contextlib
import dataclasses
import json
import sys
import threading
import time

import pytest
from asgi_client import Client

from rwkv7_jax.serving.requests import (
    Answer,
    Closed,
    Piece,
    TokenScore,
    TooBusy,
    TooLong,
)
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("starlette", reason="the extra server is not installed")

from rwkv7_jax.serving import app as serving_app

BYTES = Tokenizer.bytes()


@dataclasses.dataclass
class Ticket:
    """Records whether the client still waits."""

    cancelled: threading.Event

    def cancel(self):
        self.cancelled.set()


class Script:
    """An engine that sends the same pieces to every client, from its own thread."""

    tokenizer = BYTES
    state_names = ("poet", "judge")
    longest_answer = 500
    most_waiting = 8
    is_open = True
    is_stalled = False
    longest_prompt = 2000
    decoding = 3
    waiting = 2

    def __init__(self, pieces=("", "H\u00e4", "", "llo \U0001f600"), ended="length"):
        self.pieces = [piece for piece in pieces if piece]
        self.ended = ended
        self.scores = ()
        self.refusal = None
        # Requests before the one that is refused.
        self.accepted = 0
        self.pause = 0
        self.failing = None
        self.waits = False
        self.requests = []
        self.cancelled = threading.Event()
        self.is_running = False

    def start(self):
        self.is_running = True

    def close(self):
        self.is_running = False
        self.cancelled.set()

    def submit(self, request, *, on_piece, on_end):
        if self.refusal and len(self.requests) >= self.accepted:
            raise self.refusal
        index = len(self.requests)
        self.requests.append(request)
        ended = "failed" if index == self.failing else self.ended

        def say(ended=ended):
            time.sleep(self.pause)
            for piece in self.pieces:
                with contextlib.suppress(RuntimeError):
                    on_piece(Piece(piece, self.scores[:1]))
            if self.waits:
                self.cancelled.wait(30)
                ended = "cancelled"
            text = "".join(self.pieces)
            error = "a reason" if ended == "failed" else None
            # The client's loop may have ended; the engine passes over such an error, too.
            with contextlib.suppress(RuntimeError):
                on_end(
                    Answer(
                        text,
                        (1, 2, 3),
                        ended,
                        prompt_tokens=len(request.prompt),
                        cached_tokens=2,
                        scores=self.scores,
                        error=error,
                    )
                )

        threading.Thread(target=say).start()
        return Ticket(self.cancelled)


@pytest.fixture
def engine():
    return Script()


@pytest.fixture
def client(engine):
    return Client(serving_app.make_app(engine, name="base"))


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def events(response):
    """The objects of a stream; [DONE] as a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    found = []
    for line in lines:
        text = line.removeprefix("data: ")
        found.append(text if text == "[DONE]" else json.loads(text))
    return found


def test_a_message_is_answered(client, engine):
    body = client.post("/v1/chat/completions", CHAT).json()
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "H\u00e4llo \U0001f600",
    }
    assert (choice["finish_reason"], body["object"]) == ("length", "chat.completion")
    (request,) = engine.requests
    assert BYTES.decode(request.prompt) == "User: hi\n\nAssistant:"
    assert request.stop_strings == ("\n\nUser:",)
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": 3,
        "total_tokens": len(request.prompt) + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert body["model"] == "base" and body["id"].startswith("chatcmpl-")


def test_a_text_is_continued(client, engine):
    engine.ended = "stop_string"
    body = client.post("/v1/completions", TEXT | {"stop": "x"}).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (
        "H\u00e4llo \U0001f600",
        "stop",
    )
    assert (body["object"], choice["logprobs"]) == ("text_completion", None)
    assert BYTES.decode(engine.requests[0].prompt) == "hi"
    assert engine.requests[0].stop_strings == ("x",)


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_follows_the_interface(client, usage):
    more = {"stream": True, "stream_options": {"include_usage": usage}}
    chat = events(client.post("/v1/chat/completions", CHAT | more))
    text = events(client.post("/v1/completions", TEXT | more))
    for found in (chat, text):
        assert found.pop() == "[DONE]"
        if usage:
            last = found.pop()
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
        assert len({event["id"] for event in found}) == 1
        reasons = [event["choices"][0]["finish_reason"] for event in found]
        assert reasons == [None] * (len(found) - 1) + ["length"]
    deltas = [event["choices"][0]["delta"] for event in chat]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == "H\u00e4llo \U0001f600"
    assert "".join(e["choices"][0]["text"] for e in text) == "H\u00e4llo \U0001f600"


@pytest.mark.parametrize("pieces", [(" ", "a"), (" a",), ("a",), ()])
def test_the_space_after_the_role_is_not_sent(client, engine, pieces):
    engine.pieces = list(pieces)
    whole = client.post("/v1/chat/completions", CHAT).json()
    expected = "a" * bool(pieces)
    assert whole["choices"][0]["message"]["content"] == expected
    found = events(client.post("/v1/chat/completions", CHAT | {"stream": True}))
    deltas = [event["choices"][0]["delta"] for event in found[:-1]]
    assert "".join(d.get("content", "") for d in deltas) == expected


def test_a_message_may_have_a_thought_and_a_call(client, engine):
    engine.pieces = [">x</th", 'ink>a\n```json\n{"name":', '"f"}\n```']
    engine.ended = "stop_id"
    body = CHAT | {"think": "free", "tools": [{"function": {"name": "f"}}]}
    (choice,) = client.post("/v1/chat/completions", body).json()["choices"]
    (call,) = choice["message"].pop("tool_calls")
    message = {"role": "assistant", "reasoning_content": "x", "content": "a"}
    assert (choice["message"], choice["finish_reason"]) == (message, "tool_calls")
    assert call["function"] == {"name": "f", "arguments": "{}"}
    found = events(client.post("/v1/chat/completions", body | {"stream": True}))
    names = [name for event in found[1:-2] for name in event["choices"][0]["delta"]]
    assert names == ["reasoning_content", "content", "tool_calls"]


def streamed(found):
    """The texts and the ends of a stream's answers, by number."""
    texts = {}
    ends = {}
    for event in found:
        for choice in event["choices"]:
            index = choice["index"]
            piece = choice.get("delta", {}).get("content", choice.get("text", ""))
            texts[index] = texts.get(index, "") + (piece or "")
            if choice["finish_reason"]:
                assert index not in ends
                ends[index] = choice["finish_reason"]
    return texts, ends


def test_several_answers_have_numbers_and_their_prompts_count_once(client, engine):
    said = "H\u00e4llo \U0001f600"
    for address, body in (
        ("/v1/chat/completions", CHAT | {"n": 4}),
        ("/v1/completions", {"prompt": ["hi", "you"], "n": 2}),
    ):
        engine.requests.clear()
        whole = client.post(address, body).json()
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        prompts = {request.prompt for request in engine.requests}
        numbers = whole["usage"]
        assert numbers["prompt_tokens"] == sum(map(len, prompts))
        assert numbers["completion_tokens"] == 12
        assert numbers["prompt_tokens_details"]["cached_tokens"] == 2 * len(prompts)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *found, last, end = events(client.post(address, body | options))
        assert end == "[DONE]" and last["usage"] == numbers
        texts, ends = streamed(found)
        assert texts == dict.fromkeys(range(4), said)
        assert ends == dict.fromkeys(range(4), "length")


def test_scores_follow_the_interface(client, engine):
    # An "a", the first of two bytes of a letter, and the id that ends texts.
    likely = ((98, -0.5), (0xC3 + 1, -1.5), (0, -2.5))
    engine.scores = (TokenScore(98, -0.5, likely),)
    names = ["a", "bytes:\\xc3", "token_id:0"]
    spellings = [[97], [0xC3], []]
    entries = []
    for (_, logp), name, spelling in zip(likely, names, spellings, strict=True):
        entries.append({"token": name, "logprob": logp, "bytes": spelling})
    chat = {"content": [entries[0] | {"top_logprobs": entries}], "refusal": None}
    text = {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [dict(zip(names, (-0.5, -1.5, -2.5), strict=True))],
        "text_offset": [0],
    }
    for address, expected in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", text),
    ):
        (choice,) = client.post(address, BODIES[address]).json()["choices"]
        assert choice["logprobs"] == expected
        found = events(client.post(address, BODIES[address] | {"stream": True}))
        scored = [event["choices"][0]["logprobs"] for event in found[:-1]]
        scored = [one for one in scored if one]
        pieces = len(engine.pieces)
        if "text_offset" in expected:
            offsets = [one.pop("text_offset") for one in scored]
            assert offsets == [[place] for place in range(pieces)]
            expected.pop("text_offset")
        assert scored == [expected] * pieces


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_all_arrive_or_none_do(client, engine, stream):
    engine.failing = 1
    body = CHAT | {"n": 3, "stream": stream}
    response = client.post("/v1/chat/completions", body)
    last = events(response)[-1] if stream else response.json()
    assert last["error"]["message"] == "the answer failed: a reason."
    engine.requests.clear()
    engine.refusal = TooBusy("the queue is full; try again later.")
    engine.accepted = 2
    response = client.post("/v1/chat/completions", body)
    assert response.status_code == 429 and len(engine.requests) == 2
    assert engine.cancelled.is_set()


def test_served_models_are_listed(client, engine):
    names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert names == ["base", "base:poet", "base:judge"]
    for name in (*names, "rwkv:poet"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    missing = client.get("/v1/models/base:nobody")
    assert missing.status_code == 404
    assert "(poet, judge)" in missing.json()["error"]["message"]
    states = [entry["id"] for entry in client.get("/v1/states").json()["data"]]
    assert states == ["poet", "judge"]
    assert client.get("/health").json() == {"status": "ok"}
    engine.is_open = False
    assert client.get("/health").status_code == 503
    # It ends in peace: nothing is won by killing it.
    assert client.get("/live").json() == {"status": "ok"}


def test_a_device_that_does_not_answer_is_no_health(client, engine):
    engine.is_stalled = True
    for answered in (
        client.get("/health"),
        client.get("/live"),
        client.post("/v1/completions", TEXT),
    ):
        assert answered.status_code == 503
        assert answered.json()["error"]["code"] == "stalled"
    assert client.get("/v1/models").status_code == 200
    assert not engine.requests


@pytest.mark.parametrize("address", BODIES)
@pytest.mark.parametrize(
    ("refusal", "status", "error"),
    [
        (
            TooBusy("the queue is full; try again later."),
            429,
            {"code": "too_busy", "message": "the queue is full; try again later."},
        ),
        (
            Closed("the engine accepts no more requests."),
            503,
            {"message": "the server is shutting down."},
        ),
        (
            ValueError("submit: `tokens` must be at least 1; got 0."),
            400,
            {
                "param": "max_tokens",
                "message": "`max_tokens` must be at least 1; got 0.",
            },
        ),
        (
            TooLong("submit: the length of `prompt` must be at most 9; got 10."),
            400,
            {"code": "context_length_exceeded"},
        ),
        (RuntimeError("secret"), 500, {"message": "the server failed: RuntimeError."}),
    ],
)
def test_a_request_that_the_engine_rejects_gets_its_reason(
    client, engine, address, refusal, status, error
):
    engine.refusal = refusal
    response = client.post(address, BODIES[address])
    assert response.status_code == status
    assert response.json()["error"].items() >= error.items()
    assert ("retry-after" in response.headers) == (status == 429)
    assert response.headers["x-request-id"]
    if isinstance(refusal, TooLong):
        field = "messages" if "chat" in address else "prompt"
        assert response.json()["error"]["param"] == field
        assert f"`{field}` must be at most" in response.json()["error"]["message"]


@pytest.mark.parametrize("address", BODIES)
@pytest.mark.parametrize(
    ("ended", "status", "sentence"),
    [
        ("failed", 500, "the answer failed: a reason."),
        ("cancelled", 503, "the server is shutting down."),
    ],
)
def test_a_failed_or_cancelled_answer_is_an_error(
    client, engine, address, ended, status, sentence
):
    engine.ended = ended
    response = client.post(address, BODIES[address])
    assert response.status_code == status
    assert response.json()["error"]["message"] == sentence
    found = events(client.post(address, BODIES[address] | {"stream": True}))
    assert found[-1]["error"]["message"] == sentence


@pytest.mark.parametrize(
    ("method", "address", "data", "status", "sentence"),
    [
        ("GET", "/v1/nothing", b"", 404, "GET /v1/nothing: Not Found."),
        (
            "GET",
            "/v1/completions",
            b"",
            405,
            "GET /v1/completions: Method Not Allowed.",
        ),
        ("POST", "/v1/completions", b"{", 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"\xff", 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[]", 400, "must be an object; got a list."),
        ("POST", "/v1/completions", b" " * (2**24 + 1), 413, "at most 16,777,216"),
    ],
)
def test_an_invalid_request_gets_an_error_object(
    client, method, address, data, status, sentence
):
    response = client.request(method, address, data)
    assert response.status_code == status
    assert sentence in response.json()["error"]["message"]


def test_an_operator_sees_load_and_counts(client, engine):
    client.post("/v1/completions", TEXT | {"n": 2})
    client.post("/v1/chat/completions", CHAT | {"stream": True})
    engine.ended = "failed"
    client.post("/v1/completions", TEXT)
    engine.refusal = TooBusy("the queue is full; try again later.")
    client.post("/v1/completions", TEXT)
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = response.text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    prompts = sum(len(request.prompt) for request in engine.requests)
    expected = {
        "rwkv7_requests_decoding": 3,
        "rwkv7_requests_waiting": 2,
        'rwkv7_requests_total{ended="length"}': 3,
        'rwkv7_requests_total{ended="failed"}': 1,
        'rwkv7_requests_total{ended="refused"}': 1,
        # Of a series that begins with its first failure, a rate would miss that one.
        'rwkv7_requests_total{ended="cancelled"}': 0,
        "rwkv7_prompt_tokens_total": prompts,
        "rwkv7_cached_tokens_total": 8,
        "rwkv7_answer_tokens_total": 12,
        "rwkv7_first_text_seconds_count": 4,
        "rwkv7_answer_seconds_count": 4,
    }
    assert {name: float(values[name]) for name in expected} == expected
    if sys.platform == "linux":
        assert float(values["process_resident_memory_bytes"]) > 2**20


@pytest.mark.parametrize("address", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_is_no_longer_answered(engine, address, stream):
    engine.waits = True
    app = serving_app.make_app(engine, name="base")
    data = json.dumps(BODIES[address] | {"stream": stream}).encode()
    Client(app).request("POST", address, data, leaves=True)
    assert engine.cancelled.wait(30)


def test_a_waiting_stream_sends_keep_alives(client, engine, monkeypatch):
    monkeypatch.setattr(serving_app, "_QUIET_SECONDS", 0.05)
    engine.pause = 0.2
    response = client.post("/v1/completions", TEXT | {"stream": True})
    first, *rest = response.text.split("\n\n")
    assert first == ": waiting"
    assert [line for line in rest if line and line[0] != ":"][-1] == "data: [DONE]"


@pytest.mark.parametrize("address", BODIES)
def test_a_client_that_disconnects_in_its_body_starts_no_request(
    engine, caplog, address
):
    app = serving_app.make_app(engine, name="base")
    Client(app).request("POST", address, b"{", leaves=True, is_whole=False)
    assert not engine.requests and not caplog.records


def test_states_are_looked_up_for_each_call(engine):
    def refresh():
        engine.state_names = (*engine.state_names, f"new{len(engine.state_names)}")

    app = serving_app.make_app(engine, name="base", refresh=refresh)
    client = Client(app)
    listed = [entry["id"] for entry in client.get("/v1/states").json()["data"]]
    assert listed == ["poet", "judge", "new2"]
    called = client.post("/v1/completions", TEXT | {"state": "new3"})
    assert called.status_code == 200 and engine.requests[0].state == "new3"
    assert client.get("/v1/models/base:new4").status_code == 200


def test_the_engine_runs_while_the_application_does(engine):
    app = serving_app.make_app(engine, name="base")

    async def live():
        async with app.router.lifespan_context(app):
            assert engine.is_running

    asyncio.run(live())
    assert not engine.is_running
