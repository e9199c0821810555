"""A key's limits: requests and tokens a minute, requests at once. Pure but for counting.

Token buckets that hold a minute's worth. Where several gateways serve a key, the scheduler says how
many do: each then refills an equal part of the rate, so that together they keep to the limit. Each
lets at least one request through at a time: fewer would shut out whoever is connected to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from market.errors import RateLimited, TokensLimited
from market.types import KeyPolicy

MINUTE_S = 60.0
IDLE_S = 300.0


@dataclass(slots=True)
class Bucket:
    """So many a minute. ``level`` may be below zero where an answer was longer than expected."""

    per_min: float
    level: float
    at_s: float

    def refill(self, per_min: float, now_s: float) -> None:
        """Let time pass; the limit may have changed meanwhile."""
        if per_min != self.per_min:
            self.level += per_min - self.per_min
            self.per_min = per_min
        self.level = min(self.size, self.level + (now_s - self.at_s) * per_min / MINUTE_S)
        self.at_s = now_s

    @property
    def size(self) -> float:
        """What it holds at most: a minute's worth, or one, if that is more."""
        return max(1.0, self.per_min)

    def wait_s(self, amount: float) -> float:
        """How long until ``amount`` is there; what exceeds the bucket waits for a full one."""
        return max(0.0, min(amount, self.size) - self.level) * MINUTE_S / self.per_min

    def reset_s(self) -> float:
        """How long until it is full."""
        return self.wait_s(self.size)


@dataclass(slots=True)
class _Key:
    used_s: float
    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


@dataclass(slots=True)
class Pass:
    """A request that was let through, with the tokens it was expected to need."""

    api_key_id: str
    policy: KeyPolicy
    tokens: int


class Limits:
    """The keys of one gateway that have limits."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._gateways: Mapping[str, int] = {}

    def share(self, gateways: Mapping[str, int]) -> None:
        """How many gateways serve a key; one where nothing is said."""
        self._gateways = gateways

    def in_use(self, now_s: float) -> frozenset[str]:
        """Keys used lately; forgets the others."""
        for name in [n for n, k in self._keys.items() if _idle(k, now_s)]:
            del self._keys[name]
        return frozenset(self._keys)

    def check(self, api_key_id: str, policy: KeyPolicy, now_s: float) -> None:
        """Raises RateLimited if the key has no request left; so nothing is done for it."""
        if policy.requests_per_min is not None:
            key = self._key(api_key_id, policy, now_s)
            _require(key, policy, {"requests": 1})

    def enter(self, api_key_id: str, policy: KeyPolicy, tokens: int, now_s: float) -> Pass | None:
        """Let a request through, or raise RateLimited; None for a key without limits."""
        if not has_limits(policy):
            return None
        key = self._key(api_key_id, policy, now_s)
        most = policy.concurrent
        if most is not None and key.running >= max(1, most // self._gateways.get(api_key_id, 1)):
            raise RateLimited(
                f"{key.running} requests of this key are under way, at most {most} may be",
                retry_after_s=1,
            )
        needs = {"requests": 1, "tokens": tokens}
        _require(key, policy, needs)
        for name, bucket in key.buckets.items():
            bucket.level -= needs[name]
        key.running += 1
        return Pass(api_key_id, policy, tokens)

    def leave(self, let: Pass | None, tokens: int, now_s: float) -> None:
        """A request has ended; ``tokens`` is what it really needed."""
        if let is None:
            return
        key = self._key(let.api_key_id, let.policy, now_s)
        key.running = max(0, key.running - 1)
        bucket = key.buckets.get("tokens")
        if bucket is not None:
            bucket.level = min(bucket.size, bucket.level + let.tokens - tokens)

    def headers(self, api_key_id: str, policy: KeyPolicy, now_s: float) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*`` headers; none for a key without limits."""
        if not has_limits(policy):
            return {}
        key = self._key(api_key_id, policy, now_s)
        limits = _limits(policy)
        headers = {}
        for name, bucket in key.buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(limits[name])
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
            headers[f"x-ratelimit-reset-{name}"] = duration(bucket.reset_s())
        return headers

    def _key(self, api_key_id: str, policy: KeyPolicy, now_s: float) -> _Key:
        key = self._keys.setdefault(api_key_id, _Key(now_s))
        key.used_s = now_s
        gateways = self._gateways.get(api_key_id, 1)
        for name, limit in _limits(policy).items():
            if limit is None:
                key.buckets.pop(name, None)
            else:
                part = limit / gateways
                bucket = key.buckets.setdefault(name, Bucket(part, part, now_s))
                bucket.refill(part, now_s)
        return key


def _require(key: _Key, policy: KeyPolicy, needs: Mapping[str, int]) -> None:
    for name, need in needs.items():
        wait_s = key.buckets[name].wait_s(need) if name in key.buckets else 0.0
        if wait_s > 0:
            kind = RateLimited if name == "requests" else TokensLimited
            raise kind(
                f"this key's limit of {_limits(policy)[name]} {name} a minute is reached",
                retry_after_s=min(wait_s, MINUTE_S),
            )


def _limits(policy: KeyPolicy) -> dict[str, int | None]:
    return {"requests": policy.requests_per_min, "tokens": policy.tokens_per_min}


def has_limits(policy: KeyPolicy) -> bool:
    """Whether a key is limited in requests or tokens."""
    return (policy.requests_per_min, policy.tokens_per_min, policy.concurrent) != (None, None, None)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 350ms, 7.66s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"


def _idle(key: _Key, now_s: float) -> bool:
    return key.running == 0 and now_s - key.used_s > IDLE_S
