"""Periods of the calendar in UTC, and the tightest of several budgets."""

from datetime import UTC, datetime, timedelta

import pytest

from market import budgets
from market.budgets import FOREVER, Spend, allowance, window
from market.types import Budget, Period

NOW = datetime(2026, 12, 31, 23, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        (Period.HOUR, datetime(2026, 12, 31, 23, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (Period.DAY, datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (Period.MONTH, datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (Period.TOTAL, FOREVER, None),
    ],
)
def test_windows_follow_the_calendar(period, start, end):
    assert window(period, NOW) == (start, end)


def test_spending_counts_in_its_own_window_only():
    spend = budgets.add(None, Period.DAY, NOW, 5)
    spend = budgets.add(spend, Period.DAY, NOW + timedelta(minutes=1), 7)
    assert budgets.spent(spend, Period.DAY, NOW) == 12
    tomorrow = NOW + timedelta(hours=1)
    assert budgets.spent(spend, Period.DAY, tomorrow) == 0
    assert budgets.add(spend, Period.DAY, tomorrow, 3).spent_pico == 3


def test_without_budgets_there_is_no_limit():
    assert allowance([], {}, NOW) is None


def test_the_tightest_budget_counts_with_what_is_held_of_it():
    day, month = Budget("key-1", Period.DAY, 100), Budget("tenant:acme", Period.MONTH, 1000)
    spends = {
        ("key-1", Period.DAY): Spend(window(Period.DAY, NOW)[0], 30),
        ("tenant:acme", Period.MONTH): Spend(window(Period.MONTH, NOW)[0], 950),
    }
    found = allowance([(day, 10), (month, 10)], spends, NOW)
    assert (found.now_pico, found.later_pico, found.period) == (40, 50, Period.MONTH)
    assert found.resets_at == datetime(2027, 1, 1, tzinfo=UTC)
    found = allowance([(day, 60), (month, 10)], spends, NOW)
    assert (found.now_pico, found.later_pico, found.period) == (10, 70, Period.DAY)


def test_what_is_left_is_never_below_zero():
    total = Budget("key-1", Period.TOTAL, 10)
    found = allowance([(total, 50)], {("key-1", Period.TOTAL): Spend(FOREVER, 70)}, NOW)
    assert (found.now_pico, found.later_pico, found.resets_at) == (0, 0, None)
