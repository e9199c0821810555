"""What is seen of each request: one line in the access log, counters, and telemetry if it is on.

Never the text of a prompt or an answer, never a secret.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from market import pricing
from market.errors import MarketFault
from market.metering import Admission
from market.types import Principal, Sampling, UsageRecord

LOG_MAX_BYTES = 32 * 2**20
LOG_FILES = 5
# Asked every few seconds by machines; nobody reads about them.
_UNSEEN = frozenset({"/healthz", "/metrics"})
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Seen:
    """One request; its handlers fill in what they come to know."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    began: datetime
    began_s: float = field(default_factory=time.perf_counter)
    status: int = 0
    request_id: str | None = None
    caller: Principal | None = None
    operation: str | None = None
    model: str | None = None
    sampling: Sampling | None = None
    answers: int = 1
    stream: bool = False
    error_code: str | None = None
    rate_limits: dict[str, str] = field(default_factory=dict)  # headers of a refusal
    record: UsageRecord | None = None
    admission: Admission | None = None
    duration_s: float = 0.0

    def break_off(self) -> None:
        """It is us, not the client, who end it now: nothing is charged."""
        if self.admission is not None:
            self.admission.is_broken = True


Watcher = Callable[[Seen], None]


class Observer:
    """Middleware that tells ``watchers`` of each request that has ended, streams included."""

    def __init__(self, app: ASGIApp, watchers: tuple[Watcher, ...]) -> None:
        self._app = app
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = Seen(scope["method"], scope["path"], dict(scope["headers"]), datetime.now(UTC))
        scope.setdefault("state", {})["seen"] = seen

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            seen.status = seen.status or 500
            seen.error_code = seen.error_code or MarketFault.code
            raise
        finally:
            seen.duration_s = time.perf_counter() - seen.began_s
            for watcher in self._watchers if seen.path not in _UNSEEN else ():
                watcher(seen)


def seen_of(scope: Scope) -> Seen:
    """What is known of the request so far."""
    seen: Seen = scope["state"]["seen"]
    return seen


class AccessLog:
    """JSON lines in ``folder``, one file per gateway, the oldest of five dropped."""

    def __init__(self, folder: Path, gateway: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"access-{gateway}.jsonl"
        self._handler = RotatingFileHandler(
            self.path, maxBytes=LOG_MAX_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8"
        )

    def __call__(self, seen: Seen) -> None:
        """Write a request's line; a full disk costs the line, not the request."""
        line = _encode(access_entry(seen)).decode()
        self._handler.handle(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def access_entry(seen: Seen) -> dict[str, Any]:
    """What the access log says of a request; what is not known is left out."""
    caller, record = seen.caller, seen.record
    entry: dict[str, Any] = {
        "time": seen.began.isoformat(timespec="milliseconds"),
        "method": seen.method,
        "path": seen.path,
        "status": seen.status,
        "duration_ms": round(seen.duration_s * 1000, 1),
        "request_id": seen.request_id,
        "error": seen.error_code,
        "role": caller and str(caller.role),
        "subject": caller and caller.subject_id,
        "api_key_id": caller and caller.api_key_id,
        "model": seen.model,
    }
    if record is not None:
        entry |= {
            "lane": str(record.lane),
            "provider": record.provider_id,
            "node": record.node_id,
            "input_tokens": record.input_tokens,
            "cached_input_tokens": record.cached_input_tokens,
            "output_tokens": record.output_tokens,
            "charge": pricing.format_money(record.charge_pico),
            "finish_reason": record.finish_reason,
            "queue_ms": record.queue_ms,
            "ttft_ms": record.ttft_ms,
        }
    return {name: value for name, value in entry.items() if value is not None}
