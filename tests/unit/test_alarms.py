"""What may be losing money is noticed, and nothing else raises an alarm."""

import contextlib
from datetime import timedelta
from decimal import Decimal

import duckdb
import msgspec
import pyarrow as pa
import pytest

from market.ledger import alarms
from market.ledger.schema import USAGE, encode_batch
from market.ledger.snapshot import cards_table
from tests.contracts.test_ledger import WANTED, record
from tests.samples import CARD, NOON, hold_request
from tests.unit.test_ledger_files import Box


@pytest.fixture
async def box(tmp_path):
    box = Box(tmp_path)
    async with box.open() as ledger:
        await box.prepare(ledger)
        box.ledger = ledger
        yield box


async def book(box, number, **changes):
    """One answer of 10 tokens on record."""
    request = hold_request(f"req-{number}", epoch=box.epoch, **WANTED)
    await box.ledger.open_hold(request)
    made = msgspec.structs.replace(record(request), **changes)
    box.seq = await box.ledger.append("gw0", box.epoch, box.seq, encode_batch([made]))


async def names(box):
    return [alarm.name for alarm in (await box.ledger.watch()).alarms]


async def test_healthy_ledger_has_none(box):
    await book(box, 1, attrs=(("replica", "a"), ("served_tokens", "10")), claimed_output_tokens=10)
    box.clock.advance(120)
    assert await names(box) == []
    assert (await box.ledger.status())["capture_ratio"] == {"a": 1.0}


async def test_tokens_that_a_replica_delivered_without_a_record(box):
    await book(box, 1, attrs=(("replica", "a"),))
    await book(box, 2, attrs=(("replica", "a"), ("served_tokens", "40")))
    assert await names(box) == [], "what ended a moment ago may still be on its way"
    box.clock.advance(120)
    assert await names(box) == ["tokens_without_record"]
    assert (await box.ledger.status())["capture_ratio"] == {"a": 0.5}


async def test_replica_that_claims_another_count(box):
    await book(box, 1, claimed_output_tokens=2000)
    assert await names(box) == ["claim_differs"]


async def test_hold_that_is_never_ended(box):
    request = hold_request("slice-9", epoch=box.epoch, **WANTED)
    await box.ledger.open_hold(request)
    box.clock.advance(timedelta(hours=3).total_seconds())
    assert await names(box) == ["stale_holds"]


async def test_rows_that_are_not_published(box):
    await book(box, 1)
    box.clock.advance(600)
    assert await names(box) == ["publish_lag"]
    await box.ledger.publish()
    assert await names(box) == []


class Charged:
    """A snapshot with one finished answer of the given charge: the books would refuse it."""

    def __init__(self, charge):
        rows = [
            {
                "kind": "tokens",
                "charge": charge,
                "lane": "tokens",
                "booked_at": NOON,
                "finished_at": NOON,
                "finish_reason": "stop",
                "input_tokens": 5,
                "output_tokens": 7,
                "claimed_output_tokens": 7,
                "provider_id": "local",
                "price_id": CARD.price_id,
                "attrs": None,
            }
        ]
        fields = [USAGE.field(name) for name in rows[0]]
        self.usage = pa.Table.from_pylist(rows, schema=pa.schema(fields))

    def connect(self):
        connection = duckdb.connect()
        connection.register("usage", self.usage)
        connection.register("rate_cards", cards_table({CARD.price_id: CARD}))
        return contextlib.closing(connection)


@pytest.mark.parametrize(("charge", "raised"), [(0, ["tokens_for_free"]), (1, [])])
def test_finished_answer_that_cost_nothing(charge, raised):
    numbers = {"stale_holds": 0, "publish_lag_s": 0.0}
    watch = alarms.look(Charged(Decimal(charge)), NOON, numbers)
    assert [alarm.name for alarm in watch.alarms] == raised


async def test_is_logged_once_while_it_lasts(box, caplog):
    await book(box, 1, claimed_output_tokens=2000)
    for _ in range(3):
        await box.ledger.watch()
    assert sum("ALARM claim_differs" in message for message in caplog.messages) == 1
