"""API keys: who is asking, and what the key may do. Only hashes leave this process; keys are never
logged.
"""

import asyncio
import logging
from collections import OrderedDict
from datetime import datetime
from typing import Protocol

from market.errors import InvalidKey, MarketError, Overloaded, PermissionDenied
from market.keys import hash_key
from market.ports import Clock
from market.types import Access, Lane, Principal, RateCard, Role

logger = logging.getLogger(__name__)

POLL_S = 1.0
# Without news from the ledger what is remembered is good for so long.
TRUSTED_S = 4.0
CACHE_MAX = 10_000
# Wrong keys cost the ledger a look each: so many at once, the others are told to come again.
LOOKUPS_MAX = 64
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Keys(Protocol):
    """The part of the ledger that knows keys and prices."""

    async def find_key(self, key_hash: str) -> Principal | None:
        """Whom the key speaks for."""
        ...

    async def access(self) -> Access:
        """A number that changes with every key, and the prices in force."""
        ...


class Authenticator:
    """Looks keys up in the ledger and remembers the answers, also that there is no such key.

    Once a second it asks whether anything has changed; if so, or if the ledger has not answered for
    four seconds, it looks again. So no request waits for the ledger, and a revoked key works on for
    at most five seconds.
    """

    def __init__(self, keys: Keys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self._known: OrderedDict[str, tuple[Principal | None, float]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Principal | None]] = {}
        self._version = ""
        self._heard_s = float("-inf")
        self.cards: dict[str, RateCard] = {}

    async def poll(self) -> None:
        """Forget everything if a key, budget or tenant has changed; take over prices."""
        asked_s = self._clock.monotonic()
        access = await self._keys.access()
        if access.version != self._version:
            self._known.clear()
            self._version = access.version
        self.cards = {card.model: card for card in access.cards}
        self._heard_s = asked_s

    async def poll_forever(self) -> None:
        """Poll; while the ledger is away what is known grows old."""
        while True:
            try:
                await self.poll()
            except MarketError as error:
                logger.warning("keys not refreshed: %s", error)
            await asyncio.sleep(POLL_S)

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal behind an ``Authorization`` header. Raises InvalidKey, Overloaded."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise InvalidKey("no API key: send the header Authorization: Bearer YOUR_KEY")
        hashed = hash_key(key)
        known = self._known.get(hashed)
        now_s = self._clock.monotonic()
        if known is not None and now_s < max(known[1], self._heard_s) + TRUSTED_S:
            principal = known[0]
        else:
            principal = await self._look_up(hashed)
        if principal is None or _is_over(principal.secret_until, self._clock.now()):
            raise InvalidKey("this API key is unknown or revoked")
        expires_at = principal.policy.expires_at
        if expires_at is not None and _is_over(expires_at, self._clock.now()):
            raise InvalidKey(f"this API key expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC")
        return principal

    async def _look_up(self, hashed: str) -> Principal | None:
        """Ask the ledger, once for all who want to know the same."""
        asking = self._asking.get(hashed)
        if asking is None:
            if len(self._asking) >= LOOKUPS_MAX:
                raise Overloaded("too many unknown keys at once", retry_after_s=1)
            asking = asyncio.get_running_loop().create_task(self._ask(hashed))
            self._asking[hashed] = asking
            asking.add_done_callback(lambda _: self._asking.pop(hashed, None))
        return await asyncio.shield(asking)

    async def _ask(self, hashed: str) -> Principal | None:
        version, asked_s = self._version, self._clock.monotonic()
        principal = await self._keys.find_key(hashed)
        if version != self._version:
            return principal  # it may have changed since
        self._known[hashed] = (principal, asked_s)
        self._known.move_to_end(hashed)
        while len(self._known) > CACHE_MAX:
            self._known.popitem(last=False)
        return principal


def _is_over(until: datetime | None, now: datetime) -> bool:
    return until is not None and until <= now


def require_method(principal: Principal, method: str) -> None:
    """Raises PermissionDenied if a read-only key wants to change something."""
    if principal.policy.read_only and method not in SAFE_METHODS:
        raise PermissionDenied("this key may only read", code="read_only_key")


def require_model(principal: Principal, model: str) -> None:
    """Raises PermissionDenied unless the key may use the model."""
    allowed = principal.policy.models
    if allowed is not None and model not in allowed:
        raise PermissionDenied(
            f"this key may not use model {model}; it may use {', '.join(allowed) or 'none'}",
            code="model_not_allowed",
            param="model",
        )


def may_use(principal: Principal, lane: Lane) -> bool:
    """Whether the key may be served on a lane."""
    allowed = principal.policy.lanes
    return allowed is None or lane in allowed


def require_lane(principal: Principal, lane: Lane) -> None:
    """Raises PermissionDenied unless the key may be served on a lane, and order what serves it."""
    if not may_use(principal, lane):
        allowed = ", ".join(principal.policy.lanes or ()) or "none"
        raise PermissionDenied(
            f"this key may not use lane {lane}; it may use {allowed}", code="lane_not_allowed"
        )


def require_operator(principal: Principal) -> None:
    """Raises PermissionDenied unless the key is an operator's."""
    if principal.role is not Role.OPERATOR:
        raise PermissionDenied("this needs an operator key (market up keeps one in operator.key)")


def require_provider(principal: Principal, provider_id: str) -> None:
    """Raises PermissionDenied unless the key is the operator's or this provider's own."""
    own = principal.role is Role.PROVIDER and principal.subject_id == provider_id
    if principal.role is not Role.OPERATOR and not own:
        raise PermissionDenied(f"this key may not see provider {provider_id}")


def require_tenant(principal: Principal, tenant_id: str | None = None) -> str | None:
    """Whose things a key may see and change: its tenant's; None, for an operator's only, is all.

    ``tenant_id`` is whom the caller names. Raises PermissionDenied if that is another tenant, and
    for a provider's key.
    """
    if principal.role is Role.OPERATOR:
        return tenant_id
    if principal.role is not Role.TENANT:
        raise PermissionDenied("this needs a tenant's key or the operator's")
    if tenant_id not in (None, principal.subject_id):
        raise PermissionDenied(f"this key is not one of tenant {tenant_id}")
    return principal.subject_id
