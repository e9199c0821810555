"""Closing a period: usage sums -> fee, provider's share, the transfers that move them.

Pure: sums in, settlement out. The fee is rounded once per line, half-even, and so is, of what is
left, the share of a lease's holder whose idle time was sold; the provider gets the rest, by
subtraction, so nothing is made or lost.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from market import pricing
from market.accounts import (
    FEES,
    MARKET_PROVIDER,
    Transfer,
    TransferKind,
    provider_account,
    settled_account,
    tenant_account,
)

ALL_BPS = 10_000


@dataclass(frozen=True, slots=True)
class Line:
    """Usage of one tenant on one provider at one price; money in pico units, signed.

    ``lent_by``: whose lease it was served on, if it was lent.
    """

    tenant_id: str
    provider_id: str
    model: str
    lane: str
    kind: str
    price_id: str
    currency: str
    lent_by: str
    rows: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    gpu_us: int
    charge_pico: int
    fee_pico: int = 0
    share_pico: int = 0

    @property
    def payout_pico(self) -> int:
        """What the provider gets."""
        return self.charge_pico - self.fee_pico - self.share_pico


@dataclass(frozen=True, slots=True)
class Settlement:
    """A closed period: rows (lsn_after, lsn_until] of the usage ledger."""

    period: str
    lsn_after: int
    lsn_until: int
    fee_bps: int
    resale_bps: int
    lines: tuple[Line, ...]

    @property
    def settlement_id(self) -> str:
        """Derived from what was settled: the same inputs give the same id."""
        rates = f"{self.fee_bps}/{self.resale_bps}"
        content = f"{self.period}/{self.lsn_after}/{self.lsn_until}/{rates}"
        return f"settlement-{self.period}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def sha256(self) -> str:
        """Digest of every line, independent of any file format."""
        digest = hashlib.sha256(self.settlement_id.encode())
        for line in self.lines:
            digest.update(repr(astuple(line)).encode())
        return digest.hexdigest()

    @property
    def rows(self) -> int:
        """Usage rows covered."""
        return sum(line.rows for line in self.lines)

    @property
    def charge_pico(self) -> int:
        """What tenants were charged."""
        return sum(line.charge_pico for line in self.lines)

    @property
    def fee_pico(self) -> int:
        """The market's share."""
        return sum(line.fee_pico for line in self.lines)

    @property
    def share_pico(self) -> int:
        """The share of leases' holders."""
        return sum(line.share_pico for line in self.lines)


def settle(
    period: str,
    lsn_range: tuple[int, int],
    fee_bps: int,
    sums: Iterable[Line],
    resale_bps: int = 0,
) -> Settlement:
    """Put the fee and the share on every line.

    What the market itself gave away has no provider to pay a fee. A refund is at the provider's
    cost: a lease's holder keeps its share.
    """
    lines = sorted(sums, key=lambda line: astuple(line)[:8])
    priced = []
    for line in lines:
        fee_pico = pricing.fee(line.charge_pico, _bps(line, fee_bps))
        share_pico = 0
        if line.lent_by and line.charge_pico > 0:
            share_pico = pricing.fee(line.charge_pico - fee_pico, resale_bps)
        priced.append(replace(line, fee_pico=fee_pico, share_pico=share_pico))
    return Settlement(period, *lsn_range, fee_bps, resale_bps, tuple(priced))


def _bps(line: Line, fee_bps: int) -> int:
    return ALL_BPS if line.provider_id == MARKET_PROVIDER else fee_bps


def transfers(settlement: Settlement, made_by: str) -> list[Transfer]:
    """Per provider: the fee out of what it earned, the shares of those who lent it their leases,
    and the rest from payable to settled.

    Their ids are derived, so booking them twice changes nothing. A negative sum (more was taken
    back than earned) moves the other way.
    """
    fees: dict[tuple[str, str], int] = defaultdict(int)
    payouts: dict[tuple[str, str], int] = defaultdict(int)
    shares: dict[tuple[str, str, str], int] = defaultdict(int)
    for line in settlement.lines:
        shares[line.provider_id, line.lent_by, line.currency] += line.share_pico
        fees[line.provider_id, line.currency] += line.fee_pico
        payouts[line.provider_id, line.currency] += line.payout_pico
    moves = []
    for (provider_id, tenant_id, currency), amount_pico in sorted(shares.items()):
        holder = tenant_account(tenant_id)
        moves.append((TransferKind.RESALE, provider_id, holder, currency, amount_pico))
    for (provider_id, currency), amount_pico in sorted(fees.items()):
        moves.append((TransferKind.FEE, provider_id, FEES, currency, amount_pico))
        payout_pico = payouts[provider_id, currency]
        settled = settled_account(provider_id)
        moves.append((TransferKind.SETTLE, provider_id, settled, currency, payout_pico))
    return [
        Transfer(
            transfer_id=_transfer_id(settlement, kind, provider_id, target, currency),
            kind=kind,
            debit_account=provider_account(provider_id) if amount_pico > 0 else target,
            credit_account=target if amount_pico > 0 else provider_account(provider_id),
            amount_pico=abs(amount_pico),
            currency=currency,
            reason=f"settlement of {settlement.period}",
            made_by=made_by,
        )
        for kind, provider_id, target, currency, amount_pico in moves
        if amount_pico
    ]


def _transfer_id(
    settlement: Settlement, kind: TransferKind, provider_id: str, target: str, currency: str
) -> str:
    """Derived: of a provider's shares there is one for each holder."""
    name = f"{settlement.settlement_id}-{kind}-{provider_id}-{currency}"
    return f"{name}-{target}" if kind is TransferKind.RESALE else name
