"""A client of an ASGI application in the same process, without a socket or a package."""

import asyncio
import json
from typing import NamedTuple


class Response(NamedTuple):
    """What an application sent.

    Attributes:
        status_code: of HTTP.
        headers: by name, in lower case.
        text: the body.
    """

    status_code: int
    headers: dict[str, str]
    text: str

    def json(self):
        """The body as JSON."""
        return json.loads(self.text)


class Client:
    """Makes requests, each in an event loop of its own."""

    def __init__(self, app):
        """Takes the application."""
        self._app = app

    def get(self, address, **headers):
        """Reads what lies at an address."""
        return self.request("GET", address, headers=headers)

    def post(self, address, body):
        """Sends an object."""
        return self.request("POST", address, json.dumps(body).encode())

    def request(
        self, method, address, content=b"", *, headers=None, leaves=False, is_whole=True
    ):
        """Sends a request and returns the response.

        Args:
            method: of HTTP.
            address: path.
            content: of the body.
            headers: by name, with "_" for "-".
            leaves: whether the client goes as soon as the body is sent.
            is_whole: whether more of the body was announced.
        """
        return asyncio.run(
            self._request(method, address, content, headers or {}, leaves, is_whole)
        )

    async def _request(self, method, address, content, headers, leaves, is_whole):
        body = [{"type": "http.request", "body": content, "more_body": not is_whole}]
        sent = []
        is_answered = asyncio.Event()

        async def receive():
            if body:
                return body.pop()
            if not leaves:
                await is_answered.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                is_answered.set()

        scope = {
            "type": "http",
            "method": method,
            "path": address,
            "headers": [
                (name.replace("_", "-").encode(), value.encode())
                for name, value in headers.items()
            ],
            "query_string": b"",
        }
        try:
            await asyncio.wait_for(self._app(scope, receive, send), 60)
        except Exception:
            # Of an error of its own an application tells the client, and then its server.
            if not is_answered.is_set():
                raise
        if leaves:
            return None
        first, *parts = sent
        received = {name.decode(): value.decode() for name, value in first["headers"]}
        text = b"".join(part["body"] for part in parts).decode()
        return Response(first["status"], received, text)
