"""Closing a period against exact fractions: nothing is made or lost, to the last pico unit."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import pricing, settlement
from market.accounts import (
    FEES,
    MARKET_PROVIDER,
    Books,
    TransferKind,
    TransferStatus,
    chart_of_accounts,
    prepaid_account,
    provider_account,
    provider_accounts,
    settled_account,
    tenant_account,
)
from market.settlement import ALL_BPS, Line

JANUARY = datetime(2026, 1, 1, tzinfo=UTC)
PROVIDERS = ("hub", "local", MARKET_PROVIDER)
charges = st.integers(-(10**30), 10**30) | st.integers(-30_000, 30_000)
bps = st.integers(0, ALL_BPS)
SHARE_BPS = 3_333


@st.composite
def lines(draw, charge=charges):
    return Line(
        tenant_id=draw(st.sampled_from(["acme", "bolt"])),
        provider_id=draw(st.sampled_from(PROVIDERS)),
        model=draw(st.sampled_from(["tiny", "big", ""])),
        lane=draw(st.sampled_from(["tokens", "lease"])),
        kind=draw(st.sampled_from(["tokens", "gpu", "reversal"])),
        price_id=draw(st.sampled_from(["price-1", "price-2"])),
        currency=draw(st.sampled_from(["USD", "EUR"])),
        lent_by=draw(st.sampled_from(["", "acme", "lender"])),
        rows=draw(st.integers(1, 5)),
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        gpu_us=0,
        charge_pico=draw(charge),
    )


def key(line):
    who = (line.tenant_id, line.provider_id, line.lent_by)
    return (*who, line.model, line.lane, line.kind, line.price_id)


many = st.lists(lines(), max_size=12, unique_by=lambda line: (*key(line), line.currency))


def half_even(charge_pico, fee_bps):
    exact = Fraction(charge_pico * fee_bps, ALL_BPS)
    with localcontext(prec=80):
        quotient = Decimal(exact.numerator) / Decimal(exact.denominator)
        return int(quotient.quantize(Decimal(1), ROUND_HALF_EVEN))


class TestFee:
    @given(charges, bps)
    def test_is_the_exact_share_rounded_half_even(self, charge, fee_bps):
        assert pricing.fee(charge, fee_bps) == half_even(charge, fee_bps)

    @given(charges, bps)
    def test_is_never_more_than_half_a_pico_unit_off(self, charge, fee_bps):
        exact = Fraction(charge * fee_bps, ALL_BPS)
        assert abs(pricing.fee(charge, fee_bps) - exact) <= Fraction(1, 2)

    @given(charges, bps)
    def test_of_a_refund_is_that_of_the_charge_taken_back(self, charge, fee_bps):
        assert pricing.fee(-charge, fee_bps) == -pricing.fee(charge, fee_bps)

    @pytest.mark.parametrize(
        ("charge", "fee"),
        [(5, 0), (15, 2), (25, 2), (35, 4), (-5, 0), (-15, -2), (-25, -2), (9, 1)],
    )
    def test_halves_go_to_the_even_side(self, charge, fee):
        assert pricing.fee(charge, 1000) == fee


class TestSettle:
    @given(many, bps)
    def test_fee_and_payout_of_each_line_are_its_charge(self, sums, fee_bps):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        assert len(settled.lines) == len(sums)
        for line in settled.lines:
            assert line.fee_pico + line.share_pico + line.payout_pico == line.charge_pico
            rate = ALL_BPS if line.provider_id == MARKET_PROVIDER else fee_bps
            assert line.fee_pico == half_even(line.charge_pico, rate)
            lent = line.lent_by and line.charge_pico > 0
            share = half_even(line.charge_pico - line.fee_pico, SHARE_BPS) if lent else 0
            assert line.share_pico == share
        assert settled.charge_pico == sum(line.charge_pico for line in sums)
        assert settled.rows == sum(line.rows for line in sums)

    @given(many, bps)
    def test_what_the_market_gives_away_costs_no_provider(self, sums, fee_bps):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        own = [line for line in settled.lines if line.provider_id == MARKET_PROVIDER]
        assert all(line.payout_pico == 0 for line in own)

    @given(many, bps, st.randoms(use_true_random=False))
    def test_order_of_the_sums_changes_nothing(self, sums, fee_bps, random):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        random.shuffle(sums)
        again = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        assert (again, again.sha256) == (settled, settled.sha256)

    @given(st.lists(lines(), min_size=1, max_size=5, unique_by=key), bps, st.data())
    def test_any_change_changes_the_digest(self, sums, fee_bps, data):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        changed = list(sums)
        place = data.draw(st.integers(0, len(sums) - 1))
        field = data.draw(st.sampled_from(["charge_pico", "rows", "output_tokens", "gpu_us"]))
        value = getattr(sums[place], field)
        changed[place] = replace(sums[place], **{field: value + 1})
        assert (
            settlement.settle("2026-11", (0, 9), fee_bps, changed, SHARE_BPS).sha256
            != settled.sha256
        )
        for other in (("2026-10", (0, 9)), ("2026-11", (1, 9)), ("2026-11", (0, 8))):
            again = settlement.settle(*other, fee_bps, sums, SHARE_BPS)
            assert again.settlement_id != settled.settlement_id
            assert again.sha256 != settled.sha256


class TestTransfers:
    @given(many, bps)
    def test_sum_to_the_lines_per_provider_and_currency(self, sums, fee_bps):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        moved = defaultdict(int)
        for transfer in settlement.transfers(settled, "key-op"):
            assert transfer.amount_pico > 0
            debit, credit = transfer.debit_account, transfer.credit_account
            if transfer.kind is TransferKind.RESALE:
                assert credit in {"tenant:acme", "tenant:lender"}
                name = debit.removeprefix("provider:")
                moved[name, transfer.kind, transfer.currency] += transfer.amount_pico
                continue
            payable, sign = (debit, 1) if debit.startswith("provider:") else (credit, -1)
            other = credit if sign > 0 else debit
            name = payable.removeprefix("provider:")
            expected = FEES if transfer.kind is TransferKind.FEE else settled_account(name)
            assert other == expected
            moved[name, transfer.kind, transfer.currency] += sign * transfer.amount_pico
        wanted = defaultdict(int)
        for line in settled.lines:
            wanted[line.provider_id, TransferKind.FEE, line.currency] += line.fee_pico
            wanted[line.provider_id, TransferKind.SETTLE, line.currency] += line.payout_pico
            wanted[line.provider_id, TransferKind.RESALE, line.currency] += line.share_pico
        assert moved == {name: pico for name, pico in wanted.items() if pico}

    @given(many, bps)
    def test_ids_are_derived_and_unique(self, sums, fee_bps):
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        ids = [transfer.transfer_id for transfer in settlement.transfers(settled, "key-op")]
        again = [transfer.transfer_id for transfer in settlement.transfers(settled, "somebody")]
        assert ids == again
        assert len(set(ids)) == len(ids)

    @given(many, bps)
    def test_leave_every_payable_at_zero_and_make_no_money(self, sums, fee_bps):
        sums = [replace(line, currency="USD") for line in sums]
        books = Books({a.account_id: a for a in chart_of_accounts("USD")})
        for name in PROVIDERS:
            for account in provider_accounts(name, "USD"):
                books.open_account(account)
        for name in ("acme", "lender"):
            books.open_account(prepaid_account(tenant_account(name), "USD"))
        earned = dict.fromkeys(PROVIDERS, 0)
        for line in sums:
            earned[line.provider_id] += line.charge_pico
        for name, pico in earned.items():
            account = books.accounts[provider_account(name)]
            books.accounts[provider_account(name)] = account.moved(credit_pico=pico)
        settled = settlement.settle("2026-11", (0, 9), fee_bps, sums, SHARE_BPS)
        for transfer in settlement.transfers(settled, "key-op"):
            assert books.transfer(transfer) is TransferStatus.CREATED
            assert books.transfer(transfer) is TransferStatus.EXISTS
        for name in PROVIDERS:
            assert books.accounts[provider_account(name)].balance_pico == 0
        assert books.accounts[FEES].balance_pico == settled.fee_pico
        paid = sum(books.accounts[settled_account(name)].balance_pico for name in PROVIDERS)
        assert paid == settled.charge_pico - settled.fee_pico - settled.share_pico
        accounts = [books.accounts[tenant_account(name)] for name in ("acme", "lender")]
        assert sum(account.balance_pico for account in accounts) == settled.share_pico


class TestGpuCharge:
    @given(
        st.integers(0, 10**15),
        st.lists(st.integers(0, 10**9), max_size=20),
        st.integers(0, 10**12),
    )
    def test_any_cutting_of_a_span_costs_the_floor_of_the_whole(self, price, cuts, before):
        card = pricing.make_rate_card("offer", (0, 0, 0), JANUARY, "USD", price)
        charges, elapsed = [], before
        for segment in cuts:
            charges.append(pricing.gpu_charge(elapsed, segment, card.gpu_hour_pico))
            elapsed += segment
        hour = pricing.GPU_US_PER_HOUR
        assert sum(charges) == elapsed * price // hour - before * price // hour
        assert all(charge >= 0 for charge in charges)
        if before == 0:
            assert sum(charges) == Fraction(elapsed * price, hour).__floor__()

    @given(st.integers(0, 10**15), st.integers(0, 10**9), st.integers(0, 10**12))
    def test_each_segment_is_within_a_pico_unit_of_its_exact_price(self, price, segment, before):
        card = pricing.make_rate_card("offer", (0, 0, 0), JANUARY, "USD", price)
        exact = Fraction(segment * price, pricing.GPU_US_PER_HOUR)
        assert abs(pricing.gpu_charge(before, segment, card.gpu_hour_pico) - exact) < 1

    @pytest.mark.parametrize(("before", "segment"), [(-1, 1), (1, -1)])
    def test_negative_times_are_refused(self, before, segment):
        card = pricing.make_rate_card("offer", (0, 0, 0), JANUARY, "USD", 1)
        with pytest.raises(ValueError, match="impossible"):
            pricing.gpu_charge(before, segment, card.gpu_hour_pico)
