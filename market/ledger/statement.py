"""The nouns of a billing statement: one tenant or provider, one month. Values only, no queries.

Amounts are decimals of the currency with up to twelve places, exact as in the ledger's files.
"""

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, localcontext
from enum import StrEnum

# A decimal128(38, 12) has 38 digits; the default context of 28 would round a difference.
DIGITS = 60


class Party(StrEnum):
    """Whom a statement is for."""

    TENANT = "tenant"
    PROVIDER = "provider"


@dataclass(frozen=True, slots=True)
class Movement:
    """What changed the balance, per kind of transfer.

    ``amount`` is signed: positive adds to the party's balance.
    """

    kind: str
    count: int
    amount: Decimal


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Totals of one model in one lane; ``model`` is "-" where there is none.

    ``fee`` and ``share`` (of leases' holders who let idle time be sold) are for providers only, and
    None before the period is settled. ``credited_us`` is GPU time of leases that was not charged,
    because no healthy replica served.
    """

    model: str
    lane: str
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    gpu_us: int
    charge: Decimal
    fee: Decimal | None
    credited_us: int = 0
    share: Decimal | None = None

    @property
    def payout(self) -> Decimal | None:
        """What the provider gets of the charge; None as long as the fee is unknown."""
        if self.fee is None:
            return None
        with localcontext(prec=DIGITS):
            return self.charge - self.fee - (self.share or 0)


@dataclass(frozen=True, slots=True)
class DayTotal:
    """Totals of one day (UTC)."""

    day: date
    requests: int
    input_tokens: int
    output_tokens: int
    charge: Decimal


@dataclass(frozen=True, slots=True)
class Statement:
    """One party's balance and usage over ``[start, end)``; opening + movements = closing.

    ``settlement_id`` None: the period is not settled yet. ``checkpoint`` is a signed note about
    the ledger's log, several lines of text. The ``lsn`` range is the usage rows covered.
    """

    statement_id: str
    party: Party
    name: str
    issuer: str
    period: str
    start: datetime
    end: datetime
    currency: str
    opening: Decimal
    closing: Decimal
    movements: tuple[Movement, ...]
    lines: tuple[UsageLine, ...]
    days: tuple[DayTotal, ...]
    lsn_lo: int | None
    lsn_hi: int | None
    rows: int
    settlement_id: str | None
    checkpoint: str

    @property
    def preliminary(self) -> bool:
        """True until the period is settled."""
        return self.settlement_id is None
