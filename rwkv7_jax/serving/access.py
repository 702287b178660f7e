"""Access control: a server with a key requires it; one without rejects pages of foreign sites.

A browser lets any page send requests to a local address, and only hides the responses from it. If
the owner of a site points its name at that address ("DNS rebinding"), the page can read them too.
"""

import ipaddress
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv7_jax.serving.fields import Refused

# The origin that a browser sends for a page without one, such as a sandboxed page.
_UNNAMED = "null"

_LOCAL = "localhost"

# Whether the server can answer now, and whether waiting for that is of use.
READY = "/health"
LIVE = "/live"


def access_checks(
    key: str | None, origins: Sequence[str], hosts: Sequence[str] | None
) -> list[Middleware]:
    """Returns the middleware that checks a request before its route, in order.

    Args:
        key: the key that clients must send; None accepts every client.
        origins: origins of the pages that may read responses in a browser; "*" for all.
        hosts: host names, besides those of this machine, that a server without a key accepts; None
            for any.
    """
    passed = []
    # CORS comes first, because a browser sends its preflight request without the key.
    if origins:
        anything = ["*"]
        one = Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=anything,
            allow_headers=anything,
        )
        passed.append(one)
    if key is not None:
        passed.append(Middleware(_KeyCheck, key=key))
    elif "*" not in origins:
        passed.append(Middleware(_PageCheck, origins=origins, hosts=hosts))
    return passed


class _KeyCheck:
    """Middleware that rejects requests without the key, except health checks."""

    def __init__(self, app: ASGIApp, key: str):
        """Stores the wrapped application and the key."""
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request, or responds with status 401."""
        if _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refused = Refused(
            "the header `Authorization` must be 'Bearer ' followed by the key of the server.",
            status=401,
            code="invalid_api_key",
        )
        headers = {"WWW-Authenticate": "Bearer"}
        response = JSONResponse(refused.body(), 401, headers=headers)
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)


class _PageCheck:
    """Middleware that rejects requests from pages of foreign sites, except health checks."""

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], hosts: Sequence[str] | None
    ):
        """Stores the wrapped application and what it accepts; see `access_checks`."""
        self._app = app
        self._origins = origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request, or responds with status 403."""
        refused = None if _is_open(scope) else self._refusal(scope)
        if refused is None:
            await self._app(scope, receive, send)
            return
        response = JSONResponse(refused.body(), refused.status)
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = _name(f"//{headers.get(b'host', b'').decode('latin-1')}")
        if not self._is_known_origin(origin):
            return Refused(
                "the header `Origin` must be one that `--allow-origin` names, or the server must "
                f"have a key; got {origin!r:.60}.",
                status=403,
            )
        if not self._is_known_host(host):
            return Refused(
                "the header `Host` must be an IP address, localhost or a name that `--allow-host` "
                f"gives, or the server must have a key; got {host!r:.60}.",
                status=403,
            )
        return None

    def _is_known_origin(self, origin: str) -> bool:
        # Programs send no origin. Browser extensions and desktop programs send another scheme.
        is_page = origin == _UNNAMED or origin.startswith(("http://", "https://"))
        return not is_page or origin in self._origins or _is_local(_name(origin))

    def _is_known_host(self, host: str) -> bool:
        if not host or self._hosts is None or host in self._hosts:
            return True
        return _is_local(host) or _is_address(host)


def _is_open(scope: Scope) -> bool:
    """Returns whether a request needs no check."""
    return scope["type"] != "http" or scope["path"] in (READY, LIVE)


def _name(address: str) -> str:
    """Returns the host of a URL in lower case; an invalid URL as it is."""
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return address


def _is_local(host: str) -> bool:
    """Returns whether a host is this machine, whatever the name server says."""
    is_named = host == _LOCAL or host.endswith(f".{_LOCAL}")
    return is_named or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    """Returns whether a host is an IP address, which DNS rebinding cannot use."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
