"""The ledger's check of whole batches against the rules of pricing, one row at a time."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market import pricing
from market.errors import InvalidRequest
from market.ledger.rating import (
    check_tokens,
    money_column,
    money_sum,
    require_tokens,
    token_columns,
)
from market.ledger.schema import BATCH, MONEY, decode, encode_batch, money_array, money_picos
from market.types import FinishReason, Lane, RecordKind, TokenCounts, UsageRecord

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
DEAREST = 10**21  # a million tokens for 10^15 units, the most that a price can be


def card(number, *prices):
    return pricing.make_rate_card(f"model-{number}", prices, NOON, "USD")


CARDS = {
    one.price_id: one
    for one in (
        card(0, 100_000, 50_000, 400_000),
        card(1, 0, 0, 0),
        card(2, 1, 2, 3),
        card(3, 2**62, 2**61, 2**63 - 1),
        card(4, 2**63, DEAREST, 2**64 + 1),
    )
}
SMALL = dict(list(CARDS.items())[:3])
RIGHT, TOKENS = st.just(0), st.just(RecordKind.TOKENS)


def rated(price, counts, reason, lane, kind=RecordKind.TOKENS, wrong=0):
    """A row as a gateway writes it; ``wrong`` is added to what pricing says it costs."""
    return UsageRecord(
        kind=kind,
        request_id="req",
        tenant_id="acme",
        api_key_id=None,
        model=price.model,
        lane=lane,
        deployment_id=None,
        provider_id="local",
        node_id=None,
        gpu_type=None,
        gpu_milli=None,
        started_at=NOON,
        finished_at=NOON,
        input_tokens=counts.input_tokens,
        cached_input_tokens=counts.cached_input_tokens,
        output_tokens=counts.output_tokens,
        price_id=price.price_id,
        charge_pico=pricing.charge(counts, price, reason, lane) + wrong,
        currency="USD",
        finish_reason=reason,
    )


@st.composite
def records(draw, cards=CARDS, most=2**40, wrong=RIGHT, kinds=TOKENS):
    tokens = st.integers(0, draw(st.sampled_from([0, 3, 1000, most])))
    total = draw(tokens)
    counts = TokenCounts(total, draw(st.integers(0, total)), draw(tokens))
    return rated(
        cards[draw(st.sampled_from(sorted(cards)))],
        counts,
        draw(st.none() | st.sampled_from(FinishReason)),
        draw(st.sampled_from(Lane)),
        draw(kinds),
        draw(wrong),
    )


def batch_of(rows):
    return decode(encode_batch(rows))


class TestRating:
    @given(st.lists(records(), min_size=1, max_size=12))
    @settings(max_examples=300, deadline=None)
    def test_charges_of_pricing_are_accepted_however_large(self, rows):
        assert check_tokens(batch_of(rows), CARDS) is None

    @given(
        st.lists(records(wrong=st.sampled_from([0, 0, 0, 1, -1, 2**64])), min_size=1, max_size=9)
    )
    @settings(max_examples=300, deadline=None)
    def test_first_row_that_pricing_does_not_confirm_is_named(self, rows):
        expected = [
            pricing.charge(
                TokenCounts(row.input_tokens, row.cached_input_tokens, row.output_tokens),
                CARDS[row.price_id],
                row.finish_reason,
                row.lane,
            )
            for row in rows
        ]
        wrong = [n for n, row in enumerate(rows) if row.charge_pico != expected[n]]
        bad = check_tokens(batch_of(rows), CARDS)
        assert (bad and bad.index) == (wrong[0] if wrong else None)
        if bad is not None:
            assert "does not follow from" in bad.reason
            assert pricing.format_money(expected[bad.index]) in bad.reason
            with pytest.raises(InvalidRequest, match="does not follow"):
                require_tokens(batch_of(rows), CARDS)

    @given(
        st.lists(
            records(SMALL, 1000, st.sampled_from([0, 5]), st.sampled_from(RecordKind)), min_size=1
        )
    )
    @settings(deadline=None)
    def test_only_rows_of_tokens_are_rated(self, rows):
        bad = check_tokens(batch_of(rows), CARDS)
        wrong = [
            n
            for n, row in enumerate(rows)
            if row.kind is RecordKind.TOKENS and row != replace_charge(row)
        ]
        assert (bad and bad.index) == (wrong[0] if wrong else None)

    @given(st.lists(records(), min_size=2, max_size=10), st.data())
    @settings(deadline=None)
    def test_slice_is_rated_like_a_batch_of_its_own(self, rows, data):
        start = data.draw(st.integers(0, len(rows) - 1))
        one = rows[start]
        rows[start] = rated_again(one, one.charge_pico + 1)
        batch = batch_of(rows)
        assert check_tokens(batch.slice(start), CARDS).index == 0
        assert check_tokens(batch.slice(start + 1), CARDS) is None
        assert check_tokens(batch.slice(0, start), CARDS) is None

    @given(st.lists(records(SMALL), min_size=1, max_size=5), st.data())
    @settings(deadline=None)
    def test_unknown_price_is_named(self, rows, data):
        place = data.draw(st.integers(0, len(rows) - 1))
        rows[place] = with_fields(rows[place], price_id="price-0")
        bad = check_tokens(batch_of(rows), CARDS)
        assert (bad.index, bad.reason) == (place, "unknown price price-0")

    @given(
        st.lists(records(SMALL), min_size=1, max_size=5),
        st.sampled_from(
            [
                {"input_tokens": 1, "cached_input_tokens": 2},
                {"input_tokens": -1, "cached_input_tokens": -1},
                {"input_tokens": 5, "cached_input_tokens": -1},
                {"output_tokens": -1},
            ]
        ),
        st.data(),
    )
    @settings(deadline=None)
    def test_counts_that_pricing_refuses_are_refused(self, rows, counts, data):
        place = data.draw(st.integers(0, len(rows) - 1))
        bad_row = rows[place] = with_fields(rows[place], **counts)
        bad = check_tokens(batch_of(rows), CARDS)
        assert (bad.index, bad.reason) == (place, "impossible token counts")
        impossible = TokenCounts(
            bad_row.input_tokens, bad_row.cached_input_tokens, bad_row.output_tokens
        )
        with pytest.raises(ValueError, match="impossible"):
            pricing.token_cost(impossible, CARDS[bad_row.price_id])

    @given(st.lists(records(SMALL), min_size=1, max_size=5), st.data())
    @settings(deadline=None)
    def test_price_of_another_currency_is_refused_in_its_row(self, rows, data):
        place = data.draw(st.integers(0, len(rows) - 1))
        euro = replace(CARDS[rows[place].price_id], price_id="price-euro", currency="EUR")
        rows[place] = with_fields(rows[place], price_id="price-euro")
        bad = check_tokens(batch_of(rows), CARDS | {"price-euro": euro})
        assert "different currencies" in bad.reason
        assert bad.index == place

    @given(st.lists(st.sampled_from(["USD", "EUR"]), min_size=1, max_size=6))
    @settings(deadline=None)
    def test_several_currencies_in_one_batch_are_rated_each_at_its_price(self, currencies):
        counts = TokenCounts(100, 40, 10)
        dollar = next(iter(CARDS.values()))
        cards = {
            "USD": dollar,
            "EUR": replace(dollar, price_id="price-euro", currency="EUR", input_pico=7),
        }
        rows = [
            with_fields(rated(cards[name], counts, FinishReason.STOP, Lane.TOKENS), currency=name)
            for name in currencies
        ]
        known = {one.price_id: one for one in cards.values()}
        assert check_tokens(batch_of(rows), known) is None
        rows[-1] = rated_again(rows[-1], rows[-1].charge_pico + 1)
        assert check_tokens(batch_of(rows), known).index == len(rows) - 1

    @pytest.mark.parametrize("reason", [FinishReason.MARKET_FAULT, FinishReason.STOP, None])
    def test_tokens_need_a_price_even_if_they_are_free(self, reason):
        cards = CARDS | {pricing.NO_PRICE.price_id: pricing.NO_PRICE}
        free = rated(pricing.NO_PRICE, TokenCounts(0, 0, 0), reason, Lane.TOKENS)
        assert check_tokens(batch_of([free]), cards) is None
        some = rated(pricing.NO_PRICE, TokenCounts(1, 0, 0), reason, Lane.TOKENS)
        bad = check_tokens(batch_of([free, some]), cards)
        assert (bad.index, bad.reason) == (1, "tokens without a price")

    def test_empty_batch_is_fine(self):
        empty = BATCH.empty_table().to_batches()
        assert all(check_tokens(batch, CARDS) is None for batch in empty)


class TestColumns:
    @given(st.lists(st.integers(-(10**30), 10**30) | st.integers(-(2**64), 2**64), max_size=20))
    @settings(deadline=None)
    def test_money_survives_the_column(self, picos):
        column = money_array(picos)
        assert column.type == MONEY
        assert [int(pico) for pico in money_column(column, whole=True)] == picos
        assert [int(pico) for pico in money_column(column)] == picos
        assert money_picos(column) == picos

    @given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=9), st.data())
    def test_money_of_a_slice_is_that_of_the_slice(self, picos, data):
        start = data.draw(st.integers(0, len(picos) - 1))
        sliced = money_array(picos).slice(start)
        assert [int(pico) for pico in money_column(sliced)] == picos[start:]

    @given(st.lists(records(SMALL), min_size=1, max_size=5))
    @settings(deadline=None)
    def test_fresh_and_cached_tokens_are_the_input(self, rows):
        fresh, cached, output = token_columns(batch_of(rows))
        assert list(fresh + cached) == [row.input_tokens for row in rows]
        assert list(output) == [row.output_tokens for row in rows]


def with_fields(row, **changes):
    """The row with other values; its charge is that of before."""
    values = {name: getattr(row, name) for name in row.__struct_fields__}
    return UsageRecord(**(values | changes))


def rated_again(row, charge_pico):
    return with_fields(row, charge_pico=charge_pico)


def replace_charge(row):
    counts = TokenCounts(row.input_tokens, row.cached_input_tokens, row.output_tokens)
    right = pricing.charge(counts, CARDS[row.price_id], row.finish_reason, row.lane)
    return rated_again(row, right)


@given(st.lists(st.integers(-(10**37), 10**37), min_size=1, max_size=40), st.integers(0, 39))
def test_sum_of_a_money_column_is_exact_also_of_a_slice(picos, start):
    column = money_array(picos)
    assert money_sum(column) == sum(picos)
    assert money_sum(column.slice(start)) == sum(picos[start:])
