"""Double entry with two-phase transfers: the state machine of the books.

One door, no I/O: whoever stores accounts and holds loads the ones a step needs into ``Books``,
calls its methods, and writes back what changed. Refusals are statuses and change nothing; a hold is
drawn on, can grow and shrink, and ends once. Vocabulary: debit, credit, pending -> post / void, as
in TigerBeetle.
"""

from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from market.budgets import Allowance
from market.errors import MarketFault
from market.types import HoldRequest, PackLeft

CASH = "cash"
FEES = "fees"
SUSPENSE = "suspense"
# The provider of what the market itself gives away (adjustments that no GPU owner pays for).
MARKET_PROVIDER = "market"


def tenant_account(tenant_id: str) -> str:
    """Account id of what the market owes a tenant (its prepaid balance)."""
    return f"tenant:{tenant_id}"


def pack_account(tenant_id: str, pack_id: str) -> str:
    """Account id of what is left of a tenant's token pack."""
    return f"pack:{tenant_id}:{pack_id}"


def holder_of(account_id: str) -> str:
    """The tenant whose money is in a ``tenant:`` or ``pack:`` account."""
    return account_id.split(":")[1]


def provider_account(provider_id: str) -> str:
    """Account id of what a provider has earned since the last settlement (payable)."""
    return f"provider:{provider_id}"


def settled_account(provider_id: str) -> str:
    """Account id of what was settled for a provider, its fee taken, and is to be paid out."""
    return f"settled:{provider_id}"


class Side(StrEnum):
    """The side on which an account grows."""

    DEBIT = "debit"
    CREDIT = "credit"


class Account(msgspec.Struct, frozen=True, gc=False):
    """Sums of everything ever debited and credited, and what is set aside of the balance.

    (A Struct like Hold: a batch makes hundreds of them, and frozen dataclasses are slow to make.)
    """

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

    def moved(self, debit_pico: int = 0, credit_pico: int = 0, held_pico: int = 0) -> "Account":
        """The account after these changes."""
        return Account(
            self.account_id,
            self.side,
            self.may_overdraw,
            self.currency,
            self.debits_pico + debit_pico,
            self.credits_pico + credit_pico,
            self.held_pico + held_pico,
        )


class TransferKind(StrEnum):
    """What a transfer is for."""

    DEPOSIT = "deposit"
    CHARGE = "charge"
    REFUND = "refund"
    PURCHASE = "purchase"
    EXPIRE = "expire"
    RELEASE = "release"
    FEE = "fee"
    SETTLE = "settle"
    RESALE = "resale"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Money from one account to another. ``lsn_lo``..``lsn_hi`` are the usage rows it pays for.

    A ``release`` has the same account on both sides: money set aside is free again.
    """

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
    """Life of a hold: pending, then ended by its owner or, when that is gone, for it."""

    PENDING = "pending"
    VOIDED = "voided"
    EXPIRED = "expired"


class Hold(msgspec.Struct, frozen=True):
    """Money set aside on a tenant's account; ``posted_pico`` of it was used.

    ``version`` is that of the last change of its amount: older ones come too late.
    """

    request: HoldRequest
    amount_pico: int
    state: HoldState = HoldState.PENDING
    posted_pico: int = 0
    version: int = 0

    @property
    def left_pico(self) -> int:
        """What is still set aside; once ended, what was given back."""
        return self.amount_pico - self.posted_pico

    @property
    def account_id(self) -> str:
        """The account whose balance it claims."""
        return account_of(self.request)


def account_of(request: HoldRequest) -> str:
    """The account on which money is to be set aside."""
    if request.pack_id is not None:
        return pack_account(request.tenant_id, request.pack_id)
    return tenant_account(request.tenant_id)


class HoldStatus(StrEnum):
    """Outcome of asking for a hold."""

    GRANTED = "granted"
    EXISTS = "exists"
    ACCOUNT_NOT_FOUND = "account_not_found"
    EXCEEDS_BALANCE = "exceeds_balance"
    EXCEEDS_BUDGET = "exceeds_budget"
    EXCEEDS_UNTIL_OTHERS_END = "exceeds_until_others_end"


@dataclass(frozen=True, slots=True)
class HoldResult:
    """``hold`` is set if granted now or before; the other fields explain a refusal.

    ``available_pico`` is what is left, by the account or by the budget that ``allowance`` tells of.
    ``packs`` of the tenant for the model, first to expire first, might pay instead;
    ``elsewhere_pico`` is held for the tenant's tokens by other producers.
    """

    status: HoldStatus
    hold: Hold | None
    available_pico: int
    allowance: Allowance | None = None
    packs: tuple[PackLeft, ...] = ()
    elsewhere_pico: int = 0


class HoldError(MarketFault):
    """A hold was used against its life or beyond its amount: a bug in the caller."""

    code = "hold_error"


class Books:
    """The accounts, holds and transfers that one step works on.

    Given mappings are read, never written: ``accounts``, ``holds`` and ``transfers`` lay the
    step's changes over them, and ``changed_accounts``, ``changed_holds`` and ``new_transfers``
    are what must be stored.
    """

    def __init__(
        self,
        accounts: MutableMapping[str, Account] | None = None,
        holds: MutableMapping[str, Hold] | None = None,
        transfers: MutableMapping[str, Transfer] | None = None,
    ) -> None:
        self.changed_accounts: dict[str, Account] = {}
        self.changed_holds: dict[str, Hold] = {}
        self._stored_accounts = accounts if accounts is not None else {}
        self._stored_holds = holds if holds is not None else {}
        self.accounts = ChainMap(self.changed_accounts, self._stored_accounts)
        self.holds = ChainMap(self.changed_holds, self._stored_holds)
        self.transfers = ChainMap({}, transfers if transfers is not None else {})
        self.new_transfers: list[Transfer] = []

    def open_account(self, account: Account) -> bool:
        """Add an account; False if it is there already (nothing changes then)."""
        if account.account_id in self.accounts:
            return False
        self.accounts[account.account_id] = account
        return True

    def transfer(self, transfer: Transfer) -> TransferStatus:
        """Move money at once. Raises ValueError for an amount that is not positive."""
        if transfer.amount_pico <= 0 or transfer.debit_account == transfer.credit_account:
            raise ValueError(f"not a transfer: {transfer}")
        known = self.transfers.get(transfer.transfer_id)
        if known is not None:
            same = known.content == transfer.content
            return TransferStatus.EXISTS if same else TransferStatus.EXISTS_DIFFERENT
        debit = self._account(transfer.debit_account)
        credit = self._account(transfer.credit_account)
        if debit is None or credit is None:
            return TransferStatus.ACCOUNT_NOT_FOUND
        if not debit.currency == credit.currency == transfer.currency:
            return TransferStatus.CURRENCY_DIFFERS
        debit = debit.moved(debit_pico=transfer.amount_pico)
        credit = credit.moved(credit_pico=transfer.amount_pico)
        if _overdrawn(debit) or _overdrawn(credit):
            return TransferStatus.EXCEEDS_BALANCE
        self.changed_accounts[debit.account_id] = debit
        self.changed_accounts[credit.account_id] = credit
        self._note(transfer)
        return TransferStatus.CREATED

    def open_hold(self, request: HoldRequest, allowance: Allowance | None = None) -> HoldResult:
        """Set money aside: all that is wanted, or what there is if it reaches the minimum.

        ``allowance`` is what budgets leave of it.
        """
        _check_amounts(request.wanted_pico, request.minimum_pico)
        account = self._account(account_of(request))
        if account is None:
            return HoldResult(HoldStatus.ACCOUNT_NOT_FOUND, None, 0)
        known = self._hold(request.hold_id)
        if known is not None:
            return HoldResult(HoldStatus.EXISTS, known, account.available_pico)
        available = _available(account, allowance)
        if available < request.minimum_pico:
            return _refusal(account, allowance, request.minimum_pico)
        hold = Hold(request, min(request.wanted_pico, available))
        self._hold_money(hold.account_id, hold.amount_pico)
        self.holds[request.hold_id] = hold
        return HoldResult(HoldStatus.GRANTED, hold, available - hold.amount_pico)

    def resize_hold(
        self,
        hold_id: str,
        version: int,
        wanted_pico: int,
        minimum_pico: int,
        allowance: Allowance | None = None,
    ) -> HoldResult:
        """Make a hold amount to ``wanted_pico`` in all, or to what there is from the minimum on.

        It never falls below what was posted. A ``version`` that is not newer than the last one
        changes nothing. Raises HoldError if the hold is unknown or ended.
        """
        _check_amounts(wanted_pico, minimum_pico)
        hold = self._pending(hold_id)
        account = self._account(hold.account_id)
        assert account is not None, hold
        available = _available(account, allowance)
        if version <= hold.version:
            return HoldResult(HoldStatus.EXISTS, hold, available)
        extra_pico = max(wanted_pico, hold.posted_pico) - hold.amount_pico
        if extra_pico > available:
            missing_pico = minimum_pico - hold.amount_pico
            if missing_pico > available:
                return _refusal(account, allowance, missing_pico)
            extra_pico = available
        self._hold_money(hold.account_id, extra_pico)
        resized = msgspec.structs.replace(
            hold, amount_pico=hold.amount_pico + extra_pico, version=version
        )
        self.holds[hold_id] = resized
        return HoldResult(HoldStatus.GRANTED, resized, available - extra_pico)

    def draw_hold(self, hold_id: str, amount_pico: int) -> Hold:
        """Use part of a hold that stays open; the caller makes the transfer itself.

        Raises HoldError if it is unknown, ended, or smaller than what is drawn in all.
        """
        hold = self._pending(hold_id)
        if not 0 <= amount_pico <= hold.left_pico:
            raise HoldError(f"hold {hold_id} has {hold.left_pico} left, cannot post {amount_pico}")
        self._hold_money(hold.account_id, -amount_pico)
        posted_pico = hold.posted_pico + amount_pico
        drawn = Hold(hold.request, hold.amount_pico, hold.state, posted_pico, hold.version)
        self.holds[hold_id] = drawn
        return drawn

    def void_hold(self, hold_id: str) -> Hold:
        """End a hold; what is left of it returns. Raises HoldError if it is unknown or ended."""
        return self._end_hold(hold_id, HoldState.VOIDED)

    def expire_hold(self, hold_id: str) -> Hold:
        """End a hold whose owner is gone. Raises HoldError if it is unknown or ended."""
        return self._end_hold(hold_id, HoldState.EXPIRED)

    def release(self, transfer: Transfer) -> None:
        """Put the end of holds on record; their money is free already."""
        assert transfer.kind is TransferKind.RELEASE, transfer
        assert transfer.debit_account == transfer.credit_account, transfer
        self._note(transfer)

    def _pending(self, hold_id: str) -> Hold:
        hold = self._hold(hold_id)
        if hold is None:
            raise HoldError(f"hold {hold_id} is unknown")
        if hold.state is not HoldState.PENDING:
            raise HoldError(f"hold {hold_id} ended before: {hold.state}")
        return hold

    def _end_hold(self, hold_id: str, state: HoldState) -> Hold:
        hold = self._pending(hold_id)
        self._hold_money(hold.account_id, -hold.left_pico)
        ended = Hold(hold.request, hold.amount_pico, state, hold.posted_pico, hold.version)
        self.holds[hold_id] = ended
        return ended

    def _hold_money(self, account_id: str, amount_pico: int) -> None:
        account = self._account(account_id)
        assert account is not None, account_id
        account = account.moved(held_pico=amount_pico)
        assert account.held_pico >= 0, f"{account_id} would hold {account.held_pico}"
        self.changed_accounts[account_id] = account

    def _account(self, account_id: str) -> Account | None:
        return self.changed_accounts.get(account_id) or self._stored_accounts.get(account_id)

    def _hold(self, hold_id: str) -> Hold | None:
        return self.changed_holds.get(hold_id) or self._stored_holds.get(hold_id)

    def _note(self, transfer: Transfer) -> None:
        self.transfers[transfer.transfer_id] = transfer
        self.new_transfers.append(transfer)


def _check_amounts(wanted_pico: int, minimum_pico: int) -> None:
    if not 0 <= minimum_pico <= wanted_pico:
        raise ValueError(f"hold wants {wanted_pico}, at least {minimum_pico}")


def _available(account: Account, allowance: Allowance | None) -> int:
    """What can be set aside, by the account and by budgets."""
    if allowance is None:
        return account.available_pico
    return min(account.available_pico, allowance.now_pico)


def _refusal(account: Account, allowance: Allowance | None, missing_pico: int) -> HoldResult:
    """Why ``missing_pico`` cannot be set aside: the tighter of budget and balance says it."""
    by_budget = allowance is not None and allowance.now_pico < min(
        missing_pico, account.available_pico + 1
    )
    later_pico = allowance.later_pico if by_budget and allowance else account.balance_pico
    if later_pico >= missing_pico:
        status = HoldStatus.EXCEEDS_UNTIL_OTHERS_END
    else:
        status = HoldStatus.EXCEEDS_BUDGET if by_budget else HoldStatus.EXCEEDS_BALANCE
    return HoldResult(status, None, _available(account, allowance), allowance)


def _overdrawn(account: Account) -> bool:
    return not account.may_overdraw and account.available_pico < 0


def chart_of_accounts(currency: str) -> tuple[Account, ...]:
    """The market's own accounts, present from the start."""
    return (
        Account(CASH, Side.DEBIT, may_overdraw=False, currency=currency),
        Account(FEES, Side.CREDIT, may_overdraw=True, currency=currency),
        Account(SUSPENSE, Side.CREDIT, may_overdraw=True, currency=currency),
        *provider_accounts(MARKET_PROVIDER, currency),
    )


def prepaid_account(account_id: str, currency: str) -> Account:
    """A tenant's account: the market owes its balance and never lends."""
    return Account(account_id, Side.CREDIT, may_overdraw=False, currency=currency)


def provider_accounts(provider_id: str, currency: str) -> tuple[Account, Account]:
    """Payable and settled. A refund after a settlement may take both below zero until the next."""
    payable, settled = provider_account(provider_id), settled_account(provider_id)
    return (
        Account(payable, Side.CREDIT, may_overdraw=True, currency=currency),
        Account(settled, Side.CREDIT, may_overdraw=True, currency=currency),
    )
