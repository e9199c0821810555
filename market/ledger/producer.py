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
from market.ledger.inflight import InflightTable, Unfinished, unfinished
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

    async def producer_mark(self, producer: str) -> tuple[int, int]:
        """(epoch, next sequence number)."""
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
        self.name = name
        self._folder = folder
        self._sync = sync
        self.epoch = 0
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
            await sweep(self._ledger, self._folder, self.name)
            self.epoch = await self._ledger.register_producer(self.name)
            self._spool = Spool(self._folder, self.name, self.epoch)
            self._inflight = InflightTable(self._folder, self.name, self.epoch)
        self._sender = asyncio.create_task(self._send_forever())

    async def sweep_others(self) -> None:
        """Send what other processes of this machine left that have died since."""
        async with sweeping(self._folder):
            await sweep(self._ledger, self._folder, None)

    async def flush(self) -> None:
        """Wait until what is waiting is sent, if it can be."""
        self._full.set()
        while self._waiting and not self._cannot_send():
            async with self._progress:
                await self._progress.wait()

    async def stop(self) -> None:
        """Send what is waiting and stop; what cannot be sent now stays in the spool."""
        if self._sender is not None:
            await self.flush()
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
            self._spool.close()
            self._inflight.close(keep=bool(self._waiting) or self._inflight.used)

    def check(self) -> None:
        """Raises MarketFault if records can no longer be sent: this process must be replaced."""
        if self._failed:
            raise MarketFault(f"{self.name} of epoch {self.epoch}: {self._failed}")
        if self._sender is None or self._sender.done():
            raise MarketFault(f"{self.name} does not send its records")

    def identity(self) -> tuple[str, int]:
        """(producer, epoch). Raises Overloaded while too many records wait for the ledger."""
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded("the ledger does not keep up, try again", retry_after_s=5)
        return self.name, self.epoch

    def next_request_id(self) -> str:
        """``req-<producer>-<n>``; n never repeats, because each epoch has its own range."""
        self._requests += 1
        return f"req-{self.name}-{self.epoch * REQUESTS_PER_EPOCH + self._requests}"

    @property
    def booked(self) -> int:
        """Records with a smaller number are in the ledger."""
        return self._booked

    @property
    def next_seq(self) -> int:
        """Number of the next record."""
        return self._spool.next_seq

    def begin(self, record: UsageRecord) -> None:
        """A request is under way; this is its record if it is never finished.

        Raises Overloaded if the disk is full.
        """
        try:
            self._inflight.add(record)
        except OSError as error:
            raise Overloaded("no room on the gateway's disk", retry_after_s=10) from error

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
                self._inflight.set_next_seq(seq + 1)
                self._inflight.remove(record.request_id)
                break
            except OSError as error:
                logger.error("spool of %s: %s; trying again", self.name, error)
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
            raise MarketFault(f"{self.name}: {self._failed}") from error

    async def _acknowledged(self, seq: int) -> None:
        async with self._progress:
            await self._progress.wait_for(lambda: self._booked > seq or self._cannot_send())
        if self._booked <= seq:
            raise MarketFault(f"{self.name}: usage was not booked, this process is replaced")

    def _cannot_send(self) -> bool:
        return bool(self._failed) or self._sender is None or self._sender.done()

    async def _send_forever(self) -> None:
        try:
            while True:
                await self._gathered.wait()
                if len(self._waiting) < FULL_BATCH and not self._full.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(BATCH_DELAY_S):
                            await self._full.wait()
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
            self._booked = await send(self._ledger, (self.name, self.epoch), self._booked, batch)
        except MarketError as error:
            logger.error("%s cannot send any more: %s", self.name, error)
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


async def sweep(ledger: UsageLedger, folder: Path, name: str | None) -> None:
    """Send the records that dead processes of this machine left, under their old identity.

    Requests that they left unfinished get theirs: charge 0. A producer of which something was found
    is fenced afterwards, so that holds which it left open end; ``name`` itself is about to be.
    Records that come too late (their epoch was fenced before) are put aside: their holds have
    ended.
    """
    # Who is dead is decided once, before the spools are read: one that dies between the two looks
    # would get its unfinished requests booked and its finished ones fenced off.
    tables = unfinished(folder)
    sent: list[Path] = []
    swept = set()
    recorded: dict[tuple[str, int], set[str | None]] = {}
    for orphan in orphans(folder, {(table.producer, table.epoch) for table in tables}):
        try:
            await _send_orphan(ledger, orphan)
        except MarketError as error:
            logger.error("%s was not booked: %s", orphan.path.name, error)
            orphan.path.rename(orphan.path.with_suffix(".refused"))
            continue
        crash.reach("swept")
        names = recorded.setdefault((orphan.producer, orphan.epoch), set())
        names.update(record.request_id for record in orphan.records)
        sent.append(orphan.path)
        if orphan.records:
            swept.add(orphan.producer)
    for table in tables:
        known = recorded.get((table.producer, table.epoch), set())
        lost = [record for record in table.records if record.request_id not in known]
        if await _recover(ledger, table, lost):
            swept.add(table.producer)
        crash.reach("recovered")
    # Tables first: only with the records of its spool is it known which requests were finished.
    for path in [*(table.path for table in tables), *sent]:
        path.unlink(missing_ok=True)
    for producer in sorted(swept - {name}):
        await ledger.register_producer(producer)


async def _send_orphan(ledger: UsageLedger, orphan: Orphan) -> None:
    logger.info("sending %d records of %s", len(orphan.records), orphan.path.name)
    identity = (orphan.producer, orphan.epoch)
    for start in range(0, len(orphan.records), BATCH_MAX):
        part = orphan.records[start : start + BATCH_MAX]
        await send(ledger, identity, orphan.first_seq + start, part)


async def _recover(ledger: UsageLedger, table: Unfinished, records: Sequence[UsageRecord]) -> bool:
    """Give unfinished requests their records, after all that their process wrote.

    Always under the same numbers, so that a sweep that is killed can be done again. False if the
    epoch was fenced before: what it held has returned, and a living one may have taken its place.
    """
    epoch, next_seq = await ledger.producer_mark(table.producer)
    if epoch != table.epoch:
        return False
    if next_seq < table.next_seq:
        logger.error("records of %s were lost before they were sent", table.path.name)
    try:
        first_seq = min(next_seq, table.next_seq)
        await send(ledger, (table.producer, table.epoch), first_seq, records)
    except MarketError as error:
        logger.error("%s was not recovered: %s", table.path.name, error)
    return True


async def send(
    ledger: UsageLedger, identity: tuple[str, int], first_seq: int, records: Sequence[UsageRecord]
) -> int:
    """Have records booked, however long the ledger is away; returns the next sequence number.

    One that is refused must neither take its neighbours along nor leave a gap: in its place goes
    one that charges nothing, or, if its hold is the trouble, one without.
    Raises Conflict if the producer is fenced.
    """
    if not records:
        return first_seq
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
