from dataclasses import replace
from decimal import Decimal

import pytest

from market import pricing
from market.errors import InvalidRequest
from market.types import FinishReason, Lane, TokenCounts
from tests.samples import CARD, NOON


class TestMoney:
    @pytest.mark.parametrize(
        ("text", "pico"),
        [("10", 10 * 10**12), ("0.000000000001", 1), ("-2.5", -2_500_000_000_000), ("1e3", 10**15)],
    )
    def test_is_parsed_exactly(self, text, pico):
        assert pricing.parse_money(text) == pico

    @pytest.mark.parametrize(
        "text", ["", "ten", "NaN", "Infinity", "0.0000000000001", "1e16", "1." + "0" * 40 + "1"]
    )
    def test_refuses_what_is_no_exact_amount(self, text):
        with pytest.raises(InvalidRequest):
            pricing.parse_money(text)

    @pytest.mark.parametrize("pico", [0, 1, -1, 10**12, 1_500_000_000_000, 10**27 + 7])
    def test_formats_to_what_it_parses_from(self, pico):
        assert Decimal(pricing.format_money(pico)) == pricing.to_decimal(pico)

    def test_formats_without_trailing_zeros(self):
        assert pricing.format_money(1_500_000_000_000) == "1.5"
        assert pricing.format_money(-3 * 10**12) == "-3"


class TestPrices:
    def test_six_decimals_per_million_are_exact_per_token(self):
        assert pricing.parse_price("0.000001", "input") == 1
        assert pricing.format_price(pricing.parse_price("0.15", "input")) == "0.15"

    @pytest.mark.parametrize("text", ["0.0000001", "-1"])
    def test_finer_or_negative_prices_are_refused(self, text):
        with pytest.raises(InvalidRequest):
            pricing.parse_price(text, "input")

    def test_id_depends_on_every_part_of_the_content(self):
        base = pricing.make_rate_card("m", (1, 2, 3), NOON, "USD")
        others = [
            pricing.make_rate_card("n", (1, 2, 3), NOON, "USD"),
            pricing.make_rate_card("m", (1, 2, 4), NOON, "USD"),
            pricing.make_rate_card("m", (1, 2, 3), NOON.replace(hour=13), "USD"),
            pricing.make_rate_card("m", (1, 2, 3), NOON, "EUR"),
        ]
        assert len({card.price_id for card in [base, *others]}) == 5
        assert base == pricing.make_rate_card("m", (1, 2, 3), NOON, "USD")


class TestCharge:
    """The table of the README, row by row."""

    COUNTS = TokenCounts(100, 40, 10)
    FULL = 60 * 100_000 + 40 * 50_000 + 10 * 400_000

    @pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "budget"])
    def test_finished_answers_cost_input_and_output(self, reason):
        assert self.charge(self.COUNTS, reason) == self.FULL

    def test_client_who_hangs_up_pays_input_and_what_was_generated(self):
        assert self.charge(self.COUNTS, "client_disconnect") == self.FULL

    def test_client_who_hangs_up_before_the_first_token_pays_nothing(self):
        assert self.charge(TokenCounts(100, 0, 0), "client_disconnect") == 0

    @pytest.mark.parametrize("reason", ["provider_error", "market_fault"])
    def test_our_faults_cost_nothing(self, reason):
        assert self.charge(self.COUNTS, reason) == 0

    def test_tokens_on_a_lease_cost_nothing(self):
        assert pricing.charge(self.COUNTS, CARD, FinishReason.STOP, Lane.LEASE) == 0

    def test_impossible_counts_are_a_bug(self):
        with pytest.raises(ValueError, match="impossible"):
            pricing.token_cost(TokenCounts(1, 2, 0), CARD)

    @staticmethod
    def charge(counts, reason):
        return pricing.charge(counts, CARD, FinishReason(reason), Lane.TOKENS)


class TestAffordableOutput:
    def test_is_what_is_left_after_the_input(self):
        held = pricing.ceiling(100, 7, CARD)
        assert pricing.affordable_output(held, 100, CARD) == 7
        assert pricing.affordable_output(held - 1, 100, CARD) == 6
        assert pricing.affordable_output(0, 100, CARD) == 0

    def test_is_unbounded_if_output_is_free(self):
        assert pricing.affordable_output(0, 0, replace(CARD, output_pico=0)) is None
