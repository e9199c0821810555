"""A closed day becomes one file: the same rows for every reader, or nothing happens at all."""

import shutil

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from market.errors import MarketFault
from market.ledger import compaction
from market.ledger.audit import Auditor
from market.ledger.compaction import GRACE
from market.ledger.files import sha256_of
from market.ledger.manifest import KEYS, Dataset
from market.ledger.reports import UsageQuery
from market.types import FinishReason
from tests.unit.test_audit import verify_here
from tests.unit.test_ledger_files import Box

DAY = 86_400
FIRST = "2026-11-01"
BY_DAY = UsageQuery(("day", "tenant"))


class Days(Box):
    """A ledger with several parts a day."""

    async def day(self, ledger, parts=3):
        """Serve and publish ``parts`` times, then go on to the next day."""
        for number in range(parts):
            await self.serve(ledger, number + 1)
            await self.serve(ledger, 1, FinishReason.PROVIDER_ERROR)
            await ledger.publish()
        self.clock.advance(DAY)

    def folder(self, dataset, day=FIRST):
        return self.config.ledger_dir / dataset / f"date={day}"

    def files(self, dataset, day=FIRST):
        return sorted(path.name for path in self.folder(dataset, day).iterdir())

    def state_of_files(self):
        """Every public file with its digest."""
        public = self.config.ledger_dir
        return {p: sha256_of(p) for p in public.rglob("*") if p.is_file()}

    def staged(self):
        return list(self.config.staging_dir.rglob("*.parquet"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Auditor, "_in_own_process", verify_here)


@pytest.fixture
def box(tmp_path):
    return Days(tmp_path)


@pytest.fixture
async def ledger(box):
    async with box.open() as ledger:
        if not ledger._sealer.compactor.possible:
            pytest.skip("this file system cannot exchange folders")
        await box.prepare(ledger)
        yield ledger


def frames(box):
    """Both ledgers as pandas reads them, in order."""
    return {
        Dataset.USAGE: box.usage().sort_values("lsn", ignore_index=True),
        Dataset.TRANSFERS: box.transfers().sort_values("tsn", ignore_index=True),
    }


class TestClosedDay:
    async def test_becomes_one_file_with_the_same_rows(self, box, ledger):
        await box.day(ledger)
        before = frames(box)
        made = await ledger.compact()
        for dataset, frame in frames(box).items():
            pd.testing.assert_frame_equal(frame, before[dataset])
        last = [int(frame[KEYS[dataset]].max()) for dataset, frame in before.items()]
        names = [f"compact-{1:012d}-{hi:012d}.parquet" for hi in last]
        assert sorted(made) == sorted(names)
        assert [box.files(dataset) for dataset in before] == [[name] for name in names]

    async def test_keeps_the_rows_in_order_and_its_schema(self, box, ledger):
        await box.day(ledger)
        schemas = {d: pq.read_schema(next(iter(box.folder(d).iterdir()))) for d in Dataset}
        await ledger.compact()
        for dataset in Dataset:
            (path,) = box.folder(dataset).iterdir()
            keys = pq.read_table(path, partitioning=None).column(KEYS[dataset]).to_pylist()
            assert keys == list(range(1, len(keys) + 1))
            assert pq.read_schema(path) == schemas[dataset]

    async def test_plain_readers_agree_after_it(self, box, ledger):
        await box.day(ledger)
        await box.day(ledger)
        await ledger.compact()
        await box.serve(ledger, 2)
        await ledger.publish()
        folder = box.config.ledger_dir / "usage"
        by_pandas = pd.read_parquet(folder)
        by_polars = pl.read_parquet(folder / "**/*.parquet")
        files = f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"
        (by_duckdb,) = duckdb.sql(f"SELECT count(*), sum(charge), max(lsn) FROM {files}").fetchall()
        expected = (len(by_pandas), by_pandas["charge"].sum(), by_pandas["lsn"].max())
        assert by_duckdb == expected
        polars = by_polars.select(pl.len(), pl.col("charge").sum(), pl.col("lsn").max()).row(0)
        assert polars == expected
        assert sorted(by_pandas["lsn"]) == list(range(1, len(by_pandas) + 1))

    async def test_is_answered_from_as_before(self, box, ledger):
        await box.day(ledger)
        asked = await ledger.request("req-1")
        usage = await ledger.usage(BY_DAY)
        await ledger.compact()
        assert await ledger.request("req-1") == asked
        assert await ledger.usage(BY_DAY) == usage

    async def test_survives_a_restart(self, box):
        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.day(ledger)
            await ledger.compact()
        before = frames(box)
        async with box.open() as ledger:
            assert await ledger.compact() == []
            for dataset, frame in frames(box).items():
                pd.testing.assert_frame_equal(frame, before[dataset])
            await box.day(ledger)
            assert (await ledger.verify())["finding"] is None

    async def test_is_compacted_once(self, box, ledger):
        await box.day(ledger)
        assert len(await ledger.compact()) == 2
        before = box.state_of_files()
        assert await ledger.compact() == []
        assert box.state_of_files() == before

    async def test_each_of_several_gets_a_file_of_its_own(self, box, ledger):
        await box.day(ledger, 2)
        await box.day(ledger, 2)
        assert len(await ledger.compact()) == 4
        assert len(box.files(Dataset.USAGE)) == len(box.files(Dataset.USAGE, "2026-11-02")) == 1
        assert (await ledger.verify())["finding"] is None

    async def test_with_one_part_is_left_alone(self, box, ledger):
        await box.serve(ledger, 3)
        await ledger.publish()
        before = box.state_of_files()
        box.clock.advance(DAY)
        assert await ledger.compact() == []
        assert box.state_of_files() == before


class TestOpenDay:
    async def test_today_is_not_touched(self, box, ledger):
        await box.day(ledger)
        await box.serve(ledger)
        await ledger.publish()
        await box.serve(ledger)
        await ledger.publish()
        today = box.files(Dataset.USAGE, "2026-11-02")
        await ledger.compact()
        assert box.files(Dataset.USAGE, "2026-11-02") == today
        assert len(today) == 2

    async def test_day_with_rows_that_are_not_public_is_not_touched(self, box, ledger):
        await box.day(ledger, 2)
        box.clock.advance(-DAY)
        await box.serve(ledger)
        box.clock.advance(DAY)
        before = box.state_of_files()
        assert await ledger._sealer.compact() == []
        assert box.state_of_files() == before
        assert len(await ledger.compact()) == 2
        assert (await ledger.verify())["finding"] is None

    async def test_day_that_gets_rows_after_all_is_compacted_again(self, box, ledger):
        """The clock stepped back: rows are booked on a day that was closed already."""
        await box.day(ledger, 2)
        await ledger.compact()
        box.clock.advance(-DAY)
        await box.serve(ledger, 2)
        box.clock.advance(DAY + 1)
        await ledger.publish()
        assert len(box.files(Dataset.USAGE)) == 2
        before = frames(box)
        assert len(await ledger.compact()) == 2
        for dataset, frame in frames(box).items():
            pd.testing.assert_frame_equal(frame, before[dataset])
        assert (await ledger.verify())["finding"] is None


class TestOldFiles:
    async def test_lie_in_the_grave_until_the_grace_period_is_over(self, box, ledger):
        await box.day(ledger)
        old = box.files(Dataset.USAGE) + box.files(Dataset.TRANSFERS)
        await ledger.compact()
        box.clock.advance(GRACE.total_seconds() - 1)
        await ledger.keep_house()
        assert sorted(path.name for path in box.staged()) == sorted(old)
        box.clock.advance(1)
        await ledger.keep_house()
        assert box.staged() == []
        assert list((box.config.staging_dir / "grave").iterdir()) == []

    async def test_are_no_longer_where_readers_look(self, box, ledger):
        await box.day(ledger)
        await ledger.compact()
        names = [path.name for path in box.state_of_files()]
        assert all(name.startswith("compact-") for name in names)

    async def test_reader_with_an_old_listing_gets_file_not_found(self, box, ledger):
        await box.day(ledger)
        listed = sorted(box.folder(Dataset.USAGE).iterdir())
        await ledger.compact()
        for path in listed:
            with pytest.raises(FileNotFoundError):
                pd.read_parquet(path)

    async def test_reader_that_has_a_file_open_reads_its_rows_to_the_end(self, box, ledger):
        await box.day(ledger)
        listed = sorted(box.folder(Dataset.USAGE).iterdir())
        expected = pa.concat_tables(
            [
                pq.read_table(path, partitioning=None)
                for path in listed
                if "genesis" not in path.name
            ]
        )
        opened = [path.open("rb") for path in listed if "genesis" not in path.name]
        await ledger.compact()
        box.clock.advance(2 * GRACE.total_seconds())
        await ledger.keep_house()
        read = pa.concat_tables([pq.read_table(file) for file in opened])
        for file in opened:
            file.close()
        assert read.equals(expected)


def drop_row(batch):
    return batch.slice(1)


def double_row(batch):
    return pa.RecordBatch.from_arrays(
        pa.Table.from_batches([batch, batch.slice(0, 1)]).combine_chunks().to_batches()[0].columns,
        schema=batch.schema,
    )


def swap_rows(batch):
    return batch.take(pa.array([1, 0, *range(2, batch.num_rows)]))


def change_text(batch):
    names = [field.name for field in batch.schema]
    place = names.index("request_id")
    values = [*batch.column(place).to_pylist()[:-1], "req-other"]
    columns = [*batch.columns]
    columns[place] = pa.array(values, pa.string())
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def change_money(batch):
    place = [field.name for field in batch.schema].index("charge")
    values = batch.column(place).to_pylist()
    columns = [*batch.columns]
    columns[place] = pa.array([values[0] + values[0], *values[1:]], batch.schema[place].type)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


MUTATIONS = [drop_row, double_row, swap_rows, change_text, change_money]


class TestMutation:
    """A compaction that changes anything is refused before readers can see it."""

    @pytest.mark.parametrize("mutate", MUTATIONS)
    async def test_of_what_is_written_is_refused(self, box, ledger, monkeypatch, mutate):
        await box.day(ledger)
        before = box.state_of_files()
        real = compaction.writer

        def writer(path, dataset):
            parquet = real(path, dataset)
            write = parquet.write_batch
            if dataset is Dataset.USAGE:
                parquet.write_batch = lambda rows: write(
                    mutate(rows) if rows.num_rows > 2 else rows
                )
            return parquet

        with monkeypatch.context() as patch:
            patch.setattr(compaction, "writer", writer)
            with pytest.raises(MarketFault):
                await ledger.compact()
        public = box.state_of_files()
        assert {path: public.get(path) for path in before if "usage" in str(path)} == {
            path: digest for path, digest in before.items() if "usage" in str(path)
        }
        await ledger.compact()
        assert len(box.files(Dataset.USAGE)) == len(box.files(Dataset.TRANSFERS)) == 1
        assert (await ledger.verify())["finding"] is None

    @pytest.mark.parametrize("mutate", MUTATIONS)
    async def test_of_a_public_part_is_refused(self, box, ledger, mutate):
        await box.day(ledger)
        path = sorted(box.folder(Dataset.USAGE).glob("part-0*"))[-1]
        (batch,) = pq.read_table(path, partitioning=None).combine_chunks().to_batches()
        pq.write_table(pa.Table.from_batches([mutate(batch)]), path)
        before = box.state_of_files()
        with pytest.raises(MarketFault):
            await ledger.compact()
        assert box.state_of_files().get(path) == before[path]

    async def test_missing_part_is_refused(self, box, ledger):
        await box.day(ledger)
        path = sorted(box.folder(Dataset.USAGE).glob("part-0*"))[1]
        path.unlink()
        before = box.state_of_files()
        with pytest.raises(FileNotFoundError):
            await ledger.compact()
        usage = {path for path in before if "usage" in str(path)}
        assert usage <= set(box.state_of_files())

    async def test_part_under_the_name_of_another_is_refused(self, box, ledger):
        await box.day(ledger)
        first, second, *_ = sorted(box.folder(Dataset.USAGE).glob("part-0*"))
        shutil.copy(first, second)
        with pytest.raises(MarketFault):
            await ledger.compact()


class Crash(Exception):
    pass


class TestCrash:
    """Stopping at any step leaves a day that the next start finishes or does again."""

    STEPS = (
        *("compact-built", "compact-prepared", "compact-exchanged"),
        *("compact-committed", "compact-buried"),
    )

    @pytest.mark.parametrize("step", STEPS)
    async def test_every_row_is_there_once_before_and_after_the_restart(
        self, box, step, monkeypatch
    ):
        def reach(point):
            if point == step:
                raise Crash(point)

        async with box.open() as ledger:
            await box.prepare(ledger)
            await box.day(ledger)
            before = frames(box)
            with monkeypatch.context() as patch:
                patch.setattr("market.crash.reach", reach)
                with pytest.raises(Crash):
                    await ledger.compact()
            for dataset, frame in frames(box).items():
                pd.testing.assert_frame_equal(frame, before[dataset])
        async with box.open() as ledger:
            box.clock.advance(1)
            await ledger.compact()
            for dataset, frame in frames(box).items():
                pd.testing.assert_frame_equal(frame, before[dataset])
                assert len(box.files(dataset)) == 1
            assert (await ledger.verify())["finding"] is None
