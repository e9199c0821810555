"""Token slices in a gateway's hands: what is granted, reserved and spent. Pure.

A slice is a hold on a tenant's money that the ledger keeps; here requests reserve from it and give
back, in microseconds and without a call. ``granted >= spent + reserved`` at all times, and the
ledger's hold is never smaller than ``granted``: so nothing is ever overdrawn, however many requests
and gateways there are.

A purse is all that one tenant can pay with for one model here: its token packs, first to expire
first, then its balance. A request is paid by one slice, at that slice's prices.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from market import pricing
from market.types import Budget, PackLeft, RateCard

# Money is asked for so long ahead, at the rate at which it is being spent.
AHEAD_S = 5.0
# How fast the measured rate forgets.
RATE_TAU_S = 5.0
IDLE_S = 10.0
MAX_AGE_S = 1800.0


class PurseKey(NamedTuple):
    """Whose money for what. ``api_key_id`` only where the key has a budget of its own.

    ``cap``: the budget of what spills from a lease.
    """

    tenant_id: str
    model: str
    api_key_id: str | None = None
    cap: Budget | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a request may cost: its input, a first block of output, at most so much output.

    ``answers`` of them are generated from the same input.
    """

    input_tokens: int
    block_tokens: int
    most_tokens: int
    answers: int = 1

    def first(self, card: RateCard) -> int:
        """Input and the first block of each answer, in pico units."""
        return pricing.ceiling(self.input_tokens, self.block_tokens * self.answers, card)

    def most(self, card: RateCard) -> int:
        """The most it can cost, in pico units."""
        return pricing.ceiling(self.input_tokens, self.most_tokens * self.answers, card)


@dataclass(slots=True)
class Slice:
    """One hold of this gateway. ``last_seq`` numbers the newest record that draws on it.

    ``is_asked`` once the ledger may have it, ``is_open`` once it has said so; ``need_pico`` is what
    a request typically reserves.
    """

    slice_id: str
    born_s: float
    pack: PackLeft | None = None
    granted_pico: int = 0
    spent_pico: int = 0
    reserved_pico: int = 0
    version: int = 0
    requests: int = 0
    last_seq: int = -1
    used_s: float = 0.0
    is_asked: bool = False
    is_open: bool = False
    closing: bool = False
    need_pico: int = 0
    rate_pico_s: float = 0.0
    rated_s: float = 0.0
    dry_until_s: float = 0.0

    @property
    def free_pico(self) -> int:
        """What can be reserved."""
        return self.granted_pico - self.spent_pico - self.reserved_pico

    @property
    def bound_pico(self) -> int:
        """What cannot be given back."""
        return self.spent_pico + self.reserved_pico

    @property
    def ahead_pico(self) -> int:
        """What should be free, so that no request waits for a grant."""
        return max(2 * self.need_pico, round(self.rate_pico_s * AHEAD_S))

    @property
    def is_short(self) -> bool:
        """Whether it is time to ask for more."""
        return self.free_pico * 2 < self.ahead_pico

    def spend(self, pico: int, now_s: float) -> None:
        """Count money as spent, for the rate."""
        passed_s = max(0.0, now_s - self.rated_s)
        self.rate_pico_s *= math.exp(-passed_s / RATE_TAU_S)
        self.rate_pico_s += pico / RATE_TAU_S
        self.used_s = self.rated_s = now_s


@dataclass(slots=True)
class Reservation:
    """A request's part of a slice: what it may still cost, at ``card``'s prices.

    ``block_tokens`` of output were reserved for each answer at first.
    """

    slice: Slice
    card: RateCard
    pico: int
    block_tokens: int


@dataclass(slots=True)
class Purse:
    """A tenant's slices for one model at this gateway."""

    key: PurseKey
    current: Slice | None = None
    packs: dict[str, Slice] = field(default_factory=dict)
    closing: list[Slice] = field(default_factory=list)
    offers: tuple[PackLeft, ...] = ()

    def slices(self) -> Iterator[Slice]:
        """All of them."""
        if self.current is not None:
            yield self.current
        yield from self.packs.values()
        yield from self.closing

    def reserve(self, need: Need, card: RateCard, now_s: float) -> Reservation | None:
        """Reserve what a request needs; None if a grant must be asked for first.

        From a pack all that it can cost, since it cannot go on with other money; else the input and
        a first block.
        """
        offer = self.payer(need)
        if offer is not None:
            part = self.packs.get(offer.pack.pack_id)
            if part is None or part.free_pico < need.most(offer.card):
                return None
            return _reserve(part, offer.card, need.most(offer.card), need.most_tokens, now_s)
        first_pico = need.first(card)
        if self.current is None or self.current.free_pico < first_pico:
            return None
        return _reserve(self.current, card, first_pico, need.block_tokens, now_s)

    def payer(self, need: Need) -> PackLeft | None:
        """The pack that is to pay: the first to expire that can pay all of it."""
        for offer in self.offers:
            part = self.packs.get(offer.pack.pack_id)
            free_pico = 0 if part is None or part.closing else part.free_pico
            if offer.available_pico + free_pico >= need.most(offer.card):
                return offer
        return None

    def drop(self, part: Slice) -> None:
        """Reserve from this slice no more; it ends when its requests have."""
        part.closing = True
        if part is self.current:
            self.current = None
        for pack_id, held in list(self.packs.items()):
            if held is part:
                del self.packs[pack_id]
        self.closing.append(part)


def extend(reservation: Reservation, output_tokens: int) -> bool:
    """Reserve another block of output; False if the slice has not that much free."""
    pico = output_tokens * reservation.card.output_pico
    if reservation.slice.free_pico < pico:
        return False
    reservation.slice.reserved_pico += pico
    reservation.pico += pico
    return True


def settle(reservation: Reservation, charge_pico: int, now_s: float) -> None:
    """The request has ended: what it cost is spent, the rest is free again.

    It still counts as one of the slice's until its record is safe.
    """
    part = reservation.slice
    assert 0 <= charge_pico <= reservation.pico, (charge_pico, reservation)
    part.reserved_pico -= reservation.pico
    part.spent_pico += charge_pico
    part.spend(charge_pico, now_s)
    reservation.pico = 0


def _reserve(
    part: Slice, card: RateCard, pico: int, block_tokens: int, now_s: float
) -> Reservation:
    part.reserved_pico += pico
    part.need_pico = max(pico, part.need_pico // 2)
    part.requests += 1
    part.used_s = max(part.used_s, now_s)
    return Reservation(part, card, pico, block_tokens)
