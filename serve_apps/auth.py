"""API keys: who is asking. Only hashes leave this process; keys are never logged."""

import time
from collections import OrderedDict
from typing import Protocol

from market.errors import InvalidKey, PermissionDenied
from market.keys import hash_key
from market.types import Principal, Role

CACHE_S = 2.0
CACHE_MAX = 10_000


class Keys(Protocol):
    """The part of the ledger that knows keys."""

    async def find_key(self, key_hash: str) -> Principal | None:
        """Whom the key speaks for."""
        ...


class Authenticator:
    """Looks keys up in the ledger and remembers the answer for two seconds.

    A revoked key therefore works on for at most two seconds.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._known: OrderedDict[str, tuple[Principal, float]] = OrderedDict()

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal behind an ``Authorization`` header. Raises InvalidKey."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise InvalidKey("no API key: send the header Authorization: Bearer YOUR_KEY")
        hashed = hash_key(key)
        known = self._known.get(hashed)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        principal = await self._keys.find_key(hashed)
        if principal is None:
            self._known.pop(hashed, None)
            raise InvalidKey("this API key is unknown or revoked")
        self._known[hashed] = (principal, time.monotonic() + CACHE_S)
        while len(self._known) > CACHE_MAX:
            self._known.popitem(last=False)
        return principal


def require_operator(principal: Principal) -> None:
    """Raises PermissionDenied unless the key is an operator's."""
    if principal.role is not Role.OPERATOR:
        raise PermissionDenied("this needs an operator key (market up keeps one in operator.key)")


def require_provider(principal: Principal, provider_id: str) -> None:
    """Raises PermissionDenied unless the key is the operator's or this provider's own."""
    own = principal.role is Role.PROVIDER and principal.subject_id == provider_id
    if principal.role is not Role.OPERATOR and not own:
        raise PermissionDenied(f"this key may not see provider {provider_id}")


def require_subject(principal: Principal, tenant_id: str) -> None:
    """Raises PermissionDenied unless the key is the operator's or this tenant's own."""
    own = principal.role is Role.TENANT and principal.subject_id == tenant_id
    if principal.role is not Role.OPERATOR and not own:
        raise PermissionDenied(f"this key may not see tenant {tenant_id}")
