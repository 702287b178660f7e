"""Access control: a server with a key requires it; one without rejects pages of foreign sites.

A browser lets any page send requests to a local address, and only hides the responses from it. If
the owner of a site points its name at that address ("DNS rebinding"), the page can read them too.
"""

import functools
import ipaddress
import secrets
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv7_jax.serving.fields import Refused

# The origin that a browser sends for a page without one, such as a sandboxed page.
_UNNAMED = "null"

_LOCAL = "localhost"

# The headers of a request, by their names in lower case.
_Headers = dict[bytes, bytes]

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
        expected = f"Bearer {key}".encode()
        passed.append(Middleware(_HeaderCheck, functools.partial(_check_key, expected)))
    elif "*" not in origins:
        check = functools.partial(_check_page, origins, hosts)
        passed.append(Middleware(_HeaderCheck, check))
    return passed


class _HeaderCheck:
    """Middleware that rejects requests by their headers, except health checks."""

    def __init__(self, app: ASGIApp, check: Callable[[_Headers], Refused | None]):
        """Stores the wrapped application and the check, which returns an error or None."""
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request, or responds with an error."""
        refused = None
        if scope["type"] == "http" and scope["path"] not in (READY, LIVE):
            refused = self._check(dict(scope["headers"]))
        if refused is None:
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
        response = JSONResponse(refused.body(), refused.status, headers=headers)
        await response(scope, receive, send)


def _check_key(expected: bytes, headers: _Headers) -> Refused | None:
    """Returns the error for a request without the key."""
    if secrets.compare_digest(headers.get(b"authorization", b""), expected):
        return None
    return Refused(
        "the header `Authorization` must be 'Bearer ' followed by the key of the server.",
        status=401,
        code="invalid_api_key",
    )


def _check_page(
    origins: Sequence[str], hosts: Sequence[str] | None, headers: _Headers
) -> Refused | None:
    """Returns the error for a request from a page of a foreign site."""
    origin = headers.get(b"origin", b"").decode("latin-1")
    # Programs send no origin. Browser extensions and desktop programs send another scheme.
    is_page = origin == _UNNAMED or origin.startswith(("http://", "https://"))
    if is_page and origin not in origins and not _is_local(_name(origin)):
        return Refused(
            "the header `Origin` must be one that `--allow-origin` names, or the server must "
            f"have a key; got {origin!r:.60}.",
            status=403,
        )
    host = _name(f"//{headers.get(b'host', b'').decode('latin-1')}")
    is_accepted = not host or hosts is None or host in hosts
    if not (is_accepted or _is_local(host) or _is_address(host)):
        return Refused(
            "the header `Host` must be an IP address, localhost or a name that `--allow-host` "
            f"gives, or the server must have a key; got {host!r:.60}.",
            status=403,
        )
    return None


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
