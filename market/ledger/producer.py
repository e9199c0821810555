"""A producer of usage records: spools them, numbers them, sends them in batches.

``record`` returns as soon as the record is safe in the sense of the configured UsageSync; a sender
brings it to the ledger, which books it once however often it comes.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from market import crash
from market.config import UsageSync
from market.errors import Conflict, InvalidRequest, MarketError, MarketFault, Overloaded
from market.ledger.schema import encode_batch
from market.ledger.spool import Orphan, Spool, orphans
from market.pricing import NO_PRICE
from market.types import FinishReason, UsageRecord

logger = logging.getLogger(__name__)

BATCH_MAX = 4096
FULL_BATCH = 256
BATCH_DELAY_S = 0.05
SYNC_DELAY_S = 0.005
WAITING_MAX = 100_000
FULL_DISK_RETRY_S = 1.0
SWEEP_POLL_S = 0.05
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

    def __init__(
        self, ledger: UsageLedger, name: str, folder: Path, sync: UsageSync = UsageSync.SPOOL
    ) -> None:
        self._ledger = ledger
        self._name = name
        self._folder = folder
        self._sync = sync
        self._epoch = 0
        self._requests = 0
        self._booked = 0
        self._failed = ""
        self._waiting: deque[UsageRecord] = deque()
        self._gathered = asyncio.Event()
        self._full = asyncio.Event()
        self._progress = asyncio.Condition()
        self._syncing: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Send what dead processes left, take an epoch (which fences them), start sending."""
        async with sweeping(self._folder):
            await sweep(self._ledger, self._folder, self._name)
            self._epoch = await self._ledger.register_producer(self._name)
            self._spool = Spool(self._folder, self._name, self._epoch)
        self._sender = asyncio.create_task(self._send_forever())

    async def stop(self) -> None:
        """Send what is waiting and stop; what cannot be sent now stays in the spool."""
        if self._sender is not None:
            self._full.set()
            while self._waiting and not self._cannot_send():
                async with self._progress:
                    await self._progress.wait()
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
            self._spool.close()

    def check(self) -> None:
        """Raises MarketFault if records can no longer be sent: this process must be replaced."""
        if self._failed:
            raise MarketFault(f"{self._name} of epoch {self._epoch}: {self._failed}")
        if self._sender is None or self._sender.done():
            raise MarketFault(f"{self._name} does not send its records")

    def identity(self) -> tuple[str, int]:
        """(producer, epoch). Raises Overloaded while too many records wait for the ledger."""
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded("the ledger does not keep up, try again", retry_after_s=5)
        return self._name, self._epoch

    def next_request_id(self) -> str:
        """``req-<producer>-<n>``; n never repeats, because each epoch has its own range."""
        self._requests += 1
        return f"req-{self._name}-{self._epoch * REQUESTS_PER_EPOCH + self._requests}"

    @property
    def unbooked(self) -> int:
        """Records in the spool that the ledger has not acknowledged."""
        return len(self._waiting)

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Record durably, as far as the configured sync level says, and return it.

        Raises MarketFault if this producer was fenced or the record does not fit the ledger, which
        then gets one that charges nothing. While the disk is full it waits: served tokens are not
        given up.
        """
        self.check()
        try:
            return await self._record(record)
        except InvalidRequest as error:
            await self._record(_emptied(record))
            raise MarketFault(f"usage was not recorded: {error}") from error

    async def _record(self, record: UsageRecord) -> UsageRecord:
        while True:
            try:
                seq = self._spool.append(record)
                break
            except OSError as error:
                logger.error("spool of %s: %s; trying again", self._name, error)
                await asyncio.sleep(FULL_DISK_RETRY_S)
        crash.reach("spooled")
        self._waiting.append(record)
        self._gathered.set()
        if len(self._waiting) >= FULL_BATCH:
            self._full.set()
        if self._sync is UsageSync.FSYNC:
            await self._synced()
        elif self._sync is UsageSync.ACK:
            self._full.set()
            await self._acknowledged(seq)
        return record

    async def _synced(self) -> None:
        """Wait for an fsync that began after the record was written; many share one."""
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_soon())
        await asyncio.shield(self._syncing)

    async def _sync_soon(self) -> None:
        await asyncio.sleep(SYNC_DELAY_S)
        self._syncing = None  # who comes now needs the next one
        try:
            await asyncio.to_thread(_sync_all, self._spool.descriptors())
        except OSError as error:
            self._failed = f"the spool's disk failed: {error}"
            raise MarketFault(f"{self._name}: {self._failed}") from error

    async def _acknowledged(self, seq: int) -> None:
        async with self._progress:
            await self._progress.wait_for(lambda: self._booked > seq or self._cannot_send())
        if self._booked <= seq:
            raise MarketFault(f"{self._name}: usage was not booked, this process is replaced")

    def _cannot_send(self) -> bool:
        return bool(self._failed) or self._sender is None or self._sender.done()

    async def _send_forever(self) -> None:
        try:
            while True:
                await self._gathered.wait()
                if len(self._waiting) < FULL_BATCH and not self._full.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._full.wait(), BATCH_DELAY_S)
                self._full.clear()
                await self._send()
                if not self._waiting:
                    self._gathered.clear()
        finally:
            async with self._progress:
                self._progress.notify_all()

    async def _send(self) -> None:
        """Send what has gathered, and forget it once the ledger has it."""
        batch = [self._waiting[place] for place in range(min(len(self._waiting), BATCH_MAX))]
        try:
            self._booked = await send(self._ledger, (self._name, self._epoch), self._booked, batch)
        except MarketError as error:
            logger.error("%s cannot send any more: %s", self._name, error)
            self._failed = f"cannot send any more ({error.code}): {error}"
            raise
        crash.reach("acknowledged")
        for _ in batch:
            self._waiting.popleft()
        self._spool.trim(self._booked)
        async with self._progress:
            self._progress.notify_all()


def _sync_all(descriptors: Sequence[int]) -> None:
    try:
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def sweeping(folder: Path) -> AsyncIterator[None]:
    """Be the only process of this machine that sweeps or takes an epoch.

    Another that took its epoch while we send its old records would fence them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(SWEEP_POLL_S)
        yield
    finally:
        os.close(descriptor)


async def sweep(ledger: UsageLedger, folder: Path, name: str) -> None:
    """Send the records that dead processes of this machine left, under their old identity.

    A producer whose records were found is fenced afterwards, so that holds which it left open
    end; ``name`` itself is about to be. Records that come too late (their epoch was fenced
    before) are put aside: their holds have ended.
    """
    swept = set()
    for orphan in orphans(folder):
        try:
            await _send_orphan(ledger, orphan)
        except MarketError as error:
            logger.error("%s was not booked: %s", orphan.path.name, error)
            orphan.path.rename(orphan.path.with_suffix(".refused"))
            continue
        crash.reach("swept")
        orphan.path.unlink()
        swept.add(orphan.producer)
    for producer in sorted(swept - {name}):
        await ledger.register_producer(producer)


async def _send_orphan(ledger: UsageLedger, orphan: Orphan) -> None:
    logger.info("sending %d records of %s", len(orphan.records), orphan.path.name)
    identity = (orphan.producer, orphan.epoch)
    for start in range(0, len(orphan.records), BATCH_MAX):
        part = orphan.records[start : start + BATCH_MAX]
        await send(ledger, identity, orphan.first_seq + start, part)


async def send(
    ledger: UsageLedger, identity: tuple[str, int], first_seq: int, records: Sequence[UsageRecord]
) -> int:
    """Have records booked, however long the ledger is away; returns the next sequence number.

    One that is refused must neither take its neighbours along nor leave a gap: in its place goes
    one that charges nothing and ends its hold, or, if its hold is the trouble, one without.
    Raises Conflict if the producer is fenced.
    """
    try:
        return await _append(ledger, identity, first_seq, records)
    except Conflict:
        raise
    except (MarketError, ValueError, OverflowError, TypeError) as error:
        if len(records) > 1:
            for offset, record in enumerate(records):
                await send(ledger, identity, first_seq + offset, [record])
            return first_seq + len(records)
        logger.error("usage of %s refused: %s", records[0].request_id, error)
    empty = _emptied(records[0])
    try:
        return await _append(ledger, identity, first_seq, [empty])
    except Conflict:
        raise
    except MarketError as error:
        logger.error("hold of %s is in disorder: %s", empty.request_id, error)
    attrs = (*empty.attrs, ("refused_request", empty.request_id or ""))
    nameless = msgspec.structs.replace(empty, request_id=None, slice_id=None, attrs=attrs)
    return await _append(ledger, identity, first_seq, [nameless])


async def _append(
    ledger: UsageLedger, identity: tuple[str, int], first_seq: int, records: Sequence[UsageRecord]
) -> int:
    payload = encode_batch(records)
    while True:
        try:
            return await ledger.append(*identity, first_seq, payload)
        except Overloaded as error:
            # Never give up on served tokens: the same batch again is booked once.
            logger.warning("ledger unreachable, trying again: %s", error)
            await asyncio.sleep(error.retry_after_s or 1)


def _emptied(record: UsageRecord) -> UsageRecord:
    """In place of a refused record, one that charges nothing, so that the money returns."""
    return msgspec.structs.replace(
        record,
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        claimed_output_tokens=None,
        price_id=NO_PRICE.price_id,
        charge_pico=0,
        finish_reason=FinishReason.MARKET_FAULT,
        queue_ms=None,
        ttft_ms=None,
        duration_ms=None,
    )
