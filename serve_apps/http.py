"""The gateway's ASGI application: routers, OpenAI error bodies, a limit on bodies."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from market import __version__
from market.config import Config
from market.errors import InvalidRequest, MarketError, MarketFault, NotFound, RequestTooLarge
from market.inference import Inference
from market.ledger.service import Ledger
from market.limits import Limits
from market.ports import Clock
from market.scheduler.service import Scheduler
from market.types import FinishReason, Principal
from serve_apps.auth import Authenticator, require_method
from serve_apps.idempotency import Idempotency
from serve_apps.lanes import Lanes
from serve_apps.live import LiveRoutes
from serve_apps.metrics import Metrics
from serve_apps.observed import Observer, Watcher, seen_of
from serve_apps.streams import ClientGone

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499
_SAYS_WHETHER = frozenset({402, 409, 429})
BODY_MAX_BYTES = 8 * 1024 * 1024
TOO_LARGE = f"the body is larger than {BODY_MAX_BYTES} bytes"


def no_ray() -> tuple[str, str]:
    """There is no cluster that a node could join."""
    raise NotFound("this gateway runs without a Ray cluster; nodes cannot join")


@dataclass(frozen=True, slots=True)
class Services:
    """What the routers work with. ``ray_access`` is (address, token) for a node that joins."""

    config: Config
    clock: Clock
    ledger: Ledger
    scheduler: Scheduler
    routes: LiveRoutes
    lanes: Lanes
    inference: Inference
    authenticator: Authenticator
    limits: Limits
    idempotency: Idempotency
    metrics: Metrics
    watchers: tuple[Watcher, ...] = ()
    ray_access: Callable[[], tuple[str, str]] = no_ray


def services_of(request: Request) -> Services:
    """The services behind the application that got this request."""
    services: Services = request.app.state.services
    return services


async def principal_of(request: Request) -> Principal:
    """Who is asking. Raises InvalidKey, or PermissionDenied if the key may only read."""
    authenticator = services_of(request).authenticator
    principal = await authenticator.authenticate(request.headers.get("authorization"))
    seen_of(request.scope).caller = principal
    require_method(principal, request.method)
    return principal


# What ends in a database or names something there: without characters that PostgreSQL, a log or a
# terminal would choke on, and of bounded length.
_PLAIN = r"^\P{Cc}*$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=_PLAIN)]
Words = Annotated[str, StringConstraints(max_length=500, pattern=_PLAIN)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
LongCount = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """Bodies of our own API refuse unknown fields: a typo must not pass silently."""

    model_config = ConfigDict(extra="forbid")


With = Annotated[Services, Depends(services_of)]
Caller = Annotated[Principal, Depends(principal_of)]


def create_app(services: Services) -> FastAPI:
    """The whole HTTP surface over the given services."""
    from serve_apps import (
        fleet_api,
        keys_api,
        ledger_api,
        market_api,
        models_api,
        openai_api,
    )

    app = FastAPI(
        title="Compute market",
        version=__version__,
        openapi_url="/market/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    app.add_exception_handler(MarketError, _market_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(BodyLimit)
    app.add_middleware(Observer, watchers=services.watchers)
    app.include_router(openai_api.router)
    app.include_router(market_api.router)
    app.include_router(keys_api.router)
    app.include_router(fleet_api.router)
    app.include_router(ledger_api.router)
    app.include_router(models_api.router)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this gateway answers."""
        return {"status": "ok", "version": __version__}

    return app


class BodyLimit:
    """Ends requests whose body is larger than 8 MiB, before anything is made of it.

    It stands in front of authentication, because FastAPI reads bodies first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        read = 0
        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY_MAX_BYTES:
                raise RequestTooLarge(TOO_LARGE)
            return message

        if declared.isdigit() and int(declared) > BODY_MAX_BYTES:
            await error_response(scope, RequestTooLarge(TOO_LARGE))(scope, receive, send)
            return
        await self._app(scope, limited, send)


def error_response(scope: Scope, error: MarketError) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    seen_of(scope).error_code = error.code
    headers = dict(seen_of(scope).rate_limits)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if error.http_status in _SAYS_WHETHER:
        # What clients would do by themselves is wrong here: they never try a 402 again, a 409 and a
        # 429 always.
        headers["x-should-retry"] = "false" if error.retry_after_s is None else "true"
    return JSONResponse(error.body(), status_code=error.http_status, headers=headers)


async def _client_gone(request: Request, _error: Exception) -> Response:
    seen_of(request.scope).error_code = FinishReason.CLIENT_DISCONNECT
    return Response(status_code=CLIENT_CLOSED)  # nobody reads it


async def _market_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MarketError)
    return error_response(request.scope, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    is_plain = first.get("ctx", {}).get("pattern") != _PLAIN
    reason = first["msg"] if is_plain else "there must be no control characters in it"
    message = f"{where or 'body'}: {reason}"
    return error_response(request.scope, InvalidRequest(message, param=where or None))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(request.scope, NotFound(f"no such address: {request.url.path}"))
    wrapped = InvalidRequest(str(error.detail))
    return JSONResponse(wrapped.body(), status_code=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    logger.error("unexpected error in %s", request.url.path, exc_info=error)
    fault = MarketFault("internal error")
    return error_response(request.scope, fault)
