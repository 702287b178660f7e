"""Access: clients need the key if there is one; without a key, other sites' pages are rejected."""

import dataclasses

import pytest
from asgi_client import Client
from served_bytes import BYTES

pytest.importorskip("starlette", reason="the extra server is not installed")

from rwkv7_jax.serving.app import make_app


@dataclasses.dataclass
class Silent:
    """An engine that must not receive a request."""

    tokenizer = BYTES
    state_names = ("poet",)
    longest_answer = 500
    is_stalled = False
    most_waiting = 8
    is_open = True
    longest_prompt = 2000
    decoding = 0
    waiting = 0


ADDRESSES = ("/v1/models", "/v1/states", "/metrics", "/nothing")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://evil.example:8000",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://[evil",
        "https://a.example:1",
        "null",
    ],
)
def test_pages_of_other_sites_are_rejected_without_a_key(origin):
    client = Client(make_app(Silent(), name="base", origins=["https://a.example"]))
    for address in ADDRESSES:
        refused = client.get(address, origin=origin)
        assert refused.status_code == 403
        assert "`Origin`" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers
    body = b'{"prompt": "hi"}'
    headers = {"origin": origin, "content_type": "text/plain"}
    refused = client.request("POST", "/v1/completions", body, headers=headers)
    assert refused.status_code == 403
    assert client.get("/health", origin=origin).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example",
        "http://localhost:5173",
        "http://127.0.0.1:3000",
        "http://[::1]:3000",
        "vscode-webview://abc",
        "chrome-extension://abc",
    ],
)
def test_programs_and_pages_of_this_machine_are_answered(origin):
    app = make_app(Silent(), name="base", origins=["https://a.example"], hosts=())
    assert Client(app).get("/v1/models", origin=origin).status_code == 200


@pytest.mark.parametrize("sharing", [{"origins": ["*"]}, {"key": "secret"}])
def test_any_page_is_answered_if_all_origins_are_allowed_or_it_has_the_key(sharing):
    client = Client(make_app(Silent(), name="base", hosts=(), **sharing))
    answered = client.get(
        "/v1/models",
        origin="https://evil.example",
        host="evil.example",
        authorization="Bearer secret",
    )
    assert answered.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhos", "["])
def test_an_unknown_host_name_is_rejected_if_host_names_are_set(host):
    app = make_app(Silent(), name="base", hosts=["models.example"])
    refused = Client(app).get("/v1/models", host=host)
    assert refused.status_code == 403
    assert "`Host`" in refused.json()["error"]["message"]
    assert Client(app).get("/health", host=host).status_code == 200
    app = make_app(Silent(), name="base")
    assert Client(app).get("/v1/models", host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.:8000",
        "me.localhost",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.0.7",
        "models.example:80",
    ],
)
def test_names_of_this_machine_and_of_its_proxy_are_answered(host):
    app = make_app(Silent(), name="base", hosts=["models.example"])
    assert Client(app).get("/v1/models", host=host).status_code == 200


def test_a_client_without_a_host_header_is_answered():
    app = make_app(Silent(), name="base", hosts=())
    assert Client(app).get("/v1/models").status_code == 200


@pytest.mark.parametrize("sent", ["", "secre", "secret ", "Bearer", "secr\u00e8t"])
def test_without_the_key_a_server_only_reports_its_health(sent):
    client = Client(make_app(Silent(), name="base", key="secret"))
    assert client.get("/health").status_code == 200
    assert client.get("/live").status_code == 200
    for address in ("/v1/models", "/v1/states", "/nothing"):
        refused = client.get(address, authorization=f"Bearer {sent}")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    assert client.post("/v1/completions", {"prompt": "a"}).status_code == 401
    found = client.get("/v1/models", authorization="Bearer secret")
    assert found.status_code == 200


def test_a_browser_may_read_answers_on_pages_of_allowed_origins():
    page = "https://a.example"
    app = make_app(Silent(), name="base", key="secret", origins=[page])
    client = Client(app)
    asks = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
    }
    address = "/v1/completions"
    asked = client.request("OPTIONS", address, headers=asks | {"origin": page})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == page
    other = {"origin": "https://b.example"}
    assert client.request("OPTIONS", address, headers=asks | other).status_code == 400
    # A page must be able to read why it was refused.
    refused = client.get("/v1/models", origin=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == page


def test_a_page_may_read_that_the_server_failed(monkeypatch):
    page = "https://a.example"
    engine = Silent()
    monkeypatch.setattr(
        Silent, "state_names", property(lambda self: [][0]), raising=False
    )
    client = Client(make_app(engine, name="base", origins=[page]))
    failed = client.get("/v1/models", origin=page)
    assert failed.status_code == 500
    assert failed.headers["access-control-allow-origin"] == page
    assert failed.headers["x-request-id"]
