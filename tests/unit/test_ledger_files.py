"""The ledger over real SQLite and real Parquet: restarts, half-done publishing, plain readers."""

import asyncio
import contextlib
import os
import sqlite3
from datetime import timedelta
from decimal import Decimal

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from market.config import Config
from market.errors import InvalidRequest, MarketFault, Overloaded
from market.fakes import FakeClock
from market.ledger.manifest import SCHEMAS, Dataset
from market.ledger.publisher import Publisher, seal_interval
from market.ledger.reports import UsageQuery
from market.ledger.schema import encode_batch
from market.ledger.service import Ledger
from market.types import FinishReason, HoldChange, Principal, Role
from tests.contracts.test_ledger import CHARGE, WANTED, record
from tests.samples import CARD, deposit, hold_request


class Box:
    """A ledger that can be closed, crashed and opened again on the same folder."""

    def __init__(self, home):
        self.config = Config(home, "http://127.0.0.1:1")
        self.clock = FakeClock()
        self.fatal = []
        self._requests = 0

    @contextlib.asynccontextmanager
    async def open(self):
        ledger = Ledger(self.config, self.clock, on_fatal=lambda: self.fatal.append(1))
        await ledger.open()
        try:
            yield ledger
        finally:
            await ledger.close()

    async def prepare(self, ledger):
        await ledger.create_tenant("acme")
        await ledger.create_provider("local")
        await ledger.add_rate_cards([CARD], only_new_models=True)
        await ledger.transfer(deposit("10"))
        self.epoch = await ledger.register_producer("gw0")
        self.seq = 0

    async def serve(self, ledger, count=1, reason=FinishReason.STOP):
        """Book ``count`` requests in one batch."""
        amount = count * CHARGE
        hold_id = f"slice-{self._requests}"
        hold = hold_request(hold_id, epoch=self.epoch, wanted_pico=amount, minimum_pico=amount)
        await ledger.open_hold(hold)
        records = []
        for _ in range(count):
            self._requests += 1
            records.append(record(hold, reason, request_id=f"req-{self._requests}"))
        self.seq = await ledger.append("gw0", self.epoch, self.seq, encode_batch(records))
        await ledger.end_hold("gw0", self.epoch, hold_id)

    def usage(self):
        return pd.read_parquet(self.config.ledger_dir / "usage")

    def transfers(self):
        return pd.read_parquet(self.config.ledger_dir / "transfers")


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


class TestEmpty:
    @pytest.mark.parametrize("dataset", list(Dataset))
    async def test_ledger_has_its_schema_before_the_first_row(self, box, dataset):
        async with box.open():
            folder = box.config.ledger_dir / dataset
            assert len(pd.read_parquet(folder)) == 0
            (part,) = folder.rglob("*.parquet")
            assert pq.read_schema(part) == SCHEMAS[dataset]
            assert duckdb.sql(f"select count(*) from '{folder}/**/*.parquet'").fetchall() == [(0,)]


class TestPublish:
    async def test_pandas_sql_and_balance_agree_exactly(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger, 3)
            await box.serve(ledger, 2, FinishReason.PROVIDER_ERROR)
            await ledger.publish()
            usage, transfers = box.usage(), box.transfers()
            spent = Decimal(3 * CHARGE).scaleb(-12)
            assert usage["charge"].sum() == spent
            mine = transfers[transfers["debit_account"] == "tenant:acme"]["amount"].sum()
            paid_in = transfers[transfers["credit_account"] == "tenant:acme"]["amount"].sum()
            balance = (await ledger.balance("acme")).balance_pico
            assert paid_in - mine == Decimal(balance).scaleb(-12) == 10 - spent
            assert list(usage["lsn"]) == [1, 2, 3, 4, 5]

    async def test_columns_are_those_of_the_schema_and_nothing_else_is_in_the_folder(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
            await ledger.publish()
            assert list(box.usage().columns) == [*SCHEMAS[Dataset.USAGE].names, "date"]
            files = [p for p in box.config.ledger_dir.rglob("*") if p.is_file()]
            assert files
            assert all(p.suffix == ".parquet" and p.name.startswith("part-") for p in files)

    async def test_batch_and_its_charge_fall_on_the_same_date(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            box.clock.advance(timedelta(hours=11, minutes=59, seconds=59).total_seconds())
            await box.serve(ledger)
            box.clock.advance(2)
            await box.serve(ledger)
            await ledger.publish()
            usage, transfers = box.usage(), box.transfers()
            assert sorted(map(str, usage["date"])) == ["2026-11-01", "2026-11-02"]
            charges = transfers[transfers["kind"] == "charge"]
            assert list(charges["booked_at"]) == list(usage["booked_at"])

    async def test_publishing_twice_changes_nothing(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
            await ledger.publish()
            before = sorted(box.config.ledger_dir.rglob("*.parquet"))
            await ledger.publish()
            assert sorted(box.config.ledger_dir.rglob("*.parquet")) == before

    async def test_clock_that_steps_back_does_not_take_booking_times_back(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
            box.clock.advance(-3600)
            await box.serve(ledger)
            await ledger.publish()
            assert box.usage()["booked_at"].is_monotonic_increasing

    def test_interval_grows_so_that_a_day_stays_under_2000_parts(self):
        elapsed = parts = 0
        while elapsed < 86_400:
            elapsed += seal_interval(parts)
            parts += 1
        assert parts < 2000
        assert seal_interval(0) == 5


class TestRestart:
    async def test_state_is_as_before(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger, 2)
            before = await ledger.accounts()
        async with box.open() as ledger:
            assert await ledger.accounts() == before
            await box.serve(ledger)
            await ledger.publish()
            assert list(box.usage()["lsn"]) == [1, 2, 3]
            assert box.usage()["request_id"].is_unique

    async def test_close_publishes_what_was_booked(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
        assert len(box.usage()) == 1

    async def test_after_close_commands_are_refused(self, box):
        async with box.open() as ledger:
            pass
        with pytest.raises(Overloaded):
            await ledger.tenants()

    async def test_growth_of_a_hold_is_kept(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await ledger.open_hold(hold_request("slice-1", epoch=box.epoch, **WANTED))
            await ledger.resize_hold("gw0", box.epoch, HoldChange("slice-1", 4, 9 * CHARGE, 0))
        async with box.open() as ledger:
            (hold,) = await ledger.open_holds()
            assert (hold.amount_pico, hold.version) == (9 * CHARGE, 4)
            assert (await ledger.balance("acme")).held_pico == 9 * CHARGE

    async def test_second_ledger_on_the_same_folder_is_refused(self, box, monkeypatch):
        monkeypatch.setattr("market.ledger.service.LOCK_PATIENCE_S", 0.2)
        async with box.open():
            with pytest.raises(MarketFault, match="another process"):
                await Ledger(box.config, box.clock).open()

    async def test_database_that_another_process_has_open_is_named_and_opens_later(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
        stranger = sqlite3.connect(box.config.state_dir / "ledger.db")
        stranger.execute("BEGIN IMMEDIATE")
        ledger = Ledger(box.config, box.clock)
        with pytest.raises(MarketFault, match="database is locked"):
            await ledger.open()
        stranger.close()
        await ledger.open()
        assert await ledger.tenants() == ["acme"]
        await ledger.close()


class TestCrashWhilePublishing:
    """A part that stopped at each step is finished or forgotten on the next start."""

    @pytest.mark.parametrize("step", ["stage", "link"])
    async def test_every_row_is_published_once(self, box, step, monkeypatch):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger, 3)

            class Crash(Exception):
                pass

            def crash(*_arguments):
                raise Crash

            with monkeypatch.context() as patch:
                patch.setattr(Publisher, step, crash)
                with pytest.raises(Crash):
                    await ledger.publish()
        async with box.open() as ledger:
            await ledger.publish()
            assert list(box.usage()["lsn"]) == [1, 2, 3]
            assert [p for p in box.config.staging_dir.rglob("*") if p.is_file()] == []

    async def test_staged_file_that_was_damaged_is_written_again(self, box, monkeypatch):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger, 2)
            with monkeypatch.context() as patch:
                patch.setattr(Publisher, "link", lambda *_: os.stat("/nowhere"))
                with pytest.raises(FileNotFoundError):
                    await ledger.publish()
                for file in box.config.staging_dir.glob("parts/*"):
                    file.write_bytes(b"half")
                with contextlib.suppress(FileNotFoundError):
                    await ledger.close()
        async with box.open() as ledger:
            await ledger.publish()
            assert list(box.usage()["lsn"]) == [1, 2]

    async def test_failing_database_ends_the_process(self, box, monkeypatch):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)

            def broken(*_arguments):
                raise OSError("no space left on device")

            with monkeypatch.context() as patch:
                patch.setattr("market.storage.run_group", broken)
                with pytest.raises(OSError, match="no space"):
                    await ledger._writer.run_group([])
            assert box.fatal == [1]


async def test_after_a_failed_commit_nothing_waits_for_ever(tmp_path, monkeypatch):
    box = Box(tmp_path)
    ledger = Ledger(box.config, box.clock, on_fatal=lambda: box.fatal.append(1))
    await ledger.open()

    def broken(*_arguments):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("market.storage.run_group", broken)
        results = await asyncio.gather(
            *(ledger.tenants() for _ in range(5)), return_exceptions=True
        )
    assert {type(result) for result in results} == {OSError}
    assert box.fatal == [1]
    with pytest.raises(MarketFault, match="has ended"):
        await ledger.tenants()
    with pytest.raises(MarketFault):
        await ledger.close()


class TestUsageReport:
    async def test_counts_sealed_and_live_rows_once(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger, 2)
            await ledger.publish()
            await box.serve(ledger, 1)
            (row,) = await ledger.usage(UsageQuery(("model", "day")))
            assert (row["requests"], row["output_tokens"]) == (3, 30)
            assert row["charge"] == Decimal(3 * CHARGE).scaleb(-12)
            assert str(row["day"]) == "2026-11-01"

    async def test_of_another_tenant_is_empty(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.serve(ledger)
            assert await ledger.usage(UsageQuery(tenant="somebody")) == []

    async def test_refuses_unknown_groups(self, box):
        async with box.open() as ledger:
            with pytest.raises(InvalidRequest, match="choose from"):
                await ledger.usage(UsageQuery(("charge; drop table",)))


class TestKeys:
    async def test_are_found_by_hash_until_revoked(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            key = Principal("key-1", Role.TENANT, "acme")
            await ledger.add_key(key, "hash")
            assert await ledger.find_key("hash") == key
            await ledger.revoke_key("key-1")
            assert await ledger.find_key("hash") is None
            (row,) = await ledger.keys((Role.TENANT, "acme"))
            assert row["revoked_at"] is not None
            assert "hash" not in row.values()


class TestPrices:
    async def test_later_card_replaces_the_earlier_from_its_date_on(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            from market.pricing import make_rate_card

            later = box.clock.now() + timedelta(hours=1)
            await ledger.add_rate_cards([make_rate_card("tiny", (1, 1, 1), later, "USD")], False)
            assert (await ledger.rate_card("tiny")) == CARD
            box.clock.advance(3600)
            assert (await ledger.rate_card("tiny")).output_pico == 1
            assert [card.output_pico for card in await ledger.rate_cards()] == [1]

    async def test_defaults_do_not_touch_models_that_have_a_price(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            from market.pricing import make_rate_card

            await ledger.add_rate_cards(
                [make_rate_card("tiny", (9, 9, 9), box.clock.now(), "USD")], only_new_models=True
            )
            assert (await ledger.rate_card("tiny")) == CARD


async def test_one_refused_command_does_not_disturb_its_group(box):
    import asyncio

    async with box.open() as ledger:
        await box.prepare(ledger)
        results = await asyncio.gather(
            *(
                ledger.transfer(deposit("1", f"d{n}", "acme" if n % 2 else "nobody"))
                for n in range(6)
            ),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [InvalidRequest, type(None)] * 3
        assert (await ledger.balance("acme")).balance_pico == 13 * 10**12
