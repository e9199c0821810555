"""Random commands, with repeats, against the invariants of the books (DESIGN section 9, 1 to 3)."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from market.accounts import (
    CASH,
    Books,
    HoldError,
    HoldState,
    HoldStatus,
    Transfer,
    TransferKind,
    TransferStatus,
    chart_of_accounts,
    prepaid_account,
    provider_account,
    tenant_account,
)
from tests.samples import hold_request

TENANTS = ("acme", "bolt")
PROVIDER = provider_account("local")
ACCOUNTS = (CASH, PROVIDER, *map(tenant_account, TENANTS))
amounts = st.integers(1, 1000)


class BooksMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.books = Books({a.account_id: a for a in chart_of_accounts("USD")})
        for account_id in ACCOUNTS[1:]:
            self.books.open_account(prepaid_account(account_id, "USD"))
        self.charged = 0

    @rule(
        number=st.integers(0, 15),
        debit=st.sampled_from(ACCOUNTS),
        credit=st.sampled_from(ACCOUNTS),
        amount=amounts,
    )
    def move(self, number, debit, credit, amount):
        if debit == credit:
            return
        transfer = Transfer(
            f"t{number}", TransferKind.DEPOSIT, debit, credit, amount, "USD", "", ""
        )
        known = self.books.transfers.get(transfer.transfer_id)
        before = dict(self.books.accounts)
        status = self.books.transfer(transfer)
        assert (status is TransferStatus.CREATED) == (self.books.accounts != before)
        if known is not None:
            same = known.content == transfer.content
            assert status is (TransferStatus.EXISTS if same else TransferStatus.EXISTS_DIFFERENT)

    @rule(
        number=st.integers(0, 15),
        tenant=st.sampled_from(TENANTS),
        minimum=amounts,
        extra=st.integers(0, 1000),
    )
    def hold(self, number, tenant, minimum, extra):
        request = hold_request(
            f"h{number}", tenant_id=tenant, minimum_pico=minimum, wanted_pico=minimum + extra
        )
        before = dict(self.books.accounts)
        result = self.books.open_hold(request)
        if result.status is HoldStatus.GRANTED:
            assert minimum <= result.hold.amount_pico <= minimum + extra
        else:
            assert self.books.accounts == before

    @rule(
        number=st.integers(0, 15),
        version=st.integers(0, 5),
        minimum=st.integers(0, 1500),
        extra=st.integers(0, 500),
    )
    def resize(self, number, version, minimum, extra):
        hold = self.books.holds.get(f"h{number}")
        before = dict(self.books.accounts)
        try:
            result = self.books.resize_hold(f"h{number}", version, minimum + extra, minimum)
        except HoldError:
            assert hold is None or hold.state is not HoldState.PENDING
            return
        if result.status is HoldStatus.GRANTED:
            assert version > hold.version
            assert result.hold.amount_pico >= hold.posted_pico
            assert result.hold.amount_pico >= minimum or hold.amount_pico >= minimum
            assert result.hold.amount_pico <= max(minimum + extra, hold.posted_pico)
        else:
            assert self.books.accounts == before

    @rule(number=st.integers(0, 15), share=st.floats(0, 1.1))
    def draw(self, number, share):
        hold = self.books.holds.get(f"h{number}")
        amount = int(hold.amount_pico * share) if hold else 0
        allowed = hold is not None and hold.state is HoldState.PENDING
        allowed = allowed and amount <= hold.left_pico
        before = (dict(self.books.accounts), dict(self.books.holds))
        try:
            self.books.draw_hold(f"h{number}", amount)
        except HoldError:
            assert not allowed
            assert before == (self.books.accounts, self.books.holds)
            return
        assert allowed
        if amount:
            self.charged += 1
            spend = Transfer(
                f"charge-{self.charged}",
                TransferKind.CHARGE,
                hold.account_id,
                PROVIDER,
                amount,
                "USD",
                "",
                "",
            )
            # What a hold set aside can always be paid.
            assert self.books.transfer(spend) is TransferStatus.CREATED

    @rule(number=st.integers(0, 15))
    def void(self, number):
        hold = self.books.holds.get(f"h{number}")
        try:
            self.books.void_hold(f"h{number}")
        except HoldError:
            assert hold is None or hold.state is not HoldState.PENDING

    @rule()
    def replay_everything(self):
        before = (dict(self.books.accounts), dict(self.books.holds))
        for transfer in list(self.books.transfers.values()):
            assert self.books.transfer(replace(transfer)) is TransferStatus.EXISTS
        for hold in list(self.books.holds.values()):
            assert self.books.open_hold(hold.request).status is HoldStatus.EXISTS
        assert before == (self.books.accounts, self.books.holds)

    @invariant()
    def debits_equal_credits(self):
        accounts = self.books.accounts.values()
        assert sum(a.debits_pico for a in accounts) == sum(a.credits_pico for a in accounts)

    @invariant()
    def nobody_is_overdrawn(self):
        for account in self.books.accounts.values():
            assert account.held_pico >= 0
            assert account.may_overdraw or account.available_pico >= 0

    @invariant()
    def held_money_is_the_sum_of_open_holds(self):
        for account_id, account in self.books.accounts.items():
            pending = [
                hold.left_pico
                for hold in self.books.holds.values()
                if hold.account_id == account_id and hold.state is HoldState.PENDING
            ]
            assert account.held_pico == sum(pending)


BooksMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = BooksMachine.TestCase
