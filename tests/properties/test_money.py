"""Prices and books against exact fractions, on inputs that nobody would think of."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from market import pricing
from market.types import FinishReason, Lane, TokenCounts
from tests.samples import NOON

prices = st.integers(0, 10**12)
tokens = st.integers(0, 10**9)


@given(st.integers(-(10**27), 10**27))
def test_money_survives_text(pico):
    assert pricing.parse_money(pricing.format_money(pico)) == pico


@given(st.decimals(0, 10**6, places=6), st.integers(0, 10**9))
def test_a_price_per_million_is_exact_for_any_number_of_tokens(price, count):
    per_token = pricing.parse_price(str(price), "price")
    assert Fraction(per_token * count, 10**12) == Fraction(str(price)) * count / 10**6


@st.composite
def rated(draw):
    card = pricing.make_rate_card("m", (draw(prices), draw(prices), draw(prices)), NOON, "USD")
    input_tokens = draw(tokens)
    counts = TokenCounts(input_tokens, draw(st.integers(0, input_tokens)), draw(tokens))
    return card, counts


@given(rated(), st.sampled_from(FinishReason), st.sampled_from(Lane))
def test_charge_never_exceeds_the_ceiling_nor_falls_below_zero(card_and_counts, reason, lane):
    card, counts = card_and_counts
    charge = pricing.charge(counts, card, reason, lane)
    assert 0 <= charge <= pricing.ceiling(counts.input_tokens, counts.output_tokens, card)


@given(rated(), st.integers(0, 10**24))
def test_affordable_output_is_the_most_that_fits(card_and_counts, held):
    card, counts = card_and_counts
    fits = pricing.affordable_output(held, counts.input_tokens, card)
    if fits is None:
        assert card.output_pico == 0
        return
    if held >= pricing.ceiling(counts.input_tokens, 0, card):
        assert pricing.ceiling(counts.input_tokens, fits, card) <= held
    assert pricing.ceiling(counts.input_tokens, fits + 1, card) > held
