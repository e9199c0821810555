"""A producer of usage records: numbers them, sends them in batches, waits for the commit."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from market.errors import InvalidRequest, MarketError, MarketFault, Overloaded
from market.ledger.schema import encode_batch
from market.types import UsageRecord

logger = logging.getLogger(__name__)

BATCH_MAX = 256
REQUESTS_PER_EPOCH = 10**9


class UsageLedger(Protocol):
    """The part of the ledger that a producer needs."""

    async def register_producer(self, producer: str) -> int:
        """A new epoch for this producer."""
        ...

    async def append(self, producer: str, epoch: int, first_seq: int, payload: bytes) -> int:
        """Book a batch exactly once."""
        ...


class Producer:
    """The UsageSink of one gateway. While one batch is on its way, the next one gathers."""

    def __init__(self, ledger: UsageLedger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._epoch = 0
        self._next_seq = 0
        self._requests = 0
        self._waiting: asyncio.Queue[tuple[UsageRecord, asyncio.Future[UsageRecord]]]
        self._waiting = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take an epoch, which fences any older process with this name, and start sending."""
        self._epoch = await self._ledger.register_producer(self._name)
        self._sender = asyncio.create_task(self._send_forever())

    async def stop(self) -> None:
        """Stop sending; records not yet committed are reported as failed."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    def identity(self) -> tuple[str, int]:
        """(producer, epoch)."""
        return self._name, self._epoch

    def next_request_id(self) -> str:
        """``req-<producer>-<n>``; n never repeats, because each epoch has its own range."""
        self._requests += 1
        return f"req-{self._name}-{self._epoch * REQUESTS_PER_EPOCH + self._requests}"

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Send the record; returns it with its number once the ledger has committed it.

        Raises MarketFault if this producer was fenced or the record refused.
        """
        future: asyncio.Future[UsageRecord] = asyncio.get_running_loop().create_future()
        await self._waiting.put((record, future))
        return await future

    async def _send_forever(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH_MAX and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._send(batch)

    async def _send(self, batch: Sequence[tuple[UsageRecord, asyncio.Future[UsageRecord]]]) -> None:
        numbered = [
            record.emitted_by(self._name, self._epoch, self._next_seq + offset)
            for offset, (record, _) in enumerate(batch)
        ]
        try:
            self._next_seq = await self._append(numbered)
        except MarketError as error:
            rejected = isinstance(error, InvalidRequest) or error.code == "hold_error"
            if rejected and len(batch) > 1:
                for item in batch:  # one bad record must not take its neighbours along
                    await self._send([item])
                return
            logger.error("usage of %s not recorded: %s", numbered[0].request_id, error)
            for _, future in batch:
                if not future.cancelled():
                    future.set_exception(MarketFault(f"usage was not recorded: {error.message}"))
            return
        for record, (_, future) in zip(numbered, batch, strict=True):
            if not future.cancelled():
                future.set_result(record)

    async def _append(self, records: Sequence[UsageRecord]) -> int:
        payload = encode_batch(records)
        while True:
            try:
                return await self._ledger.append(self._name, self._epoch, records[0].seq, payload)
            except Overloaded as error:
                # Never give up on served tokens: the same batch again is booked once.
                logger.warning("ledger unreachable, trying again: %s", error)
                await asyncio.sleep(error.retry_after_s or 1)
