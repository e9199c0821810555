"""Which lane and which model serves a request. Pure: loads in, a choice with its reason out.

A hybrid's requests go to its own lease as long as that is fast enough, the rest spill to the pool.
An auto deployment takes what costs least of what is fast enough; with two models, easy requests go
to the cheap one, so that the share of the strong one meets a cost target (the budgeted threshold of
RouteLLM, Ong et al., 2024).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from market.types import Budget, Lane, LanePolicy, Period, RateCard, Route, Rule

# A request that may need more than this part of a model's context is too long for it: what a prompt
# has is an estimate.
CONTEXT_USED = 0.75
# More than any amount of money.
UNLIMITED_PICO = 10**27
# So many requests' difficulties are remembered, and so many make a threshold of one's own.
REMEMBERED = 1000
REMEMBERED_LEAST = 50
LANE_REASON = "lane_reason"  # of a record's attrs


class Reason(StrEnum):
    """Why a request went where it went."""

    OWN = "own_lease"
    QUEUE = "queue"
    TTFT = "ttft"
    NOT_READY = "not_ready"
    FALLBACK = "fallback"
    CHEAPEST = "cheapest"
    FASTEST = "fastest"
    SIMPLE = "simple"
    COMPLEX = "complex"
    TOOLS = "tools"
    LONG = "long_context"
    PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool or lease has to do, as this gateway sees it.

    ``ttft_s``: from dispatch to the first token lately, a moving mean that fades while none comes.
    """

    running: int
    waiting: int
    places: int
    finished_per_s: float = 0.0
    ttft_s: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether a request that comes now has to wait."""
        return self.waiting > 0 or self.running >= self.places

    @property
    def first_token_s(self) -> float:
        """When a request that comes now may expect its first token; infinite if nobody knows."""
        if not self.is_full:
            return self.ttft_s
        if self.finished_per_s <= 0:
            return math.inf
        return (self.waiting + 1) / self.finished_per_s + self.ttft_s


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why.

    ``otherwise`` is tried if it is refused there or fails before the first token. ``cap`` bounds
    what it may cost; ``not_taken`` is the price of what else would have served it.
    """

    route: Route
    reason: Reason | None = None
    otherwise: "Choice | None" = None
    cap: Budget | None = None
    not_taken: RateCard | None = None
    attrs: tuple[tuple[str, str], ...] = ()

    @property
    def noted(self) -> tuple[tuple[str, str], ...]:
        """What the record says of it."""
        return self.attrs if self.reason is None else (*self.attrs, (LANE_REASON, str(self.reason)))


@dataclass(frozen=True, slots=True)
class Query:
    """What is known of a request before it is tokenized.

    ``tokens`` is an estimate of the prompt's and the most that the answer may have.
    """

    text: str
    tokens: int
    tools: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """A way to serve a request: ``cost_pico`` for what is typical of it; 0 on one's own lease."""

    route: Route
    card: RateCard
    load: Load
    cap: Budget | None = None
    attrs: tuple[tuple[str, str], ...] = ()

    @property
    def cost_pico(self) -> int:
        """Of a token in and a token out."""
        if self.route.lane is Lane.LEASE:
            return 0
        return self.card.input_pico + self.card.output_pico


@dataclass(slots=True)
class Difficulties:
    """How hard a tenant's last requests were, each in [0, 1]: what a threshold is made of."""

    scores: list[float] = field(default_factory=list)
    _next: int = 0

    def add(self, score: float) -> None:
        """Remember one, instead of the oldest."""
        if len(self.scores) < REMEMBERED:
            self.scores.append(score)
        else:
            self.scores[self._next] = score
            self._next = (self._next + 1) % REMEMBERED

    def threshold(self, strong_share: float, usual: Sequence[float]) -> float:
        """Requests above it are for the strong model, so that it gets ``strong_share`` of them.

        ``usual``: quantiles of the scorer, in order, for as long as there are few requests.
        """
        known = sorted(self.scores) if len(self.scores) >= REMEMBERED_LEAST else list(usual)
        if strong_share >= 1:
            return -math.inf
        place = math.ceil((1 - strong_share) * len(known)) - 1
        return known[max(0, min(place, len(known) - 1))]


def spill_reason(lease: Load | None, ttft_s: float) -> Reason | None:
    """Why a hybrid's request does not go to its lease, if so. ``lease`` None: it is not ready."""
    if lease is None:
        return Reason.NOT_READY
    if lease.waiting > lease.places:
        return Reason.QUEUE
    if lease.first_token_s > ttft_s:
        return Reason.TTFT
    return None


def spill_cap(rule: Rule) -> Budget:
    """What spills of a hybrid may cost a day.

    Without a limit they are counted, too: one may be set in the middle of a day.
    """
    limit = rule.policy.spill_pico
    return Budget(f"spill:{rule.lease_id}", Period.DAY, UNLIMITED_PICO if limit is None else limit)


def spill_attrs(rule: Rule) -> tuple[tuple[str, str], ...]:
    """What the record of a spill says."""
    return (("spilled_from", str(rule.lease_id)),)


def with_spill(
    rule: Rule, own: Route | None, pool: Route | None, reason: Reason | None
) -> Choice | None:
    """A hybrid's way: its lease, or the pool if there is a ``reason``; the other one otherwise.

    Either is None if it cannot serve; None if neither can.
    """
    lease = [] if own is None else [Choice(own, Reason.OWN)]
    why = reason or Reason.FALLBACK
    spill = (
        [] if pool is None else [Choice(pool, why, None, spill_cap(rule), None, spill_attrs(rule))]
    )
    order = [*lease, *spill] if reason is None else [*spill, *lease]
    return replace(order[0], otherwise=order[1] if order[1:] else None) if order else None


def deal(policy: LanePolicy, score: float, threshold: float) -> tuple[tuple[str, ...], Reason]:
    """The models that are good enough for a request so hard, the one preferred first."""
    if score > threshold:
        return (policy.strong,), Reason.COMPLEX
    return (policy.cheap, policy.strong), Reason.SIMPLE


def strong_share(cheap: RateCard, strong: RateCard, cost_target: float) -> float:
    """Which part of the requests may go to the strong model, in [0, 1].

    Of ``cost_target`` x what the strong model alone would cost, for requests of the same lengths.
    """
    cheap_pico, strong_pico = (card.input_pico + card.output_pico for card in (cheap, strong))
    if strong_pico <= cheap_pico:
        return 1.0
    ratio = cheap_pico / strong_pico
    return min(1.0, max(0.0, (cost_target - ratio) / (1 - ratio)))


def needs_strong(query: Query, cheap_context_tokens: int) -> Reason | None:
    """What makes a request one for the strong model whatever its difficulty; None if nothing."""
    if query.tools:
        return Reason.TOOLS
    if query.tokens > cheap_context_tokens * CONTEXT_USED:
        return Reason.LONG
    return None


def cheapest(options: Iterable[Option], ttft_s: float) -> tuple[Option, Reason]:
    """The least dear of those that are fast enough; the fastest if none is.

    Raises ValueError without any.
    """
    found = list(options)
    fast = [option for option in found if option.load.first_token_s <= ttft_s]
    if fast:
        best = min(fast, key=lambda o: (o.cost_pico, o.load.first_token_s, o.route.app_name))
        return best, Reason.OWN if best.route.lane is Lane.LEASE else Reason.CHEAPEST
    best = min(found, key=lambda o: (o.load.first_token_s, o.cost_pico, o.route.app_name))
    return best, Reason.FASTEST
