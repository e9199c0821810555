"""A producer of usage records: numbers them, sends them in batches, waits for the commit."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from market.errors import InvalidRequest, MarketError, MarketFault, Overloaded
from market.ledger.schema import encode_batch
from market.types import FinishReason, UsageRecord

logger = logging.getLogger(__name__)

BATCH_MAX = 256
REQUESTS_PER_EPOCH = 10**9

Waiting = tuple[UsageRecord, asyncio.Future[UsageRecord]]


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
        self._fenced = False
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take an epoch, which fences any older process with this name, and start sending."""
        self._epoch = await self._ledger.register_producer(self._name)
        self._sender = asyncio.create_task(self._send_forever())

    async def stop(self) -> None:
        """Stop sending; the ledger ends what was not committed when this name starts again."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    def check(self) -> None:
        """Raises MarketFault if records can no longer be sent: this process must be replaced."""
        if self._fenced:
            raise MarketFault(f"{self._name} of epoch {self._epoch} was fenced by a newer process")
        if self._sender is None or self._sender.done():
            raise MarketFault(f"{self._name} does not send its records")

    def identity(self) -> tuple[str, int]:
        """(producer, epoch)."""
        return self._name, self._epoch

    def next_request_id(self) -> str:
        """``req-<producer>-<n>``; n never repeats, because each epoch has its own range."""
        self._requests += 1
        return f"req-{self._name}-{self._epoch * REQUESTS_PER_EPOCH + self._requests}"

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Send the record; returns it with its number once the ledger has committed it.

        Raises MarketFault if this producer was fenced or the record refused; a refused one is
        booked as a fault of ours with charge 0.
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

    async def _send(self, batch: Sequence[Waiting]) -> None:
        try:
            sent = await self._append([record for record, _ in batch])
        except MarketError as error:
            await self._refused(batch, error)
            return
        except BaseException:
            # Whether it was booked is unknown, so its numbers must not be used again: this sender
            # ends, check() reports it, and the process that replaces ours takes a new epoch.
            for _, future in batch:
                future.cancel()
            raise
        for record, (_, future) in zip(sent, batch, strict=True):
            if not future.done():
                future.set_result(record)

    async def _refused(self, batch: Sequence[Waiting], error: MarketError) -> None:
        """The ledger has booked nothing of ``batch``."""
        self._fenced = self._fenced or error.code == "producer_fenced"
        if len(batch) > 1 and not self._fenced:
            for waiting in batch:  # one bad record must not take its neighbours along
                await self._send([waiting])
            return
        logger.error("usage of %s refused: %s", batch[0][0].request_id, error)
        if not self._fenced:
            await self._end_hold(batch[0][0])
        for _, future in batch:
            if not future.done():
                future.set_exception(MarketFault(f"usage was not recorded: {error}"))

    async def _end_hold(self, record: UsageRecord) -> None:
        """In place of a refused record, one that charges nothing, so that the money returns."""
        empty = replace(
            record,
            input_tokens=0,
            cached_input_tokens=0,
            output_tokens=0,
            claimed_output_tokens=None,
            charge_pico=0,
            finish_reason=FinishReason.MARKET_FAULT,
        )
        try:
            await self._append([empty])
        except MarketError as error:
            logger.error("hold of %s stays open: %s", record.request_id, error)

    async def _append(self, records: Sequence[UsageRecord]) -> list[UsageRecord]:
        """Number, send, and wait for the commit; an error means that nothing was booked."""
        numbered = [
            record.emitted_by(self._name, self._epoch, self._next_seq + offset)
            for offset, record in enumerate(records)
        ]
        try:
            payload = encode_batch(numbered)
        except (ValueError, OverflowError, TypeError) as error:
            raise InvalidRequest(f"record does not fit the ledger: {error}") from error
        while True:
            try:
                self._next_seq = await self._ledger.append(
                    self._name, self._epoch, numbered[0].seq, payload
                )
                return numbered
            except Overloaded as error:
                # Never give up on served tokens: the same batch again is booked once.
                logger.warning("ledger unreachable, trying again: %s", error)
                await asyncio.sleep(error.retry_after_s or 1)
