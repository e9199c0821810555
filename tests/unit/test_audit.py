"""``ledger verify`` finds whatever is changed behind the ledger's back; proofs hold, forged do not.

Each case copies one prepared home (two days, several parts), is a thief for a moment while the
ledger is closed, and asks the reopened ledger what is wrong.
"""

import asyncio
import contextlib
import copy
import importlib.util
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from market import pricing
from market.errors import NotFound
from market.ledger import audit, sealing, verify
from market.ledger.digest import leaf_hashes, rows_root
from market.ledger.files import sha256_of
from market.ledger.journal import chain_head
from market.ledger.log import Signer
from market.ledger.manifest import Dataset, Part
from market.ledger.producer import send
from market.ledger.publisher import amount_pico
from market.ledger.refunds import Refund
from market.ledger.schema import encode_batch
from market.ledger.sealing import prune_journal
from market.storage import from_micros
from market.types import (
    FinishReason,
    Lane,
    RecordKind,
    TokenCounts,
    UsageQuality,
    UsageRecord,
)
from tests.contracts.test_ledger import CHARGE, WANTED, record
from tests.samples import deposit, hold_request
from tests.unit.test_ledger_files import Box

DAY = 86_400
FIRST, SECOND = "2026-11-01", "2026-11-02"
GPU_CARD = pricing.make_rate_card(
    "offer-1", (0, 0, 0), datetime(2026, 1, 1, tzinfo=UTC), "USD", 2_490_000_000_001
)


@cache
def verifier():
    spec = importlib.util.spec_from_file_location("verify_proof", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_proof.py"


class Books(Box):
    """A ledger with every kind of row, whose files and tables can be reached around it."""

    async def send(self, ledger, *records):
        self.seq = await ledger.append("gw0", self.epoch, self.seq, encode_batch(records))

    async def prepare(self, ledger):
        await super().prepare(ledger)
        await ledger.create_tenant("bolt")
        await ledger.create_provider("hub")
        await ledger.add_rate_cards([GPU_CARD], only_new_models=False)
        await ledger.transfer(deposit("5", "deposit-bolt", "bolt"))

    async def slice(self, ledger, name="slice-1"):
        """Three requests out of one shared hold, of which a part stays held."""
        amount = 10 * CHARGE
        shared = hold_request(name, epoch=self.epoch, wanted_pico=amount, minimum_pico=amount)
        await ledger.open_hold(shared)
        drawn = [record(shared, request_id=f"{name}-{number}") for number in range(3)]
        await self.send(ledger, *drawn)

    async def lease(self, ledger, segments=(60_000_000, 1, 59_999_999)):
        """Segments of GPU time on a shared hold, and a request on the lease, which is free."""
        hour = GPU_CARD.gpu_hour_pico
        shared = hold_request(
            "hour-1",
            epoch=self.epoch,
            lane=Lane.LEASE,
            wanted_pico=hour,
            minimum_pico=hour,
        )
        await ledger.open_hold(shared)
        free = record(shared, request_id="leased-1", provider_id="hub", price_id=GPU_CARD.price_id)
        rows, elapsed = [free], 0
        for gpu_us in segments:
            charge = pricing.gpu_charge(elapsed, gpu_us, GPU_CARD.gpu_hour_pico)
            rows.append(gpu_row(shared, gpu_us, charge))
            elapsed += gpu_us
        await self.send(ledger, *rows)

    async def everything(self, ledger):
        """Rows of every kind, in several parts on two days."""
        await self.serve(ledger, 3)
        await self.serve(ledger, 2, FinishReason.PROVIDER_ERROR)
        await ledger.publish()
        await self.slice(ledger)
        await self.lease(ledger)
        await ledger.publish()
        lost = hold_request("slice-lost", epoch=self.epoch, **WANTED)
        await ledger.open_hold(lost)
        await self.send(ledger, unfinished(lost))
        self.epoch, self.seq = await ledger.register_producer("gw0"), 0
        await ledger.publish()
        self.clock.advance(DAY)
        await self.slice(ledger, "slice-2")
        await ledger.end_hold("gw0", self.epoch, "slice-2")
        await ledger.refund(Refund("refund-1", "acme", "bad", "key-op", "req-1"))
        await ledger.refund(Refund("refund-2", "acme", "slow", "key-op", "req-2", CHARGE // 3))
        await ledger.refund(Refund("gift-1", "bolt", "sorry", "key-op", amount_pico=10**9))
        await ledger.publish()
        await ledger.open_hold(hold_request("slice-open", epoch=self.epoch, **WANTED))

    def rows(self):
        return len(self.usage()) + len(self.transfers())

    @contextlib.contextmanager
    def tables(self):
        with contextlib.closing(sqlite3.connect(self.config.state_dir / "ledger.db")) as db:
            yield db
            db.commit()

    def execute(self, statement, *values):
        with self.tables() as db:
            changed = db.execute(statement, values).rowcount
        assert changed, statement

    def parts(self, dataset="usage", day=FIRST):
        folder = self.config.ledger_dir / dataset / f"date={day}"
        return sorted(path for path in folder.iterdir() if "genesis" not in path.name)

    def reseal(self, path, whole=False):
        """Make SQL agree with a file; ``whole``: with its rows too, the log's leaf included."""
        dataset = Dataset(path.parent.parent.name)
        self.execute(
            "UPDATE parts SET sha256 = ? WHERE file = ? AND dataset = ?",
            *(sha256_of(path), path.name, str(dataset)),
        )
        if not whole:
            return
        (batch,) = pq.read_table(path, partitioning=None).combine_chunks().to_batches()
        with self.tables() as db:
            db.row_factory = sqlite3.Row
            (row,) = db.execute(
                "SELECT * FROM parts WHERE file = ? AND dataset = ?", (path.name, dataset)
            )
            part = Part(
                dataset,
                row["lo"],
                row["hi"],
                date.fromisoformat(row["date"]),
                batch.num_rows,
                amount_pico(batch, dataset),
                rows_root(leaf_hashes(batch)),
                row["head"],
                row["file"],
                row["sha256"],
            )
        self.execute(
            "UPDATE parts SET rows = ?, amount_pico = ?, rows_root = ?, leaf_hash = ? "
            "WHERE file = ? AND dataset = ?",
            *(part.rows, str(part.amount_pico), part.rows_root, part.leaf_hash),
            *(path.name, str(dataset)),
        )


def unfinished(hold):
    """What a sweep sends for a request whose gateway died."""
    return record(
        hold,
        FinishReason.MARKET_FAULT,
        TokenCounts(0, 0, 0),
        request_id="req-lost",
        usage_quality=UsageQuality.RECOVERED,
    )


def gpu_row(shared, gpu_us, charge_pico):
    return UsageRecord(
        kind=RecordKind.GPU,
        request_id=None,
        tenant_id=shared.tenant_id,
        api_key_id=None,
        model=shared.model,
        lane=Lane.LEASE,
        deployment_id="lease-1",
        provider_id="hub",
        node_id="local",
        gpu_type="h100",
        gpu_milli=1000,
        started_at=shared.started_at,
        finished_at=shared.started_at,
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        price_id=GPU_CARD.price_id,
        charge_pico=charge_pico,
        currency="USD",
        finish_reason=None,
        lease_id="lease-1",
        slice_id="hour-1",
        gpu_us=gpu_us,
    )


@pytest.fixture
def box(tmp_path):
    return Books(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A home with everything, closed."""
    home = tmp_path_factory.mktemp("prepared") / "home"

    async def fill():
        box = Books(home)
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.everything(ledger)

    asyncio.run(fill())
    return home


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of the prepared home, on its second day."""
    box = Books(shutil.copytree(prepared, tmp_path / "home"))
    box.clock.advance(DAY)
    return box


async def verify_here(_auditor, picture):
    """What the process of its own does, without the second it takes to start."""
    found, looked_at = verify.verify(picture)
    return {"finding": found and asdict(found), **looked_at}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(audit.Auditor, "_in_own_process", verify_here)


async def finding(box):
    async with box.open() as ledger:
        return (await ledger.verify())["finding"]


async def sound(ledger, rows):
    report = await ledger.verify()
    assert report["finding"] is None
    assert report["rows"] == rows
    return report


class TestSound:
    async def test_ledger_with_every_kind_of_row_verifies(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.everything(ledger)
            kinds = box.usage().groupby("kind").size().to_dict()
            assert kinds == {"tokens": 13, "gpu": 3, "reversal": 1, "adjustment": 2}
            report = await sound(ledger, box.rows())
            assert report["parts"] == report["files"] == 8

    async def test_ledger_without_rows_verifies(self, box):
        async with box.open() as ledger:
            await sound(ledger, 0)

    async def test_rows_that_are_not_public_are_looked_at_too(self, copied):
        async with copied.open() as ledger:
            sealed = copied.rows()
            await ledger.transfer(deposit("1", "deposit-late"))
            await ledger.refund(Refund("refund-9", "acme", "late", "key-op", "req-3"))
            await sound(ledger, sealed + 3)
            await ledger.publish()
            await sound(ledger, sealed + 3)
            assert copied.rows() == sealed + 3

    async def test_compacted_pruned_and_restarted_ledger_verifies(self, copied):
        rows = copied.rows()
        async with copied.open() as ledger:
            await ledger.checkpoint()
            await ledger.compact()
            report = await sound(ledger, rows)
            assert (report["parts"], report["checkpoints"]) == (8, 1)
            copied.clock.advance(DAY)
            await ledger.keep_house()
            await sound(ledger, rows)
        with copied.tables() as db:
            assert db.execute("SELECT count(*) FROM journal").fetchone() == (0,)
        async with copied.open() as ledger:
            await sound(ledger, rows)
            await ledger.transfer(deposit("1", "deposit-late"))
            await sound(ledger, rows + 1)

    async def test_pruning_while_the_chain_is_checked_is_no_finding(self, copied, monkeypatch):
        monkeypatch.setattr(audit, "CHAIN_AT_ONCE", 2)
        monkeypatch.setattr(sealing, "PRUNED_AT_ONCE", 1)
        async with copied.open() as ledger:
            copied.clock.advance(DAY)
            _, report = await asyncio.gather(ledger.keep_house(), ledger.verify())
            assert report["finding"] is None
            await ledger.keep_house()
            await sound(ledger, copied.rows())
        assert first(copied, "SELECT count(*) FROM journal") == (0,)


# -- tampering ------------------------------------------------------------------------------


def rewrite(path, change):
    """Write a part again with other rows, schema and all."""
    table = pq.read_table(path, partitioning=None)
    changed = change(table)
    assert changed.schema == table.schema
    pq.write_table(changed, path)


def without_row(index):
    return lambda table: pa.concat_tables([table.slice(0, index), table.slice(index + 1)])


def doubled_row(index):
    return lambda table: pa.concat_tables([table.slice(0, index + 1), table.slice(index)])


def swapped_rows(table):
    return table.take([1, 0, *range(2, table.num_rows)])


def with_value(name, index, change):
    def apply(table):
        place = table.schema.get_field_index(name)
        values = table.column(name).to_pylist()
        values[index] = change(values[index])
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(values, field.type))

    return apply


CHANGES = {
    "a row is missing": without_row(1),
    "the last row is missing": without_row(4),
    "a row is doubled": doubled_row(1),
    "two rows are swapped": swapped_rows,
    "a charge is larger": with_value("charge", 1, lambda charge: charge + Decimal(1)),
    "a text is another": with_value("api_key_id", 1, lambda _: "key-other"),
    "a count is another": with_value("queue_ms", 1, lambda _: 7),
    "the tenant is another": with_value("tenant_id", 1, lambda _: "bolt"),
}


def assert_in_first_part(found, path):
    assert found is not None
    assert found["where"] == str(path)
    assert found["row"] is None or 1 <= found["row"] <= 5
    assert found["reason"]


@pytest.mark.usefixtures("quick")
class TestChangedRows:
    """A published part is written again with other rows."""

    @pytest.mark.parametrize("name", CHANGES)
    async def test_of_a_part_are_found_in_its_file(self, copied, name):
        path = copied.parts()[0]
        rewrite(path, CHANGES[name])
        assert_in_first_part(await finding(copied), path)

    @pytest.mark.parametrize("name", CHANGES)
    async def test_are_found_though_sql_has_the_new_files_digest(self, copied, name):
        path = copied.parts()[0]
        rewrite(path, CHANGES[name])
        copied.reseal(path)
        assert_in_first_part(await finding(copied), path)

    async def test_out_of_order_are_named_by_row(self, copied):
        rewrite(copied.parts()[0], swapped_rows)
        found = await finding(copied)
        assert found["row"] == 1
        assert "out of order" in found["reason"]

    async def test_with_another_charge_are_named_by_row_though_all_of_sql_agrees(self, copied):
        path = copied.parts()[0]
        rewrite(path, CHANGES["a charge is larger"])
        copied.reseal(path, whole=True)
        found = await finding(copied)
        assert (found["where"], found["row"]) == (str(path), 2)
        assert "does not follow from" in found["reason"]

    async def test_with_another_gpu_time_are_named_by_row_though_all_of_sql_agrees(self, copied):
        path = copied.parts()[1]
        table = pq.read_table(path, partitioning=None)
        place = pc.index(table.column("kind"), "gpu").as_py()
        rewrite(path, with_value("gpu_us", place, lambda gpu_us: gpu_us + 3_600_000_000))
        copied.reseal(path, whole=True)
        found = await finding(copied)
        assert found["row"] == table.column("lsn")[place].as_py()
        assert "lease-1" in found["reason"]

    async def test_of_a_correction_are_named_by_row_though_all_of_sql_agrees(self, copied):
        path = copied.parts(day=SECOND)[0]
        table = pq.read_table(path, partitioning=None)
        place = pc.index(table.column("kind"), "reversal").as_py()
        rewrite(path, with_value("output_tokens", place, lambda count: count - 1))
        copied.reseal(path, whole=True)
        found = await finding(copied)
        assert found["row"] == table.column("lsn")[place].as_py()
        assert "does not take back" in found["reason"]

    async def test_of_another_tenant_break_the_books_though_all_of_sql_agrees(self, copied):
        path = copied.parts()[0]
        rewrite(path, CHANGES["the tenant is another"])
        copied.reseal(path, whole=True)
        found = await finding(copied)
        assert "transfers paid" in found["reason"]

    async def test_of_transfers_are_found(self, copied):
        path = copied.parts("transfers")[0]
        rewrite(path, with_value("amount", 0, lambda amount: amount * 2))
        assert (await finding(copied))["where"] == str(path)

    async def test_of_transfers_break_the_books_though_all_of_sql_agrees(self, copied):
        path = copied.parts("transfers")[0]
        rewrite(path, with_value("amount", 0, lambda amount: amount * 2))
        copied.reseal(path, whole=True)
        assert "transfers and holds give" in (await finding(copied))["reason"]


def delete_part(box):
    path = box.parts()[1]
    path.unlink()
    return path, "missing"


def swap_parts(box):
    first, second, *_ = box.parts()
    first.rename(first.with_name("tmp"))
    second.rename(first)
    first.with_name("tmp").rename(second)
    return first, "changed|out of order"


def change_byte(box):
    path = box.parts()[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    return path, "changed"


def truncate(box):
    path = box.parts()[0]
    path.write_bytes(path.read_bytes()[:-9])
    return path, "changed"


def write_again(box):
    path = box.parts()[0]
    rewrite(path, lambda table: table)
    return path, "bytes were changed, its rows were not"


def add_stray(box):
    path = box.config.ledger_dir / "usage" / "notes.txt"
    path.write_text("hello")
    return path, "not in the manifest"


def add_hidden(box):
    path = box.parts()[0].with_name(".hidden.parquet")
    shutil.copy(box.parts()[0], path)
    return path, "not in the manifest"


def double_part(box):
    path = box.parts()[0].with_name("part-copy.parquet")
    shutil.copy(box.parts()[0], path)
    return path, "not in the manifest"


def double_part_as_a_later_one(box):
    path = box.parts(day=SECOND)[0].with_name("part-000000009001-000000009005.parquet")
    shutil.copy(box.parts()[0], path)
    return path, "not in the manifest"


def double_part_as_the_empty_one(box):
    path = box.config.ledger_dir / "usage" / f"date={SECOND}" / "part-genesis.parquet"
    shutil.copy(box.parts()[0], path)
    return path, "has rows"


def junk_as_the_empty_one(box):
    path = box.config.ledger_dir / "usage" / f"date={SECOND}" / "part-genesis.parquet"
    path.write_text("junk")
    return path, ""


def move_part_to_another_day(box):
    path = box.parts()[0]
    target = box.parts(day=SECOND)[0].with_name(path.name)
    path.rename(target)
    return target, "not in the manifest"


@pytest.mark.usefixtures("quick")
class TestChangedFiles:
    @pytest.mark.parametrize(
        "tamper",
        [
            delete_part,
            swap_parts,
            change_byte,
            truncate,
            write_again,
            add_stray,
            add_hidden,
            double_part,
            double_part_as_a_later_one,
            double_part_as_the_empty_one,
            junk_as_the_empty_one,
            move_part_to_another_day,
        ],
    )
    async def test_are_named(self, copied, tamper):
        path, reason = tamper(copied)
        found = await finding(copied)
        assert found is not None
        assert found["where"] == str(path)
        assert any(one in found["reason"] for one in reason.split("|"))

    async def test_cut_off_is_named_though_sql_has_the_new_files_digest(self, copied):
        path, _ = truncate(copied)
        copied.reseal(path)
        assert (await finding(copied))["where"] == str(path)

    async def test_compacted_file_without_a_row_is_named(self, copied):
        async with copied.open() as ledger:
            await ledger.compact()
        (path,) = copied.parts()
        rewrite(path, without_row(6))
        assert (await finding(copied))["where"] == str(path)
        copied.reseal(path)
        found = await finding(copied)
        assert found["where"] == str(path)


def balance(box):
    box.execute("UPDATE accounts SET credits_pico = '77' WHERE account_id = 'tenant:acme'")
    return "account tenant:acme", None, "transfers and holds give"


def held(box):
    box.execute("UPDATE accounts SET held_pico = '0' WHERE account_id = 'tenant:acme'")
    return "account tenant:acme", None, "transfers and holds give"


def hold(box):
    box.execute("UPDATE holds SET amount_pico = '77' WHERE hold_id = 'slice-open'")
    return "account tenant:acme", None, "transfers and holds give"


def account_gone(box):
    box.execute("DELETE FROM accounts WHERE account_id = 'provider:hub'")
    return "account provider:hub", None, ""


def producer_gone(box):
    box.execute("DELETE FROM producers WHERE producer = 'gw0'")
    return "producer gw0", None, ""


def producer_back(box):
    box.execute("UPDATE producers SET next_seq = next_seq - 1 WHERE producer = 'gw0'")
    return "producer gw0", None, "booked 3 records, mark 2"


def lease_total(box):
    box.execute("UPDATE lease_totals SET gpu_us = 0")
    return "lease lease-1", None, "rows have"


def lease_total_gone(box):
    box.execute("DELETE FROM lease_totals")
    return "lease lease-1", None, ""


def rate_card(box):
    box.execute("UPDATE rate_cards SET output_pico = '1' WHERE model = 'tiny'")
    return "part-000000000001-000000000005.parquet", 1, "does not follow from"


def journal_rows(box):
    (entry,) = first(box, "SELECT min(entry) FROM journal WHERE usage IS NOT NULL")
    with box.tables() as db:
        (usage,) = db.execute("SELECT usage FROM journal WHERE entry = ?", (entry,)).fetchone()
        changed = usage.replace(b"req-1", b"req-9")
        assert changed != usage
        db.execute("UPDATE journal SET usage = ? WHERE entry = ?", (changed, entry))
    return "journal", None, f"entry {entry} was changed"


def journal_time(box):
    box.execute("UPDATE journal SET booked_at = booked_at + 1 WHERE entry = 3")
    return "journal", None, "entry 3 was changed"


def journal_head(box):
    box.execute("UPDATE journal SET head = ? WHERE entry = 2", b"x" * 32)
    return "journal", None, "entry 2 was changed"


def journal_first(box):
    box.execute("DELETE FROM journal WHERE entry = 1")
    return "journal", None, "entry 1 is missing"


def journal_middle(box):
    box.execute("DELETE FROM journal WHERE entry = 4")
    return "journal", None, "entry 4 is missing"


def journal_last(box):
    (last,) = first(box, "SELECT max(entry) FROM journal")
    box.execute("DELETE FROM journal WHERE entry = ?", last)
    return "journal", None, f"entry {last} is missing"


def journal_rewritten(box):
    """The last entry and every head are made anew: only what was sealed tells."""
    with box.tables() as db:
        db.row_factory = sqlite3.Row
        db.execute("UPDATE journal SET producer = 'gw9' WHERE producer = 'gw0'")
        head = bytes(32)
        for row in db.execute("SELECT * FROM journal ORDER BY entry").fetchall():
            values = dict(row) | {"booked_at": from_micros(row["booked_at"])}
            head = chain_head(head, values)
            db.execute("UPDATE journal SET head = ? WHERE entry = ?", (head, row["entry"]))
        db.execute("UPDATE counters SET head = ?", (head,))
    return "", None, ""


def manifest_entry(box):
    box.execute("UPDATE parts SET rows_root = ? WHERE dataset = 'usage' AND lo = 1", b"x" * 32)
    return "part-000000000001-000000000005.parquet", 1, "changed after it was sealed"


def leaf_gone(box):
    box.execute("UPDATE parts SET leaf = 99 WHERE leaf = 2")
    return "log", None, "leaf 2 is missing"


def first(box, statement):
    with box.tables() as db:
        return db.execute(statement).fetchone()


@pytest.mark.usefixtures("quick")
class TestChangedTables:
    @pytest.mark.parametrize(
        "tamper",
        [
            balance,
            held,
            hold,
            account_gone,
            producer_gone,
            producer_back,
            lease_total,
            lease_total_gone,
            rate_card,
            journal_rows,
            journal_time,
            journal_head,
            journal_first,
            journal_middle,
            journal_last,
            journal_rewritten,
            manifest_entry,
            leaf_gone,
        ],
    )
    async def test_are_named(self, copied, tamper):
        where, row, reason = tamper(copied)
        found = await finding(copied)
        assert found is not None
        assert where in found["where"]
        assert found["row"] == row
        assert reason in found["reason"]


class TestRewrittenLog:
    """With a signed checkpoint even a rewriting in which everything agrees is found."""

    @pytest.fixture
    async def signed(self, copied):
        async with copied.open() as ledger:
            await ledger.checkpoint()
        return copied

    async def test_is_found_though_rows_files_and_manifest_agree(self, signed):
        path = signed.parts()[0]
        rewrite(path, CHANGES["a text is another"])
        signed.reseal(path, whole=True)
        found = await finding(signed)
        assert found["where"] == "checkpoint 8"
        assert "rewritten after this checkpoint" in found["reason"]

    async def test_without_a_checkpoint_such_a_change_cannot_be_seen_in_files_alone(self, copied):
        """Why checkpoints are given away: the journal is pruned, nothing else remembers."""
        async with copied.open() as ledger:
            await ledger.compact()
            copied.clock.advance(DAY)
            state = ledger._store.state
            now = copied.clock.now()
            await ledger._writer.submit(lambda c: prune_journal(c, state, now))
        path = copied.parts(day=SECOND)[0]
        rewrite(path, with_value("api_key_id", 0, lambda _: "key-other"))
        copied.reseal(path, whole=True)
        assert await finding(copied) is None

    @pytest.mark.parametrize("how_many", [1, 3])
    async def test_is_found_if_the_last_parts_are_gone(self, signed, how_many):
        async with signed.open() as ledger:
            signed.clock.advance(2 * 3600)
            state, now = ledger._store.state, signed.clock.now()
            await ledger._writer.submit(lambda c: prune_journal(c, state, now))
        for _ in range(how_many):
            query = "SELECT max(leaf) FROM parts"
            (leaf,) = first(signed, query)
            with signed.tables() as db:
                row = db.execute("SELECT dataset, date, file FROM parts WHERE leaf = ?", (leaf,))
                dataset, day, file = row.fetchone()
            (signed.config.ledger_dir / dataset / f"date={day}" / file).unlink()
            signed.execute("DELETE FROM parts WHERE leaf = ?", leaf)
        found = await finding(signed)
        assert found["where"] == "log"
        assert "there are fewer" in found["reason"]

    @pytest.mark.parametrize("change", ["note", "key", "root"])
    async def test_is_found_if_the_checkpoint_is_another(self, signed, change):
        if change == "note":
            signed.execute("UPDATE checkpoints SET note = replace(note, '8', '7')")
        elif change == "root":
            signed.execute("UPDATE parts SET head = ? WHERE leaf = 0", b"x" * 32)
        else:
            signed.config.signing_key_file.unlink()
        found = await finding(signed)
        assert found is not None
        if change != "root":
            assert found["where"] == "checkpoint 8"

    async def test_grown_log_still_verifies(self, signed):
        async with signed.open() as ledger:
            await ledger.transfer(deposit("1", "deposit-late"))
            await ledger.checkpoint()
            report = await ledger.verify()
        assert (report["finding"], report["checkpoints"], report["parts"]) == (None, 2, 9)


@pytest.mark.usefixtures("quick")
class TestSettlementFile:
    async def test_that_was_changed_is_named(self, copied):
        copied.clock.advance(30 * DAY)
        async with copied.open() as ledger:
            await ledger.settle("2026-11", "key-op")
            path = copied.config.statements_dir / "2026-11" / "settlement.parquet"
            content = path.read_bytes()
            path.write_bytes(content.replace(b"acme", b"acne"))
            found = (await ledger.verify())["finding"]
            assert found["where"] == str(path)
            assert "2026-11" in found["reason"]
            path.write_bytes(b"junk")
            assert (await ledger.verify())["finding"]["where"] == str(path)
            path.write_bytes(content)
            assert (await ledger.verify())["finding"] is None


# -- proofs ---------------------------------------------------------------------------------

REFUSALS = (ValueError, KeyError, IndexError, TypeError, OverflowError)


@pytest.fixture
async def ledger(copied):
    async with copied.open() as ledger:
        yield ledger


def refused(proof, **known):
    try:
        verifier().check(proof, **known)
    except REFUSALS:
        return True
    return False


class TestProof:
    async def test_of_every_request_holds(self, copied, ledger):
        usage = copied.usage()
        own = usage[usage["kind"] == "tokens"]
        assert len(own) == 13
        size = None
        for lsn, request_id in zip(own["lsn"], own["request_id"], strict=True):
            found = verifier().check(await ledger.prove(request_id))
            size = size or found[1]
            assert found == (lsn, size)

    async def test_survives_json_and_needs_no_trust_in_its_own_key(self, copied, ledger):
        proof = json.loads(json.dumps(await ledger.prove("req-2")))
        key = (copied.config.proof_dir / "ledger.pub").read_text().strip()
        kept = (copied.config.proof_dir / "checkpoint").read_text()
        assert verifier().check(proof, key, kept) == (2, 8)

    async def test_shows_the_row_as_it_was_booked_not_what_was_taken_back(self, ledger):
        proof = await ledger.prove("req-1")
        row = {name: value for name, _, value in proof["row"]}
        assert (row["kind"], row["lsn"], row["charge"]) == ("tokens", 1, str(CHARGE))

    async def test_of_a_row_that_is_not_public_yet_publishes_it(self, copied, ledger):
        epoch = await ledger.register_producer("gw7")
        request = hold_request("req-new", producer="gw7", epoch=epoch, **WANTED)
        await ledger.open_hold(request)
        await ledger.append("gw7", epoch, 0, encode_batch([record(request)]))
        verifier().check(await ledger.prove("req-new"))

    async def test_holds_against_a_checkpoint_that_was_kept(self, copied, ledger):
        kept = await ledger.checkpoint()
        await ledger.transfer(deposit("1", "deposit-late"))
        proof = await ledger.prove("req-2")
        assert verifier().check(proof) == (2, 9)
        assert refused(proof, kept=kept)
        old = await ledger.prove("req-2", 8)
        assert old["checkpoint"] == kept
        assert verifier().check(old, kept=kept) == (2, 8)

    async def test_against_a_checkpoint_of_before_the_row_is_not_found(self, ledger):
        await ledger.checkpoint()
        epoch = await ledger.register_producer("gw7")
        request = hold_request("req-new", producer="gw7", epoch=epoch, **WANTED)
        await ledger.open_hold(request)
        await ledger.append("gw7", epoch, 0, encode_batch([record(request)]))
        with pytest.raises(NotFound, match="after checkpoint"):
            await ledger.prove("req-new", 8)

    async def test_against_a_checkpoint_that_nobody_signed_is_not_found(self, ledger):
        await ledger.checkpoint()
        for size in (0, 5, 99):
            with pytest.raises(NotFound, match="no checkpoint"):
                await ledger.prove("req-2", size)

    async def test_is_the_same_after_compaction(self, copied, ledger):
        before = [await ledger.prove(name) for name in ("req-1", "slice-1-2", "req-lost")]
        assert len(await ledger.compact()) == 2
        after = [await ledger.prove(name) for name in ("req-1", "slice-1-2", "req-lost")]
        assert after == before
        for proof in after:
            verifier().check(proof)

    async def test_is_made_though_a_compaction_comes_in_between(self, ledger, monkeypatch):
        """It either waits for the proof or is over before the files are opened."""
        real, compacting = ledger._writer.submit, []

        async def submit(command):
            result = await real(command)
            if isinstance(result, list) and result and isinstance(result[0], Part):
                monkeypatch.setattr(ledger._writer, "submit", real)
                compacting.append(asyncio.create_task(ledger.compact()))
                await asyncio.wait(compacting, timeout=1)
            return result

        monkeypatch.setattr(ledger._writer, "submit", submit)
        verifier().check(await ledger.prove("req-2"))
        assert len(await compacting[0]) == 2

    @pytest.mark.parametrize("name", ["req-99", "", "lease-1"])
    async def test_of_a_request_that_is_not_on_record_is_not_found(self, ledger, name):
        with pytest.raises(NotFound) as caught:
            await ledger.prove(name)
        assert caught.value.code == "request_not_found"

    async def test_is_checked_by_the_command(self, ledger, tmp_path):
        proof = await ledger.prove("req-2")
        good, bad = tmp_path / "good.json", tmp_path / "bad.json"
        good.write_text(json.dumps(proof))
        bad.write_text(json.dumps(proof | {"row_index": 3}))
        results = []
        for arguments in ([good], [good, "--public-key", proof["public_key"]], [bad]):
            command = [sys.executable, "-I", str(SCRIPT), *map(str, arguments)]
            results.append(
                await asyncio.to_thread(
                    subprocess.run, command, capture_output=True, text=True, check=False
                )
            )
        assert [result.returncode for result in results] == [0, 0, 1]
        assert results[0].stdout.startswith("PROVEN: row 2 is in the ledger of 8 parts")
        assert "the key you gave" in results[1].stdout
        assert results[2].stdout.startswith("NOT PROVEN:")


class TestForgedProof:
    async def test_with_any_value_of_the_row_changed_is_refused(self, ledger):
        proof = await ledger.prove("req-2")
        for place, (name, kind, value) in enumerate(proof["row"]):
            for other in other_values(kind, value):
                forged = copy.deepcopy(proof)
                forged["row"][place][2] = other
                assert refused(forged), (name, value, other)

    async def test_with_a_value_that_only_looks_like_the_number_is_refused(self, ledger):
        """What is shown to people must be what was hashed."""
        proof = await ledger.prove("req-2")
        for place, (name, kind, value) in enumerate(proof["row"]):
            if kind == "text" or value is None:
                continue
            for other in (int(value) + 0.5, f" {value}", f"{value}".zfill(30)):
                forged = copy.deepcopy(proof)
                forged["row"][place][2] = other
                assert refused(forged), (name, value, other)

    async def test_with_a_column_renamed_or_moved_is_refused(self, ledger):
        proof = await ledger.prove("req-2")
        for place, (name, _, _) in enumerate(proof["row"]):
            forged = copy.deepcopy(proof)
            forged["row"][place][0] = "discount"
            assert refused(forged), name
        forged = copy.deepcopy(proof)
        rows = {name: n for n, (name, *_) in enumerate(forged["row"])}
        one, two = rows["input_tokens"], rows["output_tokens"]
        forged["row"][one][0], forged["row"][two][0] = "output_tokens", "input_tokens"
        assert refused(forged)

    async def test_with_a_column_less_or_more_or_of_another_kind_is_refused(self, ledger):
        proof = await ledger.prove("req-2")
        for place, (name, kind, _) in enumerate(proof["row"]):
            shorter, other, longer = (copy.deepcopy(proof) for _ in range(3))
            del shorter["row"][place]
            longer["row"].insert(place, ["more", kind, None])
            other["row"][place][1] = "int32" if kind == "text" else "text"
            for forged in (shorter, other, longer):
                assert refused(forged), name

    @pytest.mark.parametrize("change", [1, -1, 5, 16, 8, 2**64])
    @pytest.mark.parametrize("name", ["row_index", "leaf_index"])
    async def test_with_another_index_is_refused(self, ledger, name, change):
        proof = await ledger.prove("req-2")
        assert refused(proof | {name: proof[name] + change})

    async def test_with_any_digest_of_a_path_changed_is_refused(self, ledger):
        proof = await ledger.prove("slice-1-1")
        assert proof["row_path"]
        assert proof["leaf_path"]
        for level, family in enumerate(proof["row_path"]):
            for place, digest in enumerate(family):
                for other in (flipped(digest), "", digest[:-2]):
                    if other == digest:
                        continue
                    forged = copy.deepcopy(proof)
                    forged["row_path"][level][place] = other
                    assert refused(forged)
        for level, digest in enumerate(proof["leaf_path"]):
            forged = copy.deepcopy(proof)
            forged["leaf_path"][level] = flipped(digest)
            assert refused(forged)
        for name in ("row_path", "leaf_path"):
            assert refused(proof | {name: proof[name][:-1]})
            assert refused(proof | {name: [*proof[name], proof[name][-1]]})
            assert refused(proof | {name: []})

    async def test_with_any_field_of_the_part_changed_is_refused(self, ledger):
        proof = await ledger.prove("req-2")
        for name, value in proof["part"].items():
            others = [value + 1, value - 1] if isinstance(value, int) else [flipped(value), ""]
            for other in others:
                assert refused(proof | {"part": proof["part"] | {name: other}}), name
            less = {key: one for key, one in proof["part"].items() if key != name}
            assert refused(proof | {"part": less}), name
        assert refused(proof | {"part": proof["part"] | {"more": 1}})

    async def test_with_the_checkpoint_changed_is_refused(self, ledger):
        proof = await ledger.prove("req-2")
        origin, size, root, *rest = proof["checkpoint"].split("\n")
        for lines in (
            ["other/ledger", size, root],
            [origin, str(int(size) + 1), root],
            [origin, size, flipped(root)],
        ):
            assert refused(proof | {"checkpoint": "\n".join([*lines, *rest])})

    async def test_with_another_key_is_refused(self, copied, ledger, tmp_path):
        proof = await ledger.prove("req-2")
        stranger = Signer.load(tmp_path / "stranger.key")
        assert refused(proof, public_key=stranger.verifier())
        size, root = verifier().read_checkpoint(proof["checkpoint"], proof["public_key"])
        forged = proof | {
            "checkpoint": stranger.checkpoint(size, root),
            "public_key": stranger.verifier(),
        }
        assert verifier().check(forged) == (2, 8)
        assert refused(forged, public_key=proof["public_key"])
        name, key_id, key = proof["public_key"].split("+", 2)
        for other in (f"other+{key_id}+{key}", f"{name}+00000000+{key}"):
            assert refused(proof | {"public_key": other})

    async def test_of_one_row_does_not_prove_another(self, ledger):
        one, two = [await ledger.prove(name) for name in ("req-1", "req-2")]
        for name in ("row", "row_index", "row_path"):
            assert refused(one | {name: two[name]})
        other = await ledger.prove("slice-1-1")
        for name in ("part", "leaf_index", "leaf_path"):
            assert refused(one | {name: other[name]})


def other_values(kind, value):
    """Other values of the same kind, null or not."""
    if value is None:
        return ["", "x"] if kind == "text" else [0, 1]
    if kind == "text":
        return [None, value + "x", value[:-1], value.swapcase()]
    return [None, int(value) + 1, -int(value) - 1, int(value) + 2**32]


def flipped(text):
    """The text with its first character another."""
    return ("0" if text[:1] != "0" else "1") + text[1:]


async def test_refused_lease_segment_stops_none_behind_it(box):
    """Its hold is gone, which is our bug: others are booked, and in its place is a free row."""
    async with box.open() as ledger:
        await box.prepare(ledger)
        await ledger.add_rate_cards([GPU_CARD], only_new_models=False)
        hour = pricing.gpu_charge(0, 10**6, GPU_CARD.gpu_hour_pico)
        shared = hold_request("hour-1", epoch=box.epoch, lane=Lane.LEASE, wanted_pico=hour,
                              minimum_pico=hour)  # fmt: skip
        await ledger.open_hold(shared)
        lost = msgspec.structs.replace(gpu_row(shared, 10**6, hour), slice_id="gone")
        lost = msgspec.structs.replace(lost, lease_id="lease-0")
        rows = [lost, gpu_row(shared, 10**6, hour)]
        assert await send(ledger, ("gw0", box.epoch), box.seq, rows) == box.seq + 2
        await ledger.publish()
        booked = box.usage().sort_values("lsn").tail(2)
        assert list(booked["charge"]) == [0, pricing.to_decimal(hour)]
        assert booked["slice_id"].isna().tolist() == [True, False]
        assert (await ledger.verify())["finding"] is None
