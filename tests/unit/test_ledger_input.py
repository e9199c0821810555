"""What must not get into the ledger, and disks that fail: refused clearly, nothing changes."""

import asyncio
import errno

import msgspec
import pyarrow as pa
import pytest

from market.accounts import HoldStatus
from market.errors import InvalidRequest
from market.ledger import files, store
from market.ledger.schema import BATCH, decode, encode_batch
from market.types import RecordKind
from tests.contracts.test_ledger import CHARGE, WANTED, record
from tests.samples import hold_request
from tests.unit.test_ledger_files import Box


@pytest.fixture
async def box(tmp_path):
    box = Box(tmp_path)
    async with box.open() as ledger:
        await box.prepare(ledger)
        await ledger.open_hold(hold_request("r", epoch=box.epoch, **WANTED))
        box.ledger = ledger
        box.good = record(hold_request("r", epoch=box.epoch, **WANTED))
        yield box
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10**13, WANTED["wanted_pico"])
        assert (await ledger.status())["next_lsn"] == 1


async def refuse(box, payload):
    with pytest.raises(InvalidRequest):
        await box.ledger.append("gw0", box.epoch, 0, payload)


async def test_batch_cut_off_anywhere_is_refused(box):
    whole = encode_batch([box.good])
    for end in [*range(0, 200), *range(200, len(whole), 97)]:
        with pytest.raises(InvalidRequest):
            decode(whole[:end])
    await refuse(box, whole[: len(whole) // 2])


async def test_batch_of_another_schema_is_refused(box):
    drifted = pa.RecordBatch.from_pylist([{"lsn": 1}])
    await refuse(box, drifted.serialize().to_pybytes())
    await refuse(box, b"\0" * 8 + encode_batch([box.good])[8:])


async def test_batch_that_is_too_large_is_refused(box, monkeypatch):
    monkeypatch.setattr(store, "BATCH_MAX", 2)
    await refuse(box, encode_batch([box.good] * 3))


@pytest.mark.parametrize("kind", [RecordKind.REVERSAL, RecordKind.ADJUSTMENT])
async def test_only_the_ledger_makes_corrections(box, kind):
    await refuse(box, encode_batch([msgspec.structs.replace(box.good, kind=kind)]))


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_id": "nobody"},
        {"provider_id": "nobody"},
        {"slice_id": None},
        {"slice_id": "no-slice"},
        {"currency": "EUR"},
        {"input_tokens": -100},
        {"kind": RecordKind.GPU},
        {"price_id": "none"},
    ],
)
async def test_record_that_does_not_fit_the_books_is_refused(box, change):
    await refuse(box, encode_batch([msgspec.structs.replace(box.good, **change)]))


async def test_schema_of_a_batch_is_that_of_the_ledger_less_the_envelope(box):
    assert decode(encode_batch([box.good])).schema == BATCH


async def test_failing_fsync_ends_the_process_and_is_not_tried_again(tmp_path, monkeypatch):
    box = Box(tmp_path)
    tries = []

    def fsync(_descriptor):
        tries.append(1)
        raise OSError(errno.EIO, "Input/output error")

    async with box.open() as ledger:
        await box.prepare(ledger)
        await box.serve(ledger)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fsync)
            with pytest.raises(files.SyncFailed):
                await ledger.publish()
        assert box.fatal == [1]
        assert tries == [1]
    assert len(box.usage()) == 1


async def test_a_thousand_holds_at_once_never_exceed_a_dollar(tmp_path):
    box = Box(tmp_path)
    async with box.open() as ledger:
        await box.prepare(ledger)
        each = {"wanted_pico": 10**13 // 100, "minimum_pico": 10**13 // 100}
        requests = [hold_request(f"r{n}", epoch=box.epoch, **each) for n in range(1024)]
        results = await asyncio.gather(*map(ledger.open_hold, requests))
        granted = [r for r in results if r.status is HoldStatus.GRANTED]
        assert len(granted) == 100
        account = await ledger.balance("acme")
        assert (account.available_pico, account.held_pico) == (0, 10**13)
        assert each["wanted_pico"] > CHARGE
