"""Who is answered: clients with the key; without one, all but the pages of foreign sites.

A browser lets any page send requests to an address of this machine, and hides the answers alone; a
site whose name its owner points at that address ("DNS rebinding") may read them, too.
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

# What a browser sends for a page that it does not name, such as one in a sandbox.
_UNNAMED = "null"

_LOCAL = "localhost"

# Whether the server can answer now, and whether waiting for that is of use.
READY = "/health"
LIVE = "/live"


def access_checks(
    key: str | None, origins: Sequence[str], hosts: Sequence[str] | None
) -> list[Middleware]:
    """Lists what a request passes before its route, in order.

    Args:
        key: that clients must send; None answers everybody.
        origins: of the pages whose scripts a browser lets read the answers; "*" is all.
        hosts: names, besides those of this machine, that clients without a key may call the server
            by; None is any.
    """
    passed = []
    # Outside of the other: a browser asks for permission without the key.
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
    """Refuses requests without the key, but for those that ask after the server's health."""

    def __init__(self, app: ASGIApp, key: str):
        """Takes what is behind it, and the key."""
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refused = Refused(
            "the header `Authorization` must be 'Bearer ' and the server's key.",
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
    """Refuses what pages of foreign sites make a browser send, but for the server's health."""

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], hosts: Sequence[str] | None
    ):
        """Takes what is behind it, and who may ask; see `access_checks`."""
        self._app = app
        self._origins = origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
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
                "the header `Origin` must be of a page that the server was told to answer "
                f"(`--allow-origin`), or there must be a key; got {origin!r:.60}.",
                status=403,
            )
        if not self._is_known_host(host):
            return Refused(
                "the header `Host` must be an address, localhost or a name that the server was "
                f"told to answer by (`--allow-host`), or there must be a key; got {host!r:.60}.",
                status=403,
            )
        return None

    def _is_known_origin(self, origin: str) -> bool:
        # Programs send none, and extensions and desktop programs one of another scheme.
        is_page = origin == _UNNAMED or origin.startswith(("http://", "https://"))
        return not is_page or origin in self._origins or _is_local(_name(origin))

    def _is_known_host(self, host: str) -> bool:
        if not host or self._hosts is None or host in self._hosts:
            return True
        return _is_local(host) or _is_address(host)


def _is_open(scope: Scope) -> bool:
    """Tells whether everybody may have what a request asks for."""
    return scope["type"] != "http" or scope["path"] in (READY, LIVE)


def _name(address: str) -> str:
    """Returns the host of an address in lower case; what is no address, as it is."""
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return address


def _is_local(host: str) -> bool:
    """Tells whether a host is this machine, by whatever name server."""
    is_named = host == _LOCAL or host.endswith(f".{_LOCAL}")
    return is_named or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    """Tells whether a host is a number, which no foreign site has for a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
