"""Double entry with two-phase transfers: the state machine of the books.

One door, no I/O: whoever stores accounts and holds loads the ones a step needs into ``Books``,
calls its methods, and writes back what changed. Refusals are statuses and change nothing; a hold
ends once (posted or voided). Vocabulary: debit, credit, pending -> post / void, as in TigerBeetle.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from market.errors import MarketFault
from market.types import HoldRequest

CASH = "cash"
FEES = "fees"
SUSPENSE = "suspense"


def tenant_account(tenant_id: str) -> str:
    """Account id of what the market owes a tenant (its prepaid balance)."""
    return f"tenant:{tenant_id}"


def provider_account(provider_id: str) -> str:
    """Account id of what the market owes a provider."""
    return f"provider:{provider_id}"


class Side(StrEnum):
    """The side on which an account grows."""

    DEBIT = "debit"
    CREDIT = "credit"


@dataclass(frozen=True, slots=True)
class Account:
    """Sums of everything ever debited and credited, and what is set aside of the balance."""

    account_id: str
    side: Side
    may_overdraw: bool
    currency: str
    debits_pico: int = 0
    credits_pico: int = 0
    held_pico: int = 0

    @property
    def balance_pico(self) -> int:
        """Positive on the account's own side."""
        difference = self.credits_pico - self.debits_pico
        return difference if self.side is Side.CREDIT else -difference

    @property
    def available_pico(self) -> int:
        """Balance that no hold has claimed."""
        return self.balance_pico - self.held_pico


class TransferKind(StrEnum):
    """What a transfer is for."""

    DEPOSIT = "deposit"
    CHARGE = "charge"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Money from one account to another. ``lsn_lo``..``lsn_hi`` are the usage rows it pays for."""

    transfer_id: str
    kind: TransferKind
    debit_account: str
    credit_account: str
    amount_pico: int
    currency: str
    reason: str
    made_by: str
    lsn_lo: int | None = None
    lsn_hi: int | None = None

    @property
    def content(self) -> tuple[str, str, str, int, str]:
        """What must be the same when an id comes again; the reason's wording may differ."""
        return (
            self.kind,
            self.debit_account,
            self.credit_account,
            self.amount_pico,
            self.currency,
        )


class TransferStatus(StrEnum):
    """Outcome of a transfer; ``EXISTS`` means it was made before, with the same content."""

    CREATED = "created"
    EXISTS = "exists"
    EXISTS_DIFFERENT = "exists_different"
    ACCOUNT_NOT_FOUND = "account_not_found"
    CURRENCY_DIFFERS = "currency_differs"
    EXCEEDS_BALANCE = "exceeds_balance"


class HoldState(StrEnum):
    """Life of a hold: pending, then one of three ends."""

    PENDING = "pending"
    POSTED = "posted"
    VOIDED = "voided"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Hold:
    """Money set aside on a tenant's account for one request."""

    request: HoldRequest
    amount_pico: int
    state: HoldState = HoldState.PENDING
    posted_pico: int = 0

    @property
    def account_id(self) -> str:
        """The account whose balance it claims."""
        return tenant_account(self.request.tenant_id)


class HoldStatus(StrEnum):
    """Outcome of asking for a hold."""

    GRANTED = "granted"
    EXISTS = "exists"
    ACCOUNT_NOT_FOUND = "account_not_found"
    EXCEEDS_BALANCE = "exceeds_balance"
    EXCEEDS_UNTIL_OTHERS_END = "exceeds_until_others_end"


@dataclass(frozen=True, slots=True)
class HoldResult:
    """``hold`` is set if granted now or before; ``available_pico`` explains a refusal."""

    status: HoldStatus
    hold: Hold | None
    available_pico: int


class HoldError(MarketFault):
    """A hold was used against its life or beyond its amount: a bug in the caller."""

    code = "hold_error"


class Books:
    """Accounts, holds and transfers that one step works on.

    ``changed_accounts``, ``changed_holds`` and ``new_transfers`` are what must be stored.
    """

    def __init__(
        self,
        accounts: Iterable[Account] = (),
        holds: Iterable[Hold] = (),
        transfers: Iterable[Transfer] = (),
    ) -> None:
        self.accounts = {account.account_id: account for account in accounts}
        self.holds = {hold.request.hold_id: hold for hold in holds}
        self.transfers = {transfer.transfer_id: transfer for transfer in transfers}
        self.changed_accounts: set[str] = set()
        self.changed_holds: set[str] = set()
        self.new_transfers: list[Transfer] = []

    def open_account(self, account: Account) -> bool:
        """Add an account; False if it is there already (nothing changes then)."""
        if account.account_id in self.accounts:
            return False
        self._put_account(account)
        return True

    def transfer(self, transfer: Transfer) -> TransferStatus:
        """Move money at once. Raises ValueError for an amount that is not positive."""
        if transfer.amount_pico <= 0 or transfer.debit_account == transfer.credit_account:
            raise ValueError(f"not a transfer: {transfer}")
        known = self.transfers.get(transfer.transfer_id)
        if known is not None:
            same = known.content == transfer.content
            return TransferStatus.EXISTS if same else TransferStatus.EXISTS_DIFFERENT
        debit = self.accounts.get(transfer.debit_account)
        credit = self.accounts.get(transfer.credit_account)
        if debit is None or credit is None:
            return TransferStatus.ACCOUNT_NOT_FOUND
        if not debit.currency == credit.currency == transfer.currency:
            return TransferStatus.CURRENCY_DIFFERS
        debit = replace(debit, debits_pico=debit.debits_pico + transfer.amount_pico)
        credit = replace(credit, credits_pico=credit.credits_pico + transfer.amount_pico)
        if any(_overdrawn(account) for account in (debit, credit)):
            return TransferStatus.EXCEEDS_BALANCE
        self._put_account(debit)
        self._put_account(credit)
        self.transfers[transfer.transfer_id] = transfer
        self.new_transfers.append(transfer)
        return TransferStatus.CREATED

    def open_hold(self, request: HoldRequest) -> HoldResult:
        """Set money aside: all that is wanted, or what there is if it reaches the minimum."""
        if not 0 <= request.minimum_pico <= request.wanted_pico:
            raise ValueError(f"hold wants {request.wanted_pico}, at least {request.minimum_pico}")
        account = self.accounts.get(tenant_account(request.tenant_id))
        if account is None:
            return HoldResult(HoldStatus.ACCOUNT_NOT_FOUND, None, 0)
        known = self.holds.get(request.hold_id)
        if known is not None:
            return HoldResult(HoldStatus.EXISTS, known, account.available_pico)
        available = account.available_pico
        if available < request.minimum_pico:
            others_hold_it = account.balance_pico >= request.minimum_pico
            status = (
                HoldStatus.EXCEEDS_UNTIL_OTHERS_END
                if others_hold_it
                else HoldStatus.EXCEEDS_BALANCE
            )
            return HoldResult(status, None, available)
        hold = Hold(request, min(request.wanted_pico, available))
        self._put_account(replace(account, held_pico=account.held_pico + hold.amount_pico))
        self._put_hold(hold)
        return HoldResult(HoldStatus.GRANTED, hold, available - hold.amount_pico)

    def post_hold(self, hold_id: str, amount_pico: int) -> Hold:
        """End a hold as used up to ``amount_pico``; the caller makes the transfer itself.

        Raises HoldError if it is unknown, ended, or smaller than the amount.
        """
        hold = self._pending(hold_id)
        if not 0 <= amount_pico <= hold.amount_pico:
            raise HoldError(f"hold {hold_id} of {hold.amount_pico} cannot post {amount_pico}")
        return self._end_hold(replace(hold, state=HoldState.POSTED, posted_pico=amount_pico))

    def void_hold(self, hold_id: str) -> Hold:
        """End a hold unused. Raises HoldError if it is unknown or ended."""
        return self._end_hold(replace(self._pending(hold_id), state=HoldState.VOIDED))

    def expire_hold(self, hold_id: str) -> Hold:
        """End a hold whose owner is gone. Raises HoldError if it is unknown or ended."""
        return self._end_hold(replace(self._pending(hold_id), state=HoldState.EXPIRED))

    def _pending(self, hold_id: str) -> Hold:
        hold = self.holds.get(hold_id)
        if hold is None:
            raise HoldError(f"hold {hold_id} is unknown")
        if hold.state is not HoldState.PENDING:
            raise HoldError(f"hold {hold_id} ended before: {hold.state}")
        return hold

    def _end_hold(self, ended: Hold) -> Hold:
        account = self.accounts[ended.account_id]
        held = account.held_pico - ended.amount_pico
        assert held >= 0, f"{account.account_id} would hold {held}"
        self._put_account(replace(account, held_pico=held))
        self._put_hold(ended)
        return ended

    def _put_account(self, account: Account) -> None:
        self.accounts[account.account_id] = account
        self.changed_accounts.add(account.account_id)

    def _put_hold(self, hold: Hold) -> None:
        self.holds[hold.request.hold_id] = hold
        self.changed_holds.add(hold.request.hold_id)


def _overdrawn(account: Account) -> bool:
    return not account.may_overdraw and account.available_pico < 0


def chart_of_accounts(currency: str) -> tuple[Account, ...]:
    """The market's own accounts, present from the start."""
    return (
        Account(CASH, Side.DEBIT, may_overdraw=False, currency=currency),
        Account(FEES, Side.CREDIT, may_overdraw=False, currency=currency),
        Account(SUSPENSE, Side.CREDIT, may_overdraw=True, currency=currency),
    )


def prepaid_account(account_id: str, currency: str) -> Account:
    """A tenant's or provider's account: the market owes its balance and never lends."""
    return Account(account_id, Side.CREDIT, may_overdraw=False, currency=currency)
