"""The error tree. Every error knows its OpenAI code, its HTTP status and whether to retry.

MarketError
├── InvalidRequest          400  the caller must change the request
│   ├── ContextTooLong      400  prompt and answer do not fit the model
│   └── RequestTooLarge     413  the body is larger than the server reads
├── InvalidKey              401  missing, wrong, expired or revoked API key
├── InsufficientBalance     402  the balance cannot cover even a short answer
│   └── SpillsSpent         402  a hybrid's budget for spills cannot
├── PermissionDenied        403  the key's role or scope does not allow it
├── RateLimited             429  too many requests or tokens a minute, or at once, for this key
│   ├── TokensLimited       429  too many tokens a minute
│   └── SlowDown            429  too many of this tenant's requests wait
├── NotFound                404  unknown model, tenant, deployment ...
├── Conflict                409  the same id was used before for something else
├── Overloaded              503  try again later (queue full, model starting, ledger restarting)
│   ├── NoCapacity          503  nothing in the cluster can run it
│   └── Revoked             503  a lease's holder needs its GPU back; goes on elsewhere
├── EngineFailed            500  the replica died or broke; never billed
└── MarketFault             500  a bug or an outage of ours; never billed

All arguments go through ``super().__init__`` so that errors survive pickling between processes.
"""

from typing import Any


class MarketError(Exception):
    """Base of everything this package raises on purpose."""

    http_status = 500
    type = "server_error"
    code = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        metadata: dict[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.metadata = metadata
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))

    def body(self) -> dict[str, Any]:
        """OpenAI's error body; our own facts go under ``metadata``."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.metadata is not None:
            error["metadata"] = self.metadata
        return {"error": error}


def _rebuild(kind: type[MarketError], message: str, state: dict[str, Any]) -> MarketError:
    error = kind(message)
    error.__dict__.update(state)
    return error


class InvalidRequest(MarketError):
    """The request itself is wrong; sending it again cannot help."""

    http_status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """Prompt plus answer exceed the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The body exceeds what is read, whoever sends it."""

    http_status = 413
    code = "request_too_large"


class InvalidKey(MarketError):
    """No key, an unknown one, or one that is revoked or expired."""

    http_status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class InsufficientBalance(MarketError):
    """The balance cannot cover the smallest useful answer."""

    http_status = 402
    type = "insufficient_quota"
    code = "insufficient_balance"


class SpillsSpent(InsufficientBalance):
    """A hybrid's requests have cost, or may yet cost, what they may today beside its lease."""

    code = "budget_exceeded"


class PermissionDenied(MarketError):
    """The key is good but may not do this."""

    http_status = 403
    type = "permission_denied"
    code = "permission_denied"


class RateLimited(MarketError):
    """A limit of the key is reached for now; ``type`` is what there was too much of."""

    http_status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class TokensLimited(RateLimited):
    """Too many tokens a minute."""

    type = "tokens"


class SlowDown(RateLimited):
    """The tenant's own queue is full: others are served, it has to wait."""

    code = "slow_down"


class NotFound(MarketError):
    """Something named in the request does not exist."""

    http_status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(MarketError):
    """An id made by the caller was used before with other content."""

    http_status = 409
    type = "conflict"
    code = "conflict"


class Overloaded(MarketError):
    """Not now; the caller may try again after ``retry_after_s``."""

    http_status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"


class NoCapacity(Overloaded):
    """The cluster has nothing on which this can run; the message says what is missing."""

    code = "no_capacity"


class Revoked(Overloaded):
    """The holder of the lease on which the answer was generated asks for something itself."""

    code = "revoked"


class EngineFailed(MarketError):
    """The model replica died or its engine broke. The caller is not billed."""

    code = "engine_failed"


class MarketFault(MarketError):
    """Our own failure. The caller is not billed."""

    code = "market_fault"
