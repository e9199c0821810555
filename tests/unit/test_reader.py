"""``market.ledger.read`` over real files and the rows that are in none of them."""

from datetime import timedelta

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

import market.ledger
from market.errors import InvalidRequest, MarketFault, NotFound
from market.ledger import reader
from tests.unit.test_ledger_files import Box


@pytest.fixture
async def box(tmp_path):
    """Five rows on two days in files, two rows in none."""
    box = Box(tmp_path)
    async with box.open() as ledger:
        await box.prepare(ledger)
        await box.serve(ledger, 3)
        await ledger.publish()
        box.clock.advance(86_400)
        await box.serve(ledger, 2)
        await ledger.publish()
        await box.serve(ledger, 2)
        box.live = {
            (kind, after): await ledger.live(kind, after)
            for kind in ("usage", "transfers")
            for after in range(20)
        }
        yield box


@pytest.fixture
def answering(box, monkeypatch):
    """The market's HTTP answer, without HTTP."""

    def read_live(_config, kind, after):
        return pa.ipc.open_stream(box.live[str(kind), after]).read_all()

    monkeypatch.setattr(reader, "_read_live", read_live)
    return box


def read(box, *arguments, **options):
    return market.ledger.read(*arguments, config=box.config, **options)


async def test_files_alone_have_what_is_published(box):
    assert read(box, live=False)["lsn"].to_pylist() == [1, 2, 3, 4, 5]


async def test_live_rows_come_on_top_once(answering):
    assert read(answering)["lsn"].to_pylist() == [1, 2, 3, 4, 5, 6, 7]
    transfers = read(answering, "transfers")
    assert transfers["tsn"].to_pylist() == list(range(1, transfers.num_rows + 1))


async def test_filters_by_tenant_model_and_time(answering):
    assert read(answering, tenant="somebody").num_rows == 0
    assert read(answering, tenant="acme", model="tiny").num_rows == 7
    noon = answering.clock.now() - timedelta(hours=1)
    assert read(answering, since=noon)["lsn"].to_pylist() == [4, 5, 6, 7]
    assert read(answering, until=noon.replace(tzinfo=None))["lsn"].to_pylist() == [1, 2, 3]
    assert read(answering, "transfers", tenant="acme").num_rows > 0


async def test_forms(answering):
    frame = read(answering, form="pandas")
    assert isinstance(frame, pd.DataFrame)
    assert frame["charge"].sum() == sum(read(answering)["charge"].to_pylist())
    relation = read(answering, form="duckdb")
    assert isinstance(relation, duckdb.DuckDBPyRelation)
    assert relation.aggregate("count(*)").fetchall() == [(7,)]


async def test_gap_in_a_listing_is_never_read_over(box):
    (middle,) = box.config.ledger_dir.glob("usage/date=2026-11-01/part-0*.parquet")
    middle.unlink()
    with pytest.raises(MarketFault, match="gap"):
        read(box, live=False)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [(("costs",), {}), (("transfers",), {"model": "tiny"}), ((), {"form": "polars"})],
)
async def test_mistakes_are_named(box, arguments, options):
    with pytest.raises(InvalidRequest):
        read(box, *arguments, live=False, **options)


async def test_without_a_ledger_it_says_where_it_looked(tmp_path):
    with pytest.raises(NotFound, match="MARKET_HOME"):
        read(Box(tmp_path / "nowhere"), live=False)
