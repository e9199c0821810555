"""Budgets: what a key or tenant may spend in an hour, a day, a month, or at all. Pure.

Periods are those of the calendar in UTC. What is spent is counted by the time of booking, what is
held counts in full, so no number of requests or gateways spends more than the limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from market.types import Budget, Period

FOREVER = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Spend:
    """What was spent, in pico units, in the period that began at ``since``."""

    since: datetime
    spent_pico: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """What may be set aside: now, and once what is held now has returned.

    ``subject`` is that of the tightest budget, ``resets_at`` when it begins anew; None for never.
    """

    now_pico: int
    later_pico: int
    period: Period
    resets_at: datetime | None
    subject: str


def window(period: Period, now: datetime) -> tuple[datetime, datetime | None]:
    """[start, end) of the period around ``now``; the total has no end."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    match period:
        case Period.HOUR:
            start = now.replace(minute=0, second=0, microsecond=0)
            return start, start + timedelta(hours=1)
        case Period.DAY:
            return day, day + timedelta(days=1)
        case Period.MONTH:
            first = day.replace(day=1)
            return first, (first + timedelta(days=32)).replace(day=1)
        case Period.TOTAL:
            return FOREVER, None


def spent(spend: Spend | None, period: Period, now: datetime) -> int:
    """What of a spend still counts at ``now``, in pico units."""
    return spend.spent_pico if spend and spend.since == window(period, now)[0] else 0


def add(spend: Spend | None, period: Period, now: datetime, amount_pico: int) -> Spend:
    """The spend with another charge."""
    return Spend(window(period, now)[0], spent(spend, period, now) + amount_pico)


def allowance(
    budgets: Iterable[tuple[Budget, int]],
    spends: Mapping[tuple[str, Period], Spend],
    now: datetime,
) -> Allowance | None:
    """What the tightest of some budgets, each with what is held of it, leaves; None without any."""
    found = None
    for budget, held_pico in budgets:
        used_pico = spent(spends.get((budget.subject, budget.period)), budget.period, now)
        later_pico = max(0, budget.limit_pico - used_pico)
        now_pico = max(0, later_pico - held_pico)
        if found is None or (now_pico, later_pico) < (found.now_pico, found.later_pico):
            resets_at = window(budget.period, now)[1]
            found = Allowance(now_pico, later_pico, budget.period, resets_at, budget.subject)
    return found
