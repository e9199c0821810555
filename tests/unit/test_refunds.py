"""Refunds over the real ledger: new rows and transfers that take back, never edits."""

from decimal import Decimal

import pandas as pd
import pytest

from market.accounts import MARKET_PROVIDER, provider_account, tenant_account
from market.errors import Conflict, InvalidRequest, NotFound
from market.ledger.audit import Auditor
from market.ledger.refunds import Refund
from market.ledger.reports import UsageQuery
from market.ledger.schema import encode_batch
from market.pricing import format_money, to_decimal
from market.types import FinishReason
from tests.contracts.test_ledger import CHARGE, COUNTS, record
from tests.samples import hold_request
from tests.unit.test_audit import verify_here
from tests.unit.test_ledger_files import Box

TEN = 10 * 10**12
GIFT = 10**11


def refund(refund_id="refund-1", **changes):
    values = {"tenant_id": "acme", "reason": "garbled answer", "made_by": "key-op"}
    return Refund(refund_id, **({"request_id": "req-1"} | values | changes))


def gift(refund_id="refund-1", **changes):
    return refund(refund_id, **({"request_id": None, "amount_pico": GIFT} | changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Auditor, "_in_own_process", verify_here)


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


@pytest.fixture
async def ledger(box):
    async with box.open() as ledger:
        await box.prepare(ledger)
        await box.serve(ledger, 2)
        yield ledger


async def balances(ledger):
    return {account.account_id: account.balance_pico for account in await ledger.accounts()}


async def verified(ledger):
    report = await ledger.verify()
    assert report["finding"] is None
    return report


class TestWholeRequest:
    async def test_is_a_row_with_tokens_and_charge_negated(self, ledger):
        answer = await ledger.refund(refund())
        assert answer == {"lsn": 3, "refunded": format_money(CHARGE), "created": True}
        original, reversal = await ledger.request("req-1")
        assert (reversal["kind"], reversal["reverses_lsn"]) == ("reversal", original["lsn"])
        assert original["charge"] == to_decimal(CHARGE) == -reversal["charge"]
        counts = ("input_tokens", "cached_input_tokens", "output_tokens")
        assert [reversal[name] for name in counts] == [
            *(-COUNTS.input_tokens, -COUNTS.cached_input_tokens, -COUNTS.output_tokens)
        ]
        same = ("tenant_id", "model", "lane", "provider_id", "price_id", "currency", "api_key_id")
        same += ("deployment_id", "node_id", "gpu_type", "started_at", "finished_at")
        assert [reversal[name] for name in same] == [original[name] for name in same]
        assert reversal["finish_reason"] is None
        assert (reversal["producer"], reversal["lsn"]) == ("ledger", 3)

    async def test_gives_the_money_back_at_the_providers_cost(self, ledger):
        await ledger.refund(refund())
        found = await balances(ledger)
        assert found[tenant_account("acme")] == TEN - CHARGE
        assert found[provider_account("local")] == CHARGE

    async def test_says_who_and_why_in_the_row_and_in_a_transfer(self, ledger, box):
        await ledger.refund(refund())
        _, reversal = await ledger.request("req-1")
        assert dict(reversal["attrs"]) == {
            "made_by": "key-op",
            "reason": "garbled answer",
            "refund_id": "refund-1",
        }
        await ledger.publish()
        (moved,) = box.transfers().query("kind == 'refund'").to_dict("records")
        assert moved["debit_account"] == provider_account("local")
        assert moved["credit_account"] == tenant_account("acme")
        assert (moved["amount"], moved["lsn_lo"], moved["lsn_hi"]) == (to_decimal(CHARGE), 3, 3)

    async def test_takes_back_what_was_saved_with_it(self, ledger, box):
        amount = 10 * CHARGE
        shared = hold_request("slice-9", epoch=box.epoch, wanted_pico=amount, minimum_pico=amount)
        await ledger.open_hold(shared)
        dear = ("not_taken", "big"), ("not_taken_charge", format_money(3 * CHARGE))
        drawn = record(shared, request_id="req-9", attrs=dear)
        await ledger.append("gw0", box.epoch, box.seq, encode_batch([drawn]))

        async def saved():
            (row,) = await ledger.usage(UsageQuery(("lane",)))
            return row["saved"]

        assert await saved() == to_decimal(2 * CHARGE)
        await ledger.refund(refund("refund-8", request_id="req-1", amount_pico=1))
        assert await saved() == to_decimal(2 * CHARGE)
        await ledger.refund(refund(request_id="req-9"))
        assert await saved() == 0
        await verified(ledger)

    async def test_leaves_a_ledger_that_verifies(self, ledger, box):
        await ledger.refund(refund())
        await ledger.refund(refund("refund-2", request_id="req-2", amount_pico=CHARGE // 3))
        await ledger.refund(gift("refund-3"))
        await ledger.refund(gift("refund-4", provider_id="local"))
        await verified(ledger)
        await ledger.publish()
        report = await verified(ledger)
        assert report["rows"] == len(box.usage()) + len(box.transfers())

    async def test_of_a_request_of_a_slice_touches_no_hold(self, ledger, box):
        amount = 10 * CHARGE
        shared = hold_request("slice-9", epoch=box.epoch, wanted_pico=amount, minimum_pico=amount)
        await ledger.open_hold(shared)
        drawn = record(shared, request_id="req-9")
        await ledger.append("gw0", box.epoch, box.seq, encode_batch([drawn]))
        await ledger.refund(refund(request_id="req-9"))
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (TEN - 2 * CHARGE, 9 * CHARGE)
        await verified(ledger)

    async def test_asking_for_the_full_amount_is_the_same(self, ledger):
        await ledger.refund(refund(amount_pico=CHARGE))
        _, row = await ledger.request("req-1")
        assert row["kind"] == "reversal"
        assert (await ledger.refund(refund()))["created"] is False

    async def test_works_after_the_row_is_published_compacted_and_pruned(self, ledger, box):
        box.clock.advance(2 * 86_400)
        await ledger.keep_house()
        await ledger.refund(refund())
        await verified(ledger)


class TestPart:
    async def test_is_an_adjustment_without_tokens(self, ledger):
        answer = await ledger.refund(refund(amount_pico=CHARGE // 4))
        assert answer["refunded"] == format_money(CHARGE // 4)
        _, row = await ledger.request("req-1")
        assert (row["kind"], row["reverses_lsn"]) == ("adjustment", 1)
        assert row["charge"] == -to_decimal(CHARGE // 4)
        assert (row["input_tokens"], row["cached_input_tokens"], row["output_tokens"]) == (0, 0, 0)
        found = await balances(ledger)
        assert found[tenant_account("acme")] == TEN - 2 * CHARGE + CHARGE // 4
        assert found[provider_account("local")] == 2 * CHARGE - CHARGE // 4

    async def test_may_come_in_pieces_up_to_the_charge_and_no_further(self, ledger):
        for number in range(4):
            await ledger.refund(refund(f"refund-{number}", amount_pico=CHARGE // 4))
        with pytest.raises(Conflict) as caught:
            await ledger.refund(refund("refund-9", amount_pico=1))
        assert caught.value.code == "already_refunded"
        assert (await balances(ledger))[tenant_account("acme")] == TEN - CHARGE
        await verified(ledger)

    async def test_larger_than_the_charge_is_refused(self, ledger):
        with pytest.raises(Conflict) as caught:
            await ledger.refund(refund(amount_pico=CHARGE + 1))
        assert caught.value.code == "already_refunded"
        assert len(await ledger.request("req-1")) == 1

    async def test_and_then_the_whole_is_refused(self, ledger):
        await ledger.refund(refund(amount_pico=1))
        with pytest.raises(Conflict):
            await ledger.refund(refund("refund-2"))

    async def test_after_the_whole_is_refused(self, ledger):
        await ledger.refund(refund())
        for again in (refund("refund-2"), refund("refund-2", amount_pico=1)):
            with pytest.raises(Conflict):
                await ledger.refund(again)
        assert (await balances(ledger))[tenant_account("acme")] == TEN - CHARGE


class TestGift:
    async def test_is_at_the_markets_cost(self, ledger):
        await ledger.refund(gift())
        found = await balances(ledger)
        assert found[tenant_account("acme")] == TEN - 2 * CHARGE + GIFT
        assert found[provider_account(MARKET_PROVIDER)] == -GIFT
        assert found[provider_account("local")] == 2 * CHARGE

    async def test_may_be_at_a_providers_cost(self, ledger):
        await ledger.refund(gift(provider_id="local"))
        found = await balances(ledger)
        assert found[provider_account("local")] == 2 * CHARGE - GIFT
        assert found[provider_account(MARKET_PROVIDER)] == 0

    async def test_may_be_more_than_the_provider_has_earned(self, ledger):
        await ledger.refund(gift(provider_id="local", amount_pico=TEN))
        assert (await balances(ledger))[provider_account("local")] == 2 * CHARGE - TEN
        await verified(ledger)

    async def test_is_a_row_without_request_tokens_or_price(self, ledger, box):
        await ledger.refund(gift())
        await ledger.publish()
        row = box.usage().to_dict("records")[-1]
        assert (row["kind"], row["price_id"], row["charge"]) == (
            "adjustment",
            "none",
            -Decimal(GIFT).scaleb(-12),
        )
        assert pd.isna(row["request_id"])
        assert dict(row["attrs"])["reason"] == "garbled answer"

    @pytest.mark.parametrize(
        "changes", [{"provider_id": "nobody"}, {"tenant_id": "nobody"}, {"tenant_id": ""}]
    )
    async def test_of_somebody_unknown_is_refused(self, ledger, changes):
        before = await balances(ledger)
        with pytest.raises(InvalidRequest, match="there is no"):
            await ledger.refund(gift(**changes))
        assert await balances(ledger) == before

    async def test_beyond_64_bits_stays_exact(self, ledger):
        huge = 10**27
        await ledger.refund(gift(amount_pico=huge))
        assert (await balances(ledger))[tenant_account("acme")] == TEN - 2 * CHARGE + huge
        await verified(ledger)


class TestSameId:
    @pytest.mark.parametrize("make", [refund, gift])
    async def test_again_books_nothing(self, ledger, make):
        first = await ledger.refund(make())
        before = await balances(ledger)
        assert await ledger.refund(make()) == first | {"created": False}
        assert await balances(ledger) == before

    @pytest.mark.parametrize("make", [refund, gift])
    async def test_again_after_a_restart_books_nothing(self, box, make):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
            first = await ledger.refund(make())
        async with box.open() as ledger:
            assert await ledger.refund(make()) == first | {"created": False}

    async def test_reason_may_be_worded_otherwise(self, ledger):
        await ledger.refund(refund())
        assert (await ledger.refund(refund(reason="as said")))["created"] is False

    @pytest.mark.parametrize(
        "other",
        [
            refund(request_id="req-2"),
            refund(amount_pico=1),
            gift(),
            gift(amount_pico=CHARGE),
        ],
        ids=["request", "amount", "gift", "gift-of-the-same-amount"],
    )
    async def test_for_something_else_is_refused(self, ledger, other):
        await ledger.refund(refund())
        before = await balances(ledger)
        with pytest.raises(Conflict):
            await ledger.refund(other)
        assert await balances(ledger) == before

    @pytest.mark.parametrize("changes", [{"provider_id": "local"}, {"tenant_id": "bolt"}])
    async def test_at_the_cost_or_for_the_good_of_another_is_refused(self, ledger, changes):
        await ledger.create_tenant("bolt")
        await ledger.refund(gift())
        before = await balances(ledger)
        with pytest.raises(Conflict):
            await ledger.refund(gift(**changes))
        assert await balances(ledger) == before


class TestRefused:
    async def test_request_of_another_tenant(self, ledger):
        await ledger.create_tenant("bolt")
        with pytest.raises(InvalidRequest, match="not one of bolt"):
            await ledger.refund(refund(tenant_id="bolt"))

    async def test_request_that_is_not_on_record(self, ledger):
        with pytest.raises(NotFound) as caught:
            await ledger.refund(refund(request_id="req-99"))
        assert caught.value.code == "request_not_found"

    async def test_request_that_was_not_charged(self, ledger, box):
        await box.serve(ledger, 1, FinishReason.PROVIDER_ERROR)
        with pytest.raises(InvalidRequest, match="not charged"):
            await ledger.refund(refund(request_id="req-3"))
        with pytest.raises(Conflict):
            await ledger.refund(refund(request_id="req-3", amount_pico=1))

    @pytest.mark.parametrize(
        "changes",
        [
            {"reason": " "},
            {"request_id": None},
            {"provider_id": "local"},
            {"amount_pico": 0},
            {"amount_pico": -1},
        ],
        ids=["no reason", "nothing", "provider of a request", "zero", "negative"],
    )
    def test_what_makes_no_sense(self, changes):
        with pytest.raises(InvalidRequest):
            refund(**changes)
