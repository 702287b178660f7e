"""The application that answers while the model loads: live, but not ready."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rwkv7_jax.serving.access import LIVE
from rwkv7_jax.serving.fields import Refused
from rwkv7_jax.serving.request_log import RequestLog

# Seconds after which a client may retry.
_RETRY_SECONDS = "5"


def make_starting_app() -> Starlette:
    """Makes the application that answers until the model is loaded."""
    return Starlette(
        routes=[Route(LIVE, _live)],
        exception_handlers={404: _starting, 405: _starting},
        middleware=[Middleware(RequestLog, stream=None)],
    )


async def _live(request: Request) -> Response:
    del request
    return JSONResponse({"status": "starting"})


async def _starting(request: Request, error: Exception) -> Response:
    del request, error
    refused = Refused(
        "the model is still loading; try again later.", status=503, code="starting"
    )
    headers = {"Retry-After": _RETRY_SECONDS}
    return JSONResponse(refused.body(), refused.status, headers=headers)
