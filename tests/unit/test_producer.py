"""A gateway's records on their way to the ledger."""

import asyncio
from dataclasses import replace

import pytest

from market.errors import MarketFault, Overloaded
from market.fakes import FakeClock, MemoryLedger
from market.ledger.producer import Producer
from market.ledger.schema import decode_batch
from market.types import FinishReason, UsageQuality, UsageRecord
from tests.contracts.test_ledger import CHARGE, WANTED, record
from tests.samples import CARD, deposit, hold_request


class WireLedger(MemoryLedger):
    """The fake, spoken to in Arrow as over the wire; ``mishaps`` go wrong first."""

    def __init__(self):
        super().__init__(FakeClock())
        self.mishaps = []
        self.batches = []

    async def append(self, producer, epoch, first_seq, payload):
        rows = decode_batch(payload).to_pylist()
        self.batches.append((first_seq, len(rows)))
        mishap = self.mishaps.pop(0) if self.mishaps else None
        if isinstance(mishap, Exception):
            raise mishap
        known = {h.request.hold_id: h.request for h in self._books.holds.values()}
        records = [
            replace(
                UsageRecord.for_hold(
                    known[row["request_id"]],
                    counts=_counts(row),
                    finished_at=row["finished_at"],
                    charge_pico=int(row["charge"].scaleb(12)),
                    finish_reason=FinishReason(row["finish_reason"]),
                    usage_quality=UsageQuality(row["usage_quality"]),
                ),
                price_id=row["price_id"],
            ).emitted_by(row["producer"], row["epoch"], row["seq"])
            for row in rows
        ]
        return await self.append_records(producer, epoch, first_seq, records)


def _counts(row):
    from market.types import TokenCounts

    return TokenCounts(row["input_tokens"], row["cached_input_tokens"], row["output_tokens"])


@pytest.fixture
async def ledger():
    ledger = WireLedger()
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.transfer(deposit("10"))
    return ledger


@pytest.fixture
async def producer(ledger):
    producer = Producer(ledger, "gw0")
    await producer.start()
    yield producer
    await producer.stop()


async def finished(ledger, producer):
    request = hold_request(producer.next_request_id(), epoch=producer.identity()[1], **WANTED)
    await ledger.open_hold(request)
    return record(request, -1)


async def test_what_gathers_while_a_batch_is_away_goes_as_one(ledger, producer):
    records = [await finished(ledger, producer) for _ in range(20)]
    done = await asyncio.gather(*map(producer.record, records))
    assert [r.seq for r in done] == list(range(20))
    assert ledger.batches == [(0, 20)]
    assert len(ledger.records) == 20


async def test_request_ids_never_repeat_over_restarts(ledger, producer):
    first = producer.next_request_id()
    successor = Producer(ledger, "gw0")
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
    assert ledger.batches == [(0, 1)] * 3
    assert len(ledger.records) == 1


@pytest.mark.parametrize("flaw", [{"charge_pico": CHARGE + 1}, {"price_id": "price-none"}])
async def test_refused_record_takes_no_neighbour_along_and_its_hold_returns(ledger, producer, flaw):
    good = [await finished(ledger, producer) for _ in range(3)]
    bad = replace(await finished(ledger, producer), **flaw)
    results = await asyncio.gather(
        *map(producer.record, [good[0], bad, *good[1:]]), return_exceptions=True
    )
    assert isinstance(results[1], MarketFault)
    assert all(isinstance(result, UsageRecord) for result in [results[0], *results[2:]])
    account = await ledger.balance("acme")
    assert account.balance_pico == 10 * 10**12 - 3 * CHARGE
    if "charge_pico" in flaw:
        assert account.held_pico == 0
    producer.check()


async def test_record_that_fits_no_column_is_refused_and_sending_goes_on(ledger, producer):
    bad = replace(await finished(ledger, producer), claimed_output_tokens=2**70)
    with pytest.raises(MarketFault):
        await producer.record(bad)
    await producer.record(await finished(ledger, producer))
    assert (await ledger.balance("acme")).held_pico == 0


async def test_fenced_producer_says_so_and_sends_no_more(ledger, producer):
    mine = await finished(ledger, producer)
    await ledger.register_producer("gw0")
    with pytest.raises(MarketFault):
        await producer.record(mine)
    with pytest.raises(MarketFault, match="fenced"):
        producer.check()
    assert [r.usage_quality for r in ledger.records] == [UsageQuality.RECOVERED]


async def test_outcome_that_nobody_can_know_ends_the_sender(ledger, producer):
    ledger.mishaps = [RuntimeError("what was that?")]
    with pytest.raises(asyncio.CancelledError):
        await producer.record(await finished(ledger, producer))
    with pytest.raises(MarketFault, match="does not send"):
        producer.check()
    assert producer._sender is not None
    assert isinstance(producer._sender.exception(), RuntimeError)


async def test_gap_is_a_conflict_and_not_retried_for_ever(ledger, producer):
    producer._next_seq = 5
    with pytest.raises(MarketFault):
        await producer.record(await finished(ledger, producer))
