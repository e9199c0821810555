"""Sealing: what is booked becomes public, closed days become one file, the log gets signed."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Connection, delete, select

from market import crash
from market.accounts import HoldState
from market.config import Config
from market.ledger import files, manifest, tables
from market.ledger.compaction import Compactor
from market.ledger.log import Frontier, Signer
from market.ledger.manifest import Dataset
from market.ledger.publisher import Publisher, seal_interval
from market.ledger.state import State
from market.ledger.writer import Writer
from market.ports import Clock

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 60.0
CHECKPOINT_EVERY = timedelta(hours=1)
JOURNAL_KEPT = timedelta(hours=1)
HOLDS_KEPT = timedelta(hours=1)
PRUNED_AT_ONCE = 256


class Sealer:
    """The ledger's files: publishing, compaction, checkpoints, and their two loops."""

    def __init__(self, config: Config, clock: Clock, writer: Writer) -> None:
        self._clock = clock
        self._writer = writer
        self._proof_dir = config.proof_dir
        self._signer_file = config.signing_key_file
        self.publisher = Publisher(config.ledger_dir, config.staging_dir)
        self.compactor = Compactor(self.publisher, config.staging_dir)
        self._publishing = asyncio.Lock()
        # Whoever reads files by name or the journal for long holds this: compaction and pruning
        # wait for it.
        self.files_stay = asyncio.Lock()
        self._frontier = Frontier()
        self._signed_at: datetime | None = None

    def open(self) -> None:
        """After the repairs in SQL: bury what an exchange left, make the empty ledgers."""
        crash.reach("repaired")
        self.compactor.bury(self._clock.now())
        for dataset in Dataset:
            self.publisher.genesis(dataset, self._clock.now().date())
        self.signer = Signer.load(self._signer_file)
        self._proof_dir.mkdir(parents=True, exist_ok=True)
        (self._proof_dir / "ledger.pub").write_text(self.signer.verifier() + "\n")

    async def publish(self) -> None:
        """Make everything booked so far public."""
        async with self._publishing:
            # An earlier round may have stopped half-way (disk full, a crash): finish that first.
            await self._writer.submit(self.publisher.repair)
            for dataset in Dataset:
                while await self._publish_part(dataset):
                    pass

    async def _publish_part(self, dataset: Dataset) -> bool:
        submit, on_files = self._writer.submit, self._writer.on_files
        sealable = await submit(lambda c: manifest.sealable(c, dataset))
        if sealable is None:
            return False
        part = await on_files(self.publisher.stage, sealable)
        await submit(lambda c: manifest.prepare(c, part))
        crash.reach("prepared")
        await on_files(self.publisher.link, part)
        await submit(lambda c: manifest.confirm(c, part))
        crash.reach("published")
        return True

    async def compact(self) -> list[str]:
        """Make each closed day one file; returns the names of the new files."""
        if not self.compactor.possible:
            return []
        made = []
        submit, on_files = self._writer.submit, self._writer.on_files
        async with self.files_stay, self._publishing:
            today = self._clock.now().date()
            for parts in await submit(lambda c: self.compactor.closed_days(c, today)):
                compacted = await on_files(self.compactor.build, parts)
                await submit(partial(self.compactor.prepare, compacted=compacted))
                crash.reach("compact-prepared")
                await on_files(self.compactor.exchange, compacted)
                await submit(partial(self.compactor.commit, compacted=compacted))
                crash.reach("compact-committed")
                await on_files(self.compactor.bury, self._clock.now())
                made.append(compacted.file)
        return made

    async def keep_house(self, state: State) -> None:
        """Compact, clear graves, forget what is published and old, sign a checkpoint."""
        await self.compact()
        now = self._clock.now()
        await self._writer.on_files(self.compactor.clear_graves, now)
        async with self.files_stay:
            prune = partial(prune_journal, state=state, before=now - JOURNAL_KEPT)
            while await self._writer.submit(prune):
                pass
        while await self._writer.submit(lambda c: prune_holds(c, now - HOLDS_KEPT)):
            pass
        if self._signed_at is None or now - self._signed_at >= CHECKPOINT_EVERY:
            await self.sign()

    async def sign(self) -> str:
        """A checkpoint of everything published: signed, stored, and put beside the ledgers."""
        note = str(await self._writer.submit(self._sign))
        await self._writer.on_files(self._write_checkpoint, note)
        self._signed_at = self._clock.now()
        return note

    def _sign(self, connection: Connection) -> str:
        for leaf in manifest.leaves_from(connection, self._frontier.size):
            self._frontier.append(leaf)
        size, root = self._frontier.size, self._frontier.root()
        known = select(tables.checkpoints.c.note).where(tables.checkpoints.c.size == size)
        note = connection.execute(known).scalar()
        if note is None:
            note = self.signer.checkpoint(size, root)
            connection.execute(
                tables.checkpoints.insert().values(
                    size=size, root=root, note=note, made_at=self._clock.now()
                )
            )
        return str(note)

    def _write_checkpoint(self, note: str) -> None:
        size = note.split("\n")[1]
        folder = self._proof_dir / "checkpoints"
        folder.mkdir(exist_ok=True)
        for target in (folder / f"{int(size):012d}", self._proof_dir / "checkpoint"):
            fresh = target.with_name(f".{target.name}")
            fresh.write_text(note)
            files.sync_file(fresh)
            fresh.replace(target)
        files.sync_folders(folder, self._proof_dir)

    async def publish_forever(self) -> None:
        """Publish every few seconds, less often the more parts the day has."""
        while True:
            today = self._clock.now().date()
            count = partial(manifest.count_on, dataset=Dataset.USAGE, day=today)
            await asyncio.sleep(seal_interval(await self._writer.submit(count)))
            try:
                await self.publish()
            except Exception:  # whatever it was, rows must not stay unpublished for ever
                logger.exception("publishing failed; the next round tries again")

    async def keep_house_forever(self, state: Callable[[], State]) -> None:
        """Keep house every minute."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                await self.keep_house(state())
            except Exception:  # a day that cannot be compacted must not end the loop
                logger.exception("housekeeping failed; the next round tries again")


def prune_journal(connection: Connection, state: State, before: datetime) -> int:
    """Delete entries that are public and older than ``before``; the chain's head before the first
    one left is kept. Returns how many were deleted.
    """
    journal, counters = tables.journal.c, state.counters
    sealed = {dataset: manifest.sealed_until(connection, dataset) for dataset in Dataset}
    query = select(
        journal.entry, journal.booked_at, journal.lsn_hi, journal.tsn_hi, journal.head
    ).order_by(journal.entry)
    last = None
    pruned = 0
    for row in connection.execute(query.limit(PRUNED_AT_ONCE)):
        public = row.lsn_hi <= sealed[Dataset.USAGE] and row.tsn_hi <= sealed[Dataset.TRANSFERS]
        if not public or row.booked_at >= before:
            break
        last = row
        pruned += 1
    if last is not None:
        connection.execute(delete(tables.journal).where(journal.entry <= last.entry))
        counters.pruned_entry, counters.pruned_head = last.entry, last.head
        state.counted = True
    return pruned


def prune_holds(connection: Connection, before: datetime) -> int:
    """Delete holds that ended before; their rows in the ledgers stay. Returns how many."""
    holds = tables.holds.c
    old = (
        select(holds.hold_id)
        .where(holds.state != HoldState.PENDING, holds.changed_at < before)
        .limit(PRUNED_AT_ONCE)
    )
    return connection.execute(delete(tables.holds).where(holds.hold_id.in_(old))).rowcount
