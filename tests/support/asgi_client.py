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

    def get(self, address):
        """Reads what lies at an address."""
        return self.request("GET", address)

    def post(self, address, body):
        """Sends an object."""
        return self.request("POST", address, json.dumps(body).encode())

    def request(self, method, address, content=b"", *, leaves=False):
        """Sends a request and returns the response.

        Args:
            method: of HTTP.
            address: path.
            content: of the body.
            leaves: whether the client goes as soon as the body is sent.
        """
        return asyncio.run(self._request(method, address, content, leaves))

    async def _request(self, method, address, content, leaves):
        received = [{"type": "http.request", "body": content}]
        sent = []
        is_answered = asyncio.Event()

        async def receive():
            if received:
                return received.pop()
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
            "headers": [],
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
        headers = {name.decode(): value.decode() for name, value in first["headers"]}
        text = b"".join(part["body"] for part in parts).decode()
        return Response(first["status"], headers, text)
