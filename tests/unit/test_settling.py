"""Closing months over the real ledger: exactly once, from sealed rows, to the last pico unit."""

import contextlib
import io
import json
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal

import msgspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from market import pricing
from market.accounts import (
    CASH,
    FEES,
    MARKET_PROVIDER,
    provider_account,
    settled_account,
    tenant_account,
)
from market.errors import InvalidRequest, MarketFault, NotFound
from market.ledger import settling
from market.ledger.audit import Auditor
from market.ledger.refunds import Refund
from market.ledger.schema import encode_batch
from market.ledger.service import Ledger
from market.ledger.settling import read_lines
from market.ledger.statement import Party
from market.metering import LENT_BY
from market.pricing import format_money, to_decimal
from market.types import FinishReason, TokenCounts
from tests.contracts.test_ledger import record
from tests.samples import CARD, deposit, hold_request
from tests.unit.test_audit import verify_here
from tests.unit.test_ledger_files import Box

DAY = 86_400
MONTH = 30 * DAY
NOVEMBER, DECEMBER = "2026-11", "2026-12"
# 100 fresh and 3 output tokens at prices of odd pico units: fees that need rounding.
ODD = pricing.make_rate_card("odd", (33, 11, 7), datetime(2026, 1, 1, tzinfo=UTC), "USD")
USED = {  # (tenant, provider, card) -> number of requests with as many tokens
    ("acme", "local", CARD): 3,
    ("acme", "hub", CARD): 2,
    ("bolt", "local", CARD): 1,
    ("acme", "local", ODD): 5,
    ("bolt", "hub", ODD): 1,
}


def counts(number):
    return TokenCounts(100 + number, 40, 3)


def charge(card, number):
    return pricing.token_cost(counts(number), card)


class Months(Box):
    """A ledger that knows two tenants, two providers and two prices, and can serve any of them."""

    @contextlib.asynccontextmanager
    async def open(self):
        """One that failed for good is not closed: its process would be gone."""
        ledger = Ledger(self.config, self.clock, on_fatal=lambda: self.fatal.append(1))
        await ledger.open()
        try:
            yield ledger
        finally:
            if not self.fatal:
                await ledger.close()

    async def prepare(self, ledger):
        await super().prepare(ledger)
        await ledger.create_tenant("bolt")
        await ledger.create_provider("hub")
        await ledger.add_rate_cards([ODD], only_new_models=False)
        await ledger.transfer(deposit("5", "deposit-bolt", "bolt"))

    async def use(
        self, ledger, tenant="acme", provider="local", card=CARD, number=0, attrs=(), **changes
    ):
        """One request; returns its id and charge."""
        self._requests += 1
        name, cost = f"req-{self._requests}", charge(card, number)
        request = hold_request(
            f"slice-{name}",
            **{
                "epoch": self.epoch,
                "tenant_id": tenant,
                "model": card.model,
                "wanted_pico": cost,
                "minimum_pico": cost,
                "started_at": self.clock.now(),
            }
            | changes,
        )
        await ledger.open_hold(request)
        about = {"request_id": name, "provider_id": provider, "price_id": card.price_id}
        made = record(request, FinishReason.STOP, counts(number), **about)
        made = msgspec.structs.replace(made, charge_pico=charge(card, number), attrs=attrs)
        self.seq = await ledger.append("gw0", self.epoch, self.seq, encode_batch([made]))
        await ledger.end_hold("gw0", self.epoch, request.hold_id)
        return name, cost

    async def month(self, ledger):
        """The usage of USED, a day apart each; then the clock is at the first of the next month."""
        for (tenant, provider, card), requests in USED.items():
            for number in range(requests):
                await self.use(ledger, tenant, provider, card, number)
            await ledger.publish()
            self.clock.advance(DAY)
        self.clock.advance(MONTH - len(USED) * DAY)

    def settlement_file(self, period=NOVEMBER):
        return self.config.statements_dir / period / "settlement.parquet"


def earned(provider=None, tenant=None):
    """What USED adds up to."""
    return sum(
        charge(card, number)
        for (who, where, card), requests in USED.items()
        for number in range(requests)
        if provider in (None, where) and tenant in (None, who)
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Auditor, "_in_own_process", verify_here)


@pytest.fixture
def box(tmp_path):
    return Months(tmp_path)


@pytest.fixture
async def ledger(box):
    async with box.open() as ledger:
        await box.prepare(ledger)
        await box.month(ledger)
        yield ledger


async def balances(ledger):
    return {account.account_id: account.balance_pico for account in await ledger.accounts()}


async def settle(ledger, period=NOVEMBER, **options):
    return await ledger.settle(period, "key-op", **options)


def fees_of(path):
    fees = {}
    for line in read_lines(path).lines:
        fees[line.provider_id] = fees.get(line.provider_id, 0) + line.fee_pico
    return fees


class TestSettle:
    async def test_has_a_line_per_tenant_provider_and_price_with_exact_sums(self, box, ledger):
        summary = await settle(ledger)
        lines = {
            (line.tenant_id, line.provider_id, line.price_id): line
            for line in read_lines(box.settlement_file()).lines
        }
        assert len(lines) == len(USED)
        for (tenant, provider, card), requests in USED.items():
            line = lines[tenant, provider, card.price_id]
            total = sum(charge(card, number) for number in range(requests))
            assert (line.rows, line.charge_pico) == (requests, total)
            assert line.fee_pico == round(Decimal(total) * 1000 / 10_000)  # half-even
            assert line.payout_pico == total - line.fee_pico
            tokens = [counts(number) for number in range(requests)]
            assert line.input_tokens == sum(one.input_tokens for one in tokens)
            assert line.cached_input_tokens == sum(one.cached_input_tokens for one in tokens)
            assert line.output_tokens == sum(one.output_tokens for one in tokens)
            assert (line.model, line.lane, line.kind) == (card.model, "tokens", "tokens")
        fee = sum(line.fee_pico for line in lines.values())
        assert (summary["charge"], summary["fee"], summary["payout"]) == tuple(
            format_money(pico) for pico in (earned(), fee, earned() - fee)
        )
        assert (summary["settled"], summary["created"]) == (True, True)
        assert (summary["lsn_after"], summary["lsn_until"]) == (0, sum(USED.values()))
        assert summary["rows"] == sum(USED.values())

    async def test_moves_fee_and_payout_out_of_what_providers_earned(self, box, ledger):
        before = await balances(ledger)
        await settle(ledger)
        after, fees = await balances(ledger), fees_of(box.settlement_file())
        for provider in ("local", "hub"):
            assert before[provider_account(provider)] == earned(provider)
            assert after[provider_account(provider)] == 0
            assert after[settled_account(provider)] == earned(provider) - fees[provider]
        assert after[FEES] == sum(fees.values())
        assert {name: after[name] for name in (CASH, tenant_account("acme"))} == {
            name: before[name] for name in (CASH, tenant_account("acme"))
        }

    async def test_publishes_a_fee_and_a_settle_transfer_per_provider(self, box, ledger):
        summary = await settle(ledger)
        moved = box.transfers().query("kind in ['fee', 'settle']")
        fees = fees_of(box.settlement_file())
        expected = {
            (kind, provider_account(name), account, to_decimal(pico))
            for name in ("local", "hub")
            for kind, account, pico in (
                ("fee", FEES, fees[name]),
                ("settle", settled_account(name), earned(name) - fees[name]),
            )
        }
        columns = ["kind", "debit_account", "credit_account", "amount"]
        assert set(moved[columns].itertuples(index=False, name=None)) == expected
        assert all(name.startswith(summary["settlement_id"]) for name in moved["transfer_id"])
        assert set(moved["made_by"]) == {"key-op"}

    async def test_holder_of_a_lease_whose_idle_time_was_sold_has_its_share(self, box, ledger):
        """Of what the provider earned by it; a refund takes nothing of it back."""
        box.clock.advance(-DAY)
        lent = ((LENT_BY, "bolt"),)
        name, cost = await box.use(ledger, "acme", "local", CARD, 4, attrs=lent)
        await ledger.refund(Refund("refund-1", "acme", "sorry", "key-op", request_id=name))
        box.clock.advance(DAY)
        before = await balances(ledger)
        summary = await settle(ledger)
        after = await balances(ledger)
        share = pricing.fee(cost - pricing.fee(cost, 1000), 5000)
        assert share > 0
        assert after[tenant_account("bolt")] - before[tenant_account("bolt")] == share
        assert summary["share"] == format_money(share)
        (moved,) = box.transfers().query("kind == 'resale'").itertuples()
        assert (moved.debit_account, moved.credit_account) == (
            provider_account("local"),
            tenant_account("bolt"),
        )
        assert after[provider_account("local")] == 0
        assert await settle(ledger) == summary | {"created": False}
        assert (await ledger.verify())["finding"] is None
        report = await ledger.statement(Party.PROVIDER, "local", NOVEMBER)
        assert sum(line.share for line in report.lines) == to_decimal(share)

    async def test_leaves_a_ledger_that_verifies(self, ledger):
        await settle(ledger)
        assert (await ledger.verify())["finding"] is None

    async def test_file_says_what_was_settled(self, box, ledger):
        summary = await settle(ledger)
        path = box.settlement_file()
        stored = read_lines(path)
        assert (stored.sha256, stored.settlement_id) == (
            summary["sha256"],
            summary["settlement_id"],
        )
        frame = pd.read_parquet(path)
        assert frame["fee"].sum() + frame["payout"].sum() == frame["charge"].sum()
        assert frame["charge"].sum() == to_decimal(earned())

    async def test_agrees_whether_compacted_or_not(self, ledger):
        dry = await settle(ledger, dry_run=True)
        await ledger.compact()
        assert await settle(ledger, dry_run=True) == dry

    async def test_is_the_same_with_another_number_of_parts(self, tmp_path, box, ledger):
        other = Months(tmp_path / "other")
        async with other.open() as second:
            await other.prepare(second)
            for (tenant, provider, card), requests in USED.items():
                for number in range(requests):
                    await other.use(second, tenant, provider, card, number)
            other.clock.advance(MONTH)
            one, two = await settle(ledger, dry_run=True), await settle(second, dry_run=True)
        assert one["sha256"] == two["sha256"]

    async def test_what_the_market_gave_away_comes_out_of_its_fees(self, box, ledger):
        box.clock.advance(-DAY)
        gift = Refund("gift-1", "acme", "sorry", "key-op", amount_pico=10**9)
        await ledger.refund(gift)
        box.clock.advance(DAY)
        await settle(ledger)
        after, fees = await balances(ledger), fees_of(box.settlement_file())
        assert fees[MARKET_PROVIDER] == -(10**9)
        assert after[provider_account(MARKET_PROVIDER)] == 0
        assert after[settled_account(MARKET_PROVIDER)] == 0
        assert after[FEES] == sum(fees.values())

    @pytest.mark.parametrize("fee_bps", [0, 10_000, 333])
    async def test_fee_is_the_configured_one(self, tmp_path, fee_bps):
        box = Months(tmp_path)
        box.config = replace(box.config, fee_bps=fee_bps)
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.use(ledger)
            box.clock.advance(MONTH)
            summary = await settle(ledger)
            assert summary["fee"] == format_money(pricing.fee(charge(CARD, 0), fee_bps))


class TestAgain:
    async def test_changes_nothing(self, box, ledger):
        first = await settle(ledger)
        before, content = await balances(ledger), box.settlement_file().read_bytes()
        again = await settle(ledger)
        assert again == first | {"created": False}
        assert await balances(ledger) == before
        assert box.settlement_file().read_bytes() == content

    async def test_after_compaction_pruning_and_a_restart_changes_nothing(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.month(ledger)
            first = await settle(ledger)
            box.clock.advance(DAY)
            await ledger.keep_house()
        async with box.open() as ledger:
            assert await settle(ledger) == first | {"created": False}

    async def test_with_another_fee_in_force_keeps_the_old_one(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.month(ledger)
            first = await settle(ledger)
        box.config = replace(box.config, fee_bps=2000)
        async with box.open() as ledger:
            assert await settle(ledger) == first | {"created": False}

    @pytest.mark.parametrize("dry_run", [True, False])
    async def test_of_a_changed_file_raises_an_alarm_and_keeps_it(self, box, ledger, dry_run):
        await settle(ledger)
        path = box.settlement_file()
        change_lines(path)
        content = path.read_bytes()
        with pytest.raises(MarketFault, match="2026-11"):
            await settle(ledger, dry_run=dry_run)
        assert path.read_bytes() == content

    async def test_of_a_deleted_file_writes_the_same_again(self, box, ledger):
        first = await settle(ledger)
        box.settlement_file().unlink()
        again = await settle(ledger)
        assert again == first | {"created": False}
        assert read_lines(box.settlement_file()).sha256 == first["sha256"]

    async def test_file_of_something_else_in_its_place_is_not_overwritten(self, box, ledger):
        path = box.settlement_file()
        path.parent.mkdir(parents=True)
        path.write_bytes(b"notes")
        with pytest.raises(MarketFault, match="another settlement"):
            await settle(ledger)
        assert path.read_bytes() == b"notes"
        assert (await balances(ledger))[FEES] == 0


def change_lines(path):
    with pq.ParquetFile(path) as file:
        table, said = file.read(), file.metadata.metadata
    place = table.schema.get_field_index("fee")
    values = table.column("fee").to_pylist()
    values[0] += Decimal("0.000000000001")
    field = table.schema.field(place)
    table = table.set_column(place, field, pa.array(values, field.type))
    said = {key: value for key, value in said.items() if key != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(said), path)


class TestPeriod:
    async def test_that_is_not_over_is_refused(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.use(ledger)
            for period in (NOVEMBER, DECEMBER, "2027-01"):
                with pytest.raises(InvalidRequest, match="not over"):
                    await settle(ledger, period)

    async def test_is_over_with_its_last_second(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.use(ledger)
            box.clock.advance(29 * DAY + DAY / 2 - 1)
            with pytest.raises(InvalidRequest, match="not over"):
                await settle(ledger)
            box.clock.advance(1)
            assert (await settle(ledger))["rows"] == 1

    async def test_dry_run_of_an_open_one_shows_what_it_is_so_far_and_changes_nothing(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            _, cost = await box.use(ledger)
            before = await balances(ledger)
            summary = await settle(ledger, dry_run=True)
            assert (summary["settled"], summary["created"]) == (False, False)
            assert (summary["rows"], summary["charge"]) == (1, format_money(cost))
            assert await balances(ledger) == before
            assert not box.config.statements_dir.exists()
            box.clock.advance(MONTH)
            assert (await settle(ledger))["created"] is True

    @pytest.mark.parametrize("period", ["2026-13", "2026", "november", "2026-1", ""])
    async def test_that_is_no_month_is_refused(self, ledger, period):
        with pytest.raises(InvalidRequest, match="no month"):
            await settle(ledger, period)

    async def test_before_a_settled_one_is_refused(self, ledger):
        await settle(ledger)
        for dry_run in (True, False):
            with pytest.raises(InvalidRequest, match="settled already"):
                await settle(ledger, "2026-10", dry_run=dry_run)

    async def test_without_usage_is_settled_as_nothing(self, box, ledger):
        await settle(ledger)
        box.clock.advance(31 * DAY)
        before = await balances(ledger)
        summary = await settle(ledger, DECEMBER)
        assert (summary["rows"], summary["charge"], summary["created"]) == (0, "0", True)
        assert await balances(ledger) == before
        again = await settle(ledger, DECEMBER)
        assert again == summary | {"created": False}
        assert box.fatal == []

    async def test_of_a_ledger_without_any_usage_is_settled(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            box.clock.advance(MONTH)
            assert (await settle(ledger))["rows"] == 0
            box.clock.advance(31 * DAY)
            assert (await settle(ledger, DECEMBER))["rows"] == 0
        assert box.fatal == []

    async def test_rows_of_the_next_month_are_not_in_it(self, box, ledger):
        await box.use(ledger, number=50)
        assert (await settle(ledger))["rows"] == sum(USED.values())
        box.clock.advance(31 * DAY)
        assert (await settle(ledger, DECEMBER))["rows"] == 1


class TestLate:
    async def test_rows_fall_into_the_next_settlement_with_their_own_time(self, box, ledger):
        await settle(ledger)
        started = datetime(2026, 11, 20, tzinfo=UTC)
        name, cost = await box.use(ledger, started_at=started)
        assert (await settle(ledger))["created"] is False
        box.clock.advance(31 * DAY)
        summary = await settle(ledger, DECEMBER)
        assert (summary["rows"], summary["charge"]) == (1, format_money(cost))
        (row,) = await ledger.request(name)
        assert row["started_at"] == started
        assert row["booked_at"].month == 12

    async def test_refund_after_a_settlement_appears_in_the_next_one(self, box, ledger):
        await settle(ledger)
        first = fees_of(box.settlement_file())
        answer = await ledger.refund(Refund("refund-1", "acme", "bad", "key-op", "req-1"))
        assert (await balances(ledger))[provider_account("local")] == -charge(CARD, 0)
        assert (await settle(ledger))["created"] is False
        box.clock.advance(31 * DAY)
        summary = await settle(ledger, DECEMBER)
        (line,) = read_lines(box.settlement_file(DECEMBER)).lines
        assert (line.kind, line.rows, line.charge_pico) == ("reversal", 1, -charge(CARD, 0))
        assert summary["charge"] == "-" + answer["refunded"]
        after = await balances(ledger)
        assert after[provider_account("local")] == 0
        fee = first["local"] + line.fee_pico
        assert after[settled_account("local")] == earned("local") - charge(CARD, 0) - fee
        assert line.fee_pico == -pricing.fee(charge(CARD, 0), 1000)
        assert (await ledger.verify())["finding"] is None


class TestUnsound:
    async def test_ledger_is_not_settled(self, box, ledger):
        path = next((box.config.ledger_dir / "usage" / "date=2026-11-02").iterdir())
        path.unlink()
        with pytest.raises(MarketFault, match="does not verify") as caught:
            await settle(ledger)
        assert path.name in str(caught.value)
        assert (await balances(ledger))[FEES] == 0
        assert not box.settlement_file().exists()

    async def test_sums_that_are_not_those_of_the_manifest_are_not_settled(
        self, box, ledger, monkeypatch
    ):
        real = settling.sum_lines

        def one_too_few(paths, after, until):
            return real(paths, after, until)[1:]

        monkeypatch.setattr(settling, "sum_lines", one_too_few)
        with pytest.raises(MarketFault, match="the manifest"):
            await settle(ledger)
        assert (await balances(ledger))[FEES] == 0
        assert not box.settlement_file().exists()


class Crash(Exception):
    pass


class TestCrash:
    @pytest.mark.parametrize("step", ["settle-lines", "settle-file", "settle-commit"])
    async def test_at_any_step_leaves_one_settlement_after_settling_again(
        self, box, monkeypatch, step
    ):
        def reach(point):
            if point == step:
                raise Crash(point)

        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.month(ledger)
            wanted = await settle(ledger, dry_run=True)
            with monkeypatch.context() as patch:
                patch.setattr("market.crash.reach", reach)
                with pytest.raises(Crash):
                    await settle(ledger)
        async with box.open() as ledger:
            summary = await settle(ledger)
            assert summary["sha256"] == wanted["sha256"]
            assert summary["created"] == (step != "settle-commit")
            found, fees = await balances(ledger), fees_of(box.settlement_file())
            assert found[FEES] == sum(fees.values())
            assert found[provider_account("local")] == 0
            assert found[settled_account("hub")] == earned("hub") - fees["hub"]
            assert len(box.transfers().query("kind in ['fee', 'settle']")) == 4
            assert (await ledger.verify())["finding"] is None


# -- statements -----------------------------------------------------------------------------


def amounts(statement):
    return {movement.kind: movement.amount for movement in statement.movements}


class TestStatement:
    @pytest.mark.parametrize("tenant", ["acme", "bolt"])
    async def test_of_a_tenant_ends_with_its_balance(self, ledger, tenant):
        statement = await ledger.statement(Party.TENANT, tenant, NOVEMBER)
        balance = (await ledger.balance(tenant)).balance_pico
        assert statement.opening == 0
        assert statement.closing == to_decimal(balance)
        assert statement.opening + sum(amounts(statement).values()) == statement.closing
        assert amounts(statement)["charge"] == -to_decimal(earned(tenant=tenant))
        assert amounts(statement)["deposit"] == (10 if tenant == "acme" else 5)

    @pytest.mark.parametrize("provider", ["local", "hub"])
    async def test_of_a_provider_ends_with_what_it_earned(self, ledger, provider):
        statement = await ledger.statement(Party.PROVIDER, provider, NOVEMBER)
        assert statement.opening == 0
        assert statement.closing == to_decimal(earned(provider))
        assert statement.preliminary
        assert all(line.fee is None for line in statement.lines)

    async def test_of_a_provider_has_its_fees_once_settled(self, box, ledger):
        await settle(ledger)
        for provider, fee in fees_of(box.settlement_file()).items():
            statement = await ledger.statement(Party.PROVIDER, provider, NOVEMBER)
            assert not statement.preliminary
            assert sum(line.fee for line in statement.lines) == to_decimal(fee)
            payout = sum(line.payout for line in statement.lines)
            assert payout == to_decimal(earned(provider) - fee)

    @pytest.mark.parametrize("who", [(Party.TENANT, "acme"), (Party.PROVIDER, "hub")])
    async def test_lines_and_days_are_the_usage(self, box, ledger, who):
        party, name = who
        statement = await ledger.statement(party, name, NOVEMBER)
        usage = box.usage()
        mine = usage[usage[f"{party}_id"] == name]
        for shown in (statement.lines, statement.days):
            assert sum(one.charge for one in shown) == mine["charge"].sum()
            assert sum(one.requests for one in shown) == len(mine)
            assert sum(one.input_tokens for one in shown) == mine["input_tokens"].sum()
            assert sum(one.output_tokens for one in shown) == mine["output_tokens"].sum()
        assert {day.day for day in statement.days} == {
            date.fromisoformat(str(day)) for day in mine["date"]
        }
        assert (statement.rows, statement.lsn_lo, statement.lsn_hi) == (
            len(mine),
            mine["lsn"].min(),
            mine["lsn"].max(),
        )

    async def test_of_the_next_month_opens_where_this_one_closed(self, box, ledger):
        await settle(ledger)
        await box.use(ledger, number=7)
        await ledger.refund(Refund("refund-1", "acme", "bad", "key-op", "req-1"))
        for party, name, account in (
            (Party.TENANT, "acme", tenant_account("acme")),
            (Party.PROVIDER, "local", provider_account("local")),
        ):
            before = await ledger.statement(party, name, NOVEMBER)
            after = await ledger.statement(party, name, DECEMBER)
            assert after.opening == before.closing
            assert after.opening + sum(amounts(after).values()) == after.closing
            assert after.closing == to_decimal((await balances(ledger))[account])
        tenant = await ledger.statement(Party.TENANT, "acme", DECEMBER)
        assert amounts(tenant)["refund"] == to_decimal(charge(CARD, 0))
        assert sum(line.charge for line in tenant.lines) == to_decimal(
            charge(CARD, 7) - charge(CARD, 0)
        )

    async def test_counts_rows_that_are_not_public_yet(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.use(ledger)
            statement = await ledger.statement(Party.TENANT, "acme", NOVEMBER)
            assert statement.closing == to_decimal((await ledger.balance("acme")).balance_pico)

    async def test_of_nobody_is_not_found(self, ledger):
        for party in Party:
            with pytest.raises(NotFound):
                await ledger.statement(party, "nobody", NOVEMBER)

    async def test_is_written_for_everybody_by_a_settlement(self, box, ledger):
        summary = await settle(ledger)
        assert summary["statements"] == 4
        folder = box.config.statements_dir / NOVEMBER
        written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        names = ("tenants/acme", "tenants/bolt", "providers/local", "providers/hub")
        assert written == {f"{name}.{form}" for name in names for form in ("json", "html")} | {
            "settlement.parquet"
        }
        told = json.loads((folder / "tenants/acme.json").read_text())
        assert told["closing"] == format(
            to_decimal((await ledger.balance("acme")).balance_pico), "f"
        )
        assert (told["settlement_id"], told["preliminary"]) == (summary["settlement_id"], False)
        assert "acme" in (folder / "tenants/acme.html").read_text()

    async def test_of_a_settled_month_stays_as_it_was_when_it_is_settled_again(self, box, ledger):
        await settle(ledger)
        path = box.config.statements_dir / NOVEMBER / "providers" / "local.json"
        first = json.loads(path.read_text())
        await box.use(ledger, number=7)
        box.clock.advance(DAY)
        await settle(ledger)
        again = json.loads(path.read_text())
        del first["checkpoint"], again["checkpoint"]
        assert again == first

    @pytest.mark.parametrize("dry_run", [True, False])
    async def test_dry_run_writes_no_statements(self, box, ledger, dry_run):
        await settle(ledger, dry_run=dry_run)
        path = box.config.statements_dir / NOVEMBER / "tenants" / "acme.json"
        assert path.exists() is not dry_run
        path.unlink(missing_ok=True)
        await settle(ledger, dry_run=True)
        assert not path.exists()


class TestFocus:
    async def test_costs_of_a_tenant_are_the_charges_of_its_statement(self, box, ledger):
        box.clock.advance(-DAY)
        await ledger.refund(Refund("refund-1", "acme", "bad", "key-op", "req-1"))
        await ledger.refund(Refund("refund-2", "acme", "slow", "key-op", "req-2", 1000))
        await ledger.refund(Refund("gift-1", "bolt", "sorry", "key-op", amount_pico=10**6))
        box.clock.advance(DAY)
        for settled in (False, True):
            if settled:
                await settle(ledger)
            content = await ledger.focus(NOVEMBER, "1.2", "parquet", None)
            frame = pd.read_parquet(io.BytesIO(content))
            costs = frame.groupby("BillingAccountId")["BilledCost"].sum()
            for tenant in ("acme", "bolt"):
                statement = await ledger.statement(Party.TENANT, tenant, NOVEMBER)
                charged = sum(line.charge for line in statement.lines)
                assert costs[tenant] == charged
                moved = amounts(statement)
                assert charged == -(moved["charge"] + moved["refund"])

    async def test_of_one_tenant_has_only_its_rows(self, ledger):
        content = await ledger.focus(NOVEMBER, "1.2", "parquet", "bolt")
        frame = pd.read_parquet(io.BytesIO(content))
        assert set(frame["BillingAccountId"]) == {"bolt"}
        assert frame["BilledCost"].sum() == to_decimal(earned(tenant="bolt"))

    async def test_names_the_statement_as_invoice_once_it_is_settled(self, ledger):
        open_month = pd.read_parquet(
            io.BytesIO(await ledger.focus(NOVEMBER, "1.2", "parquet", "acme"))
        )
        assert open_month["InvoiceId"].isna().all()
        await settle(ledger)
        closed = pd.read_parquet(io.BytesIO(await ledger.focus(NOVEMBER, "1.2", "parquet", "acme")))
        usage = closed[closed["ChargeCategory"] != "Purchase"]
        statement = await ledger.statement(Party.TENANT, "acme", NOVEMBER)
        assert set(usage["InvoiceId"]) == {statement.statement_id}
