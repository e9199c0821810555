from dataclasses import replace

import pytest

from market.accounts import (
    CASH,
    Books,
    HoldError,
    HoldState,
    HoldStatus,
    TransferStatus,
    chart_of_accounts,
    prepaid_account,
    provider_account,
    tenant_account,
)
from market.budgets import Allowance
from market.types import Period
from tests.samples import deposit, hold_request

TENANT = tenant_account("acme")


@pytest.fixture
def books():
    books = Books({a.account_id: a for a in chart_of_accounts("USD")})
    books.open_account(prepaid_account(TENANT, "USD"))
    books.open_account(prepaid_account(provider_account("local"), "USD"))
    return books


def with_balance(books, pico):
    books.transfer(replace(deposit("1"), amount_pico=pico))
    return books


class TestTransfer:
    def test_debits_one_account_and_credits_the_other(self, books):
        assert books.transfer(deposit("10")) is TransferStatus.CREATED
        assert books.accounts[TENANT].balance_pico == 10 * 10**12
        assert books.accounts[CASH].balance_pico == 10 * 10**12

    def test_same_id_again_changes_nothing(self, books):
        books.transfer(deposit("10"))
        again = replace(deposit("10"), reason="other words")
        assert books.transfer(again) is TransferStatus.EXISTS
        assert books.accounts[TENANT].balance_pico == 10 * 10**12

    def test_same_id_with_other_money_is_refused(self, books):
        books.transfer(deposit("10"))
        assert books.transfer(deposit("11")) is TransferStatus.EXISTS_DIFFERENT
        assert books.accounts[TENANT].balance_pico == 10 * 10**12

    def test_cannot_overdraw(self, books):
        back = replace(deposit("1"), debit_account=TENANT, credit_account=CASH)
        assert books.transfer(back) is TransferStatus.EXCEEDS_BALANCE
        assert books.new_transfers == []

    def test_cannot_take_what_a_hold_has_claimed(self, books):
        with_balance(books, 100)
        books.open_hold(hold_request(wanted_pico=60))
        spend = replace(
            deposit("1", "spend"),
            debit_account=TENANT,
            credit_account=provider_account("local"),
            amount_pico=41,
        )
        assert books.transfer(spend) is TransferStatus.EXCEEDS_BALANCE
        assert books.transfer(replace(spend, amount_pico=40)) is TransferStatus.CREATED

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            ({"credit_account": "tenant:nobody"}, TransferStatus.ACCOUNT_NOT_FOUND),
            ({"currency": "EUR"}, TransferStatus.CURRENCY_DIFFERS),
        ],
    )
    def test_refusals_change_nothing(self, books, change, status):
        assert books.transfer(replace(deposit("1"), **change)) is status
        assert books.accounts[CASH].balance_pico == 0

    @pytest.mark.parametrize("amount", [0, -1])
    def test_amount_must_be_positive(self, books, amount):
        with pytest.raises(ValueError, match="not a transfer"):
            books.transfer(replace(deposit("1"), amount_pico=amount))


class TestHold:
    def test_takes_all_that_is_wanted(self, books):
        result = with_balance(books, 1000).open_hold(hold_request())
        assert result.status is HoldStatus.GRANTED
        assert result.hold.amount_pico == 100
        assert books.accounts[TENANT].available_pico == 900

    def test_takes_what_there_is_down_to_the_minimum(self, books):
        assert with_balance(books, 70).open_hold(hold_request()).hold.amount_pico == 70

    def test_below_the_minimum_is_refused(self, books):
        result = with_balance(books, 49).open_hold(hold_request())
        assert (result.status, result.hold) == (HoldStatus.EXCEEDS_BALANCE, None)

    def test_says_if_only_other_holds_are_in_the_way(self, books):
        with_balance(books, 100).open_hold(hold_request("a"))
        result = books.open_hold(hold_request("b"))
        assert result.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END

    def test_same_id_again_returns_the_first(self, books):
        first = with_balance(books, 1000).open_hold(hold_request()).hold
        again = books.open_hold(hold_request())
        assert (again.status, again.hold) == (HoldStatus.EXISTS, first)
        assert books.accounts[TENANT].held_pico == 100

    def test_unknown_tenant_has_none(self, books):
        result = books.open_hold(hold_request(tenant_id="nobody"))
        assert result.status is HoldStatus.ACCOUNT_NOT_FOUND

    def test_is_drawn_on_and_returns_the_rest_at_its_end(self, books):
        with_balance(books, 1000).open_hold(hold_request())
        assert books.draw_hold("slice-1", 30).left_pico == 70
        ended = books.void_hold("slice-1")
        assert (ended.state, ended.posted_pico) == (HoldState.VOIDED, 30)
        assert books.accounts[TENANT].held_pico == 0

    def test_cannot_be_drawn_on_beyond_its_amount(self, books):
        with_balance(books, 1000).open_hold(hold_request())
        books.draw_hold("slice-1", 60)
        with pytest.raises(HoldError):
            books.draw_hold("slice-1", 41)
        assert books.holds["slice-1"].left_pico == 40

    @pytest.mark.parametrize("again", ["draw", "void", "grow"])
    def test_ends_only_once(self, books, again):
        with_balance(books, 1000).open_hold(hold_request())
        books.void_hold("slice-1")
        uses = {
            "draw": lambda: books.draw_hold("slice-1", 1),
            "void": lambda: books.void_hold("slice-1"),
            "grow": lambda: books.resize_hold("slice-1", 1, 200, 0),
        }
        with pytest.raises(HoldError, match="ended before"):
            uses[again]()

    def test_budget_bounds_it_below_the_balance(self, books):
        with_balance(books, 1000)
        allowance = Allowance(60, 80, Period.DAY, None, "key-1")
        assert books.open_hold(hold_request("a"), allowance).hold.amount_pico == 60

    @pytest.mark.parametrize(
        ("allowance", "status"),
        [
            ((40, 40), HoldStatus.EXCEEDS_BUDGET),
            ((40, 60), HoldStatus.EXCEEDS_UNTIL_OTHERS_END),
        ],
    )
    def test_budget_that_is_too_small_says_so(self, books, allowance, status):
        with_balance(books, 1000)
        result = books.open_hold(hold_request(), Allowance(*allowance, Period.DAY, None, "key-1"))
        assert (result.status, result.hold, result.available_pico) == (status, None, 40)

    def test_balance_below_the_budget_is_the_reason(self, books):
        with_balance(books, 20)
        result = books.open_hold(hold_request(), Allowance(40, 40, Period.DAY, None, "key-1"))
        assert result.status is HoldStatus.EXCEEDS_BALANCE

    def test_unknown_one_cannot_end(self, books):
        with pytest.raises(HoldError, match="unknown"):
            books.void_hold("req-gw0-9")
