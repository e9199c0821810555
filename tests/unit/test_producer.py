"""A gateway's records on their way to the ledger."""

import asyncio
import contextlib
import os

import msgspec
import pytest

from market.config import UsageSync
from market.errors import MarketFault, Overloaded
from market.fakes import FakeClock, MemoryLedger
from market.ledger import producer as producing
from market.ledger import spool
from market.ledger.producer import Producer
from market.ledger.schema import decode
from market.pricing import NO_PRICE
from market.types import FinishReason, UsageQuality, UsageRecord
from tests.contracts.test_ledger import CHARGE, record
from tests.samples import CARD, deposit, hold_request


class WireLedger(MemoryLedger):
    """The fake, spoken to in Arrow as over the wire; ``mishaps`` go wrong first."""

    def __init__(self):
        super().__init__(FakeClock())
        self.mishaps = []
        self.batches = []

    async def append(self, producer, epoch, first_seq, payload):
        rows = decode(payload).to_pylist()
        self.batches.append((producer, epoch, first_seq, len(rows)))
        mishap = self.mishaps.pop(0) if self.mishaps else None
        if isinstance(mishap, Exception):
            raise mishap
        records = [
            UsageRecord(
                charge_pico=int(row.pop("charge").scaleb(12)),
                finish_reason=FinishReason(row.pop("finish_reason")),
                usage_quality=UsageQuality(row.pop("usage_quality")),
                attrs=tuple(row.pop("attrs") or ()),
                **row,
            )
            for row in rows
        ]
        return await self.append_records(producer, epoch, first_seq, records)


@pytest.fixture
async def ledger():
    ledger = WireLedger()
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.transfer(deposit("10"))
    return ledger


@pytest.fixture(params=list(UsageSync))
async def any_producer(ledger, tmp_path, request):
    producer = Producer(ledger, "gw0", tmp_path, request.param)
    await producer.start()
    yield producer
    await producer.stop()


@pytest.fixture
async def producer(ledger, tmp_path):
    producer = Producer(ledger, "gw0", tmp_path, UsageSync.ACK)
    await producer.start()
    yield producer
    await producer.stop()


async def finished(ledger, producer, **changes):
    """The record of a request that is under way until it is recorded."""
    name, epoch = producer.identity()
    money = {"wanted_pico": 10**12, "minimum_pico": 10**12}
    hold = hold_request(f"slice-{name}-{epoch}", producer=name, epoch=epoch, **money)
    await ledger.open_hold(hold)
    made = record(hold, request_id=producer.next_request_id(), **changes)
    producer.begin(
        msgspec.structs.replace(
            made,
            input_tokens=0,
            cached_input_tokens=0,
            output_tokens=0,
            charge_pico=0,
            finish_reason=FinishReason.MARKET_FAULT,
            usage_quality=UsageQuality.RECOVERED,
        )
    )
    return made


class Died(BaseException):
    """The process would be gone."""


def dies_at(point):
    def reach(name):
        if name == point:
            raise Died

    return reach


@contextlib.asynccontextmanager
async def killed(ledger, folder, name="gw0"):
    """A producer whose process dies: its sender ends, its locks go, its files stay."""
    producer = Producer(ledger, name, folder)
    await producer.start()
    ledger.mishaps = [Overloaded("away", retry_after_s=60)] * 3
    yield producer
    producer._sender.cancel()
    await asyncio.gather(producer._sender, return_exceptions=True)
    producer._spool.close()
    producer._inflight.close(keep=True)
    ledger.mishaps = []


async def test_what_gathers_goes_as_one(ledger, producer):
    records = [await finished(ledger, producer) for _ in range(20)]
    await asyncio.gather(*map(producer.record, records))
    assert ledger.batches == [("gw0", 1, 0, 20)]
    assert len(ledger.records) == 20


async def test_every_level_books_each_record_once_and_empties_the_spool(
    ledger, any_producer, tmp_path
):
    records = [await finished(ledger, any_producer) for _ in range(600)]
    await asyncio.gather(*map(any_producer.record, records))
    await any_producer.stop()
    assert [r.request_id for r in ledger.records] == [r.request_id for r in records]
    assert list(tmp_path.glob("*.spool")) == []


async def test_request_ids_never_repeat_over_restarts(ledger, producer, tmp_path):
    first = producer.next_request_id()
    successor = Producer(ledger, "gw0", tmp_path)
    await successor.start()
    assert first == "req-gw0-1000000001"
    assert successor.next_request_id() == "req-gw0-2000000001"
    await successor.stop()


async def test_batch_that_got_no_answer_is_sent_again_as_it_was(ledger, producer):
    ledger.mishaps = [
        Overloaded("away", retry_after_s=0.001),
        Overloaded("away", retry_after_s=0.001),
    ]
    await producer.record(await finished(ledger, producer))
    assert ledger.batches == [("gw0", 1, 0, 1)] * 3
    assert len(ledger.records) == 1


@pytest.mark.parametrize("flaw", [{"charge_pico": CHARGE + 1}, {"price_id": "price-none"}])
async def test_refused_record_takes_no_neighbour_along(ledger, producer, flaw):
    good = [await finished(ledger, producer) for _ in range(3)]
    bad = msgspec.structs.replace(await finished(ledger, producer), **flaw)
    await asyncio.gather(*map(producer.record, [good[0], bad, *good[1:]]))
    account = await ledger.balance("acme")
    assert account.balance_pico == 10 * 10**12 - 3 * CHARGE
    in_its_place = ledger.records[1]
    assert (in_its_place.request_id, in_its_place.charge_pico) == (bad.request_id, 0)
    assert in_its_place.finish_reason is FinishReason.MARKET_FAULT
    producer.check()


async def test_record_whose_hold_is_gone_leaves_no_gap(ledger, producer):
    lost = await finished(ledger, producer, slice_id="slice-of-nobody")
    await producer.record(lost)
    good = await finished(ledger, producer)
    await producer.record(good)
    assert [r.request_id for r in ledger.records] == [None, good.request_id]
    assert dict(ledger.records[0].attrs) == {"refused_request": lost.request_id}
    assert (await ledger.balance("acme")).balance_pico == 10 * 10**12 - CHARGE


async def test_record_that_fits_no_column_is_refused_and_sending_goes_on(ledger, producer):
    bad = msgspec.structs.replace(await finished(ledger, producer), claimed_output_tokens=2**70)
    with pytest.raises(MarketFault):
        await producer.record(bad)
    await producer.record(await finished(ledger, producer))
    assert ledger.records[0].price_id == NO_PRICE.price_id


async def test_fenced_producer_says_so_and_sends_no_more(ledger, producer):
    mine = await finished(ledger, producer)
    await ledger.register_producer("gw0")
    with pytest.raises(MarketFault):
        await producer.record(mine)
    with pytest.raises(MarketFault, match="fenced"):
        producer.check()
    assert ledger.records == []


async def test_outcome_that_nobody_can_know_ends_the_sender(ledger, producer):
    ledger.mishaps = [RuntimeError("what was that?")]
    with pytest.raises(MarketFault):
        await producer.record(await finished(ledger, producer))
    with pytest.raises(MarketFault, match="does not send"):
        producer.check()


async def test_too_many_unbooked_records_stop_admission(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("market.ledger.producer.WAITING_MAX", 2)
    async with killed(ledger, tmp_path) as producer:
        records = [await finished(ledger, producer) for _ in range(2)]
        for one in records:
            await producer.record(one)
        with pytest.raises(Overloaded, match="does not keep up"):
            producer.identity()


class TestOrphans:
    async def test_records_of_a_dead_process_are_booked_under_their_old_identity(
        self, ledger, tmp_path
    ):
        async with killed(ledger, tmp_path) as dead:
            records = [await finished(ledger, dead) for _ in range(5)]
            for one in records:
                await dead.record(one)
            unfinished = await finished(ledger, dead)
        successor = Producer(ledger, "gw0", tmp_path)
        await successor.start()
        await successor.stop()
        booked = [r.request_id for r in ledger.records]
        assert booked == [r.request_id for r in [*records, unfinished]]
        assert ledger.records[-1].usage_quality is UsageQuality.RECOVERED
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10 * 10**12 - 5 * CHARGE, 0)
        assert [path.name for path in tmp_path.glob("gw*")] == []

    async def test_sweep_that_is_killed_is_done_again(self, ledger, tmp_path, monkeypatch):
        """At each step: nothing twice, and what was finished is not called unfinished."""
        async with killed(ledger, tmp_path) as dead:
            done = await finished(ledger, dead)
            await dead.record(done)
            lost = [await finished(ledger, dead) for _ in range(3)]
            dead._inflight.add(done)  # killed between the two lines that record and forget it
        for point in ("swept", "recovered"):
            with monkeypatch.context() as patch:
                patch.setattr("market.ledger.producer.crash.reach", dies_at(point))
                with pytest.raises(Died):
                    await Producer(ledger, "gw0", tmp_path).start()
        successor = Producer(ledger, "gw0", tmp_path)
        await successor.start()
        await successor.stop()
        booked = [r.request_id for r in ledger.records]
        assert sorted(booked) == sorted(r.request_id for r in [done, *lost])
        assert (await ledger.balance("acme")).held_pico == 0

    async def test_living_gateway_sees_to_one_that_died(self, ledger, tmp_path):
        living = Producer(ledger, "gw1", tmp_path)
        await living.start()
        async with killed(ledger, tmp_path) as dead:
            lost = await finished(ledger, dead)
        await living.sweep_others()
        assert [r.request_id for r in ledger.records] == [lost.request_id]
        assert (await ledger.balance("acme")).held_pico == 0
        await living.stop()

    async def test_orphan_of_another_slot_is_swept_and_its_producer_fenced(self, ledger, tmp_path):
        async with killed(ledger, tmp_path, "gw7") as dead:
            await dead.record(await finished(ledger, dead))
            await finished(ledger, dead)
        successor = Producer(ledger, "gw0", tmp_path)
        await successor.start()
        await successor.stop()
        assert [r.usage_quality for r in ledger.records] == ["engine", "recovered"]
        assert (await ledger.balance("acme")).held_pico == 0

    async def test_records_that_come_after_their_fence_are_put_aside(self, ledger, tmp_path):
        async with killed(ledger, tmp_path) as dead:
            await dead.record(await finished(ledger, dead))
        await ledger.register_producer("gw0")  # another node took the slot over
        successor = Producer(ledger, "gw0", tmp_path)
        await successor.start()
        await successor.stop()
        assert ledger.records == []
        assert [path.suffix for path in tmp_path.glob("gw0*")] == [".refused"]

    async def test_two_processes_that_start_at_once_do_not_fence_each_other_s_orphans(
        self, ledger, tmp_path
    ):
        async with killed(ledger, tmp_path, "gw1") as dead:
            records = [await finished(ledger, dead) for _ in range(3)]
            for one in records:
                await dead.record(one)
        ledger.mishaps = [Overloaded("away", retry_after_s=0.05)] * 3  # the sweep takes a while
        heirs = [Producer(ledger, name, tmp_path) for name in ("gw0", "gw1")]
        await asyncio.gather(*(heir.start() for heir in heirs))
        for heir in heirs:
            await heir.stop()
        assert [r.request_id for r in ledger.records] == [r.request_id for r in records]
        assert {r.usage_quality for r in ledger.records} == {"engine"}

    async def test_spool_of_a_living_process_is_left_alone(self, ledger, tmp_path):
        async with killed(ledger, tmp_path) as alive:
            await alive.record(await finished(ledger, alive))
            assert list(spool.orphans(tmp_path, dead=())) == []

    async def test_one_that_ends_while_spools_are_read_left_nothing(self, tmp_path, monkeypatch):
        (tmp_path / "gw0.1.0.spool").touch()

        def ends(folder, producer, epoch):
            (path,) = folder.glob("*.spool")
            path.unlink()
            return folder / "gone"

        monkeypatch.setattr(spool, "table_path", ends)
        assert list(spool.orphans(tmp_path, dead=())) == []

    async def test_one_that_dies_during_a_sweep_waits_for_the_next(
        self, ledger, tmp_path, monkeypatch
    ):
        """Its table was in use when the sweep looked, its spool no longer is."""
        living = Producer(ledger, "gw1", tmp_path)
        await living.start()
        async with contextlib.AsyncExitStack() as life:
            dying = await life.enter_async_context(killed(ledger, tmp_path))
            done, lost = [await finished(ledger, dying) for _ in range(2)]
            await dying.record(done)
            looked = producing.unfinished(tmp_path)
        assert (looked, len(list(tmp_path.glob("gw0*")))) == ([], 2)
        with monkeypatch.context() as patch:
            patch.setattr(producing, "unfinished", lambda folder: looked)
            await living.sweep_others()
        assert ledger.records == []
        await living.sweep_others()
        assert [(r.request_id, r.usage_quality) for r in ledger.records] == [
            (done.request_id, "engine"),
            (lost.request_id, "recovered"),
        ]
        assert (await ledger.balance("acme")).held_pico == 0
        await living.stop()

    async def test_one_that_was_replaced_while_it_lived_does_not_fence_its_heir(
        self, ledger, tmp_path
    ):
        living = Producer(ledger, "gw1", tmp_path)
        await living.start()
        async with contextlib.AsyncExitStack() as life:
            replaced = await life.enter_async_context(killed(ledger, tmp_path))
            await finished(ledger, replaced)
            heir = Producer(ledger, "gw0", tmp_path)
            await heir.start()
        await living.sweep_others()
        await heir.record(await finished(ledger, heir))
        await heir.flush()
        heir.check()
        await heir.stop()
        await living.stop()
        assert list(tmp_path.glob("gw*")) == []

    async def test_torn_end_is_left_out_at_every_byte(self, ledger, tmp_path):
        async with killed(ledger, tmp_path) as dead:
            records = [await finished(ledger, dead) for _ in range(3)]
            for one in records:
                await dead.record(one)
        (path,) = tmp_path.glob("*.spool")
        whole = path.read_bytes()
        record_bytes = len(whole) // 3
        for cut in range(2 * record_bytes, len(whole)):
            path.write_bytes(whole[:cut])
            (orphan,) = spool.orphans(tmp_path, {("gw0", 1)})
            assert list(orphan.records) == records[:2]

    async def test_flipped_bit_ends_the_spool_before_the_record(self, ledger, tmp_path):
        async with killed(ledger, tmp_path) as dead:
            for _ in range(3):
                await dead.record(await finished(ledger, dead))
        (path,) = tmp_path.glob("*.spool")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        (orphan,) = spool.orphans(tmp_path, {("gw0", 1)})
        assert len(orphan.records) == 1


async def test_full_disk_makes_record_wait_and_loses_nothing(ledger, tmp_path, monkeypatch):
    producer = Producer(ledger, "gw0", tmp_path)
    await producer.start()
    monkeypatch.setattr("market.ledger.producer.FULL_DISK_RETRY_S", 0.01)
    real, failures = os.write, [3]

    def write(descriptor, content):
        if failures[0]:
            failures[0] -= 1
            real(descriptor, content[: len(content) // 2])  # a short write, then nothing more
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr("market.ledger.spool.os.write", write)
        for _ in range(3):
            await producer.record(await finished(ledger, producer))
    await producer.stop()
    assert len(ledger.records) == 3
