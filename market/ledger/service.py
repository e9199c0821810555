"""The ledger service: one writer thread, group commit, a loop that publishes.

Thin: rules are in market.accounts, rows in store and registry, files in publisher. It knows
nothing of Ray; in the market it runs inside one actor.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from sqlalchemy import Connection

from market import accounts as rules
from market import storage
from market.config import Config
from market.errors import NotFound, Overloaded
from market.ledger import registry, reports, tables
from market.ledger.publisher import Dataset, Publisher, seal_interval
from market.ledger.store import LedgerStore
from market.ports import Clock
from market.types import CURRENCY, HoldRequest, Principal, RateCard

logger = logging.getLogger(__name__)

GROUP_MAX = 512
QUEUE_MAX = 10_000
LOCK_PATIENCE_S = 5.0
REPORTS_MAX = 2

Waiting = tuple[storage.Command, asyncio.Future[Any]]


def exit_process() -> None:
    """End this process at once; Ray starts a new one, which recovers from SQL."""
    os._exit(70)


class Ledger:
    """Start it with ``open``; every other public coroutine is one command."""

    def __init__(
        self, config: Config, clock: Clock, on_fatal: Callable[[], None] = exit_process
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_fatal = on_fatal
        self._store = LedgerStore(clock)
        self._publisher = Publisher(config.ledger_dir, config.staging_dir)
        self._commands: asyncio.Queue[Waiting]
        self._commands = asyncio.Queue(QUEUE_MAX)
        self._writer = ThreadPoolExecutor(1, "ledger-writer")
        self._files = ThreadPoolExecutor(1, "ledger-files")
        self._publishing = asyncio.Lock()
        self._reporting = asyncio.Semaphore(REPORTS_MAX)
        self._resources = contextlib.ExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def open(self) -> None:
        """Lock, connect, repair, and start the writer and the publisher.

        Raises MarketFault if another process has the lock or the database; may be tried again.
        """
        try:
            lock = storage.exclusive_lock(self._config.state_dir / "ledger.lock", LOCK_PATIENCE_S)
            await asyncio.to_thread(self._resources.enter_context, lock)
            self._engine = await asyncio.get_running_loop().run_in_executor(
                self._writer, storage.connect, self._config.ledger_url, tables.metadata
            )
            self._resources.callback(self._engine.dispose)
            for result in await self._run_group([self._publisher.repair, self._store.load]):
                if isinstance(result, Exception):
                    raise result
            for dataset in Dataset:
                self._publisher.genesis(dataset, self._clock.now().date())
        except BaseException:
            self._resources.close()
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._write_forever()),
            loop.create_task(self._publish_forever()),
        ]

    async def close(self) -> None:
        """Publish everything and let go of the database. Later commands are refused."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.publish()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._writer.shutdown()
            self._files.shutdown()
            self._resources.close()

    # -- commands --------------------------------------------------------------------------

    async def create_tenant(self, tenant_id: str) -> bool:
        """Make a tenant and its account; False if it is there."""

        def command(connection: Connection) -> bool:
            created = registry.create_tenant(connection, tenant_id, self._clock.now())
            account = rules.prepaid_account(rules.tenant_account(tenant_id), CURRENCY)
            self._store.open_account(connection, account)
            return created

        return bool(await self._command(command))

    async def create_provider(self, provider_id: str) -> bool:
        """Make a provider and its account; False if it is there."""

        def command(connection: Connection) -> bool:
            created = registry.create_provider(connection, provider_id, self._clock.now())
            account = rules.prepaid_account(rules.provider_account(provider_id), CURRENCY)
            self._store.open_account(connection, account)
            return created

        return bool(await self._command(command))

    async def tenants(self) -> list[str]:
        """Ids of all tenants."""
        return list(await self._command(registry.list_tenants))

    async def providers(self) -> list[str]:
        """Ids of all providers."""
        return list(await self._command(registry.list_providers))

    async def balance(self, tenant_id: str) -> rules.Account:
        """A tenant's account. Raises NotFound."""
        account_id = rules.tenant_account(tenant_id)
        account = await self._command(lambda c: self._store.account(c, account_id))
        if account is None:
            raise NotFound(f"tenant {tenant_id!r} does not exist", code="tenant_not_found")
        return account  # type: ignore[no-any-return]

    async def accounts(self) -> list[rules.Account]:
        """All accounts."""
        return list(await self._command(self._store.accounts))

    async def transfer(self, transfer: rules.Transfer) -> None:
        """Move money once per id. Raises Conflict or InvalidRequest."""
        await self._command(lambda c: self._store.transfer(c, transfer))

    async def add_key(self, principal: Principal, key_hash: str) -> Principal:
        """Store the hash of a key."""
        now = self._clock.now()
        added = await self._command(lambda c: registry.add_key(c, principal, key_hash, now))
        return added  # type: ignore[no-any-return]

    async def find_key(self, key_hash: str) -> Principal | None:
        """Whom a key speaks for, None if nobody."""
        found = await self._command(lambda c: registry.find_key(c, key_hash))
        return found  # type: ignore[no-any-return]

    async def keys(self, subject_id: str | None) -> list[dict[str, str | None]]:
        """Keys of one subject or all, without secrets."""
        return list(await self._command(lambda c: registry.list_keys(c, subject_id)))

    async def revoke_key(self, api_key_id: str) -> None:
        """End a key."""
        now = self._clock.now()
        await self._command(lambda c: registry.revoke_key(c, api_key_id, now))

    async def add_rate_cards(self, cards: list[RateCard], only_new_models: bool) -> None:
        """Add prices; with ``only_new_models`` leave models alone that have one."""
        now = self._clock.now()

        def command(connection: Connection) -> None:
            for card in cards:
                priced = registry.rate_card(connection, card.model, now) is not None
                if not (only_new_models and priced):
                    registry.add_rate_card(connection, card)

        await self._command(command)

    async def rate_card(self, model: str) -> RateCard | None:
        """The price in force."""
        now = self._clock.now()
        found = await self._command(lambda c: registry.rate_card(c, model, now))
        return found  # type: ignore[no-any-return]

    async def rate_cards(self) -> list[RateCard]:
        """The price in force of every model."""
        now = self._clock.now()
        return list(await self._command(lambda c: registry.current_rate_cards(c, now)))

    async def open_hold(self, request: HoldRequest) -> rules.HoldResult:
        """Set money aside for a request."""
        result = await self._command(lambda c: self._store.open_hold(c, request))
        return result  # type: ignore[no-any-return]

    async def open_holds(self) -> list[rules.Hold]:
        """Holds that have not ended."""
        return list(await self._command(self._store.open_holds))

    async def register_producer(self, producer: str) -> int:
        """A new epoch; the old one is fenced and its open holds resolved."""
        epoch = await self._command(lambda c: self._store.register_producer(c, producer))
        return int(epoch)

    async def append(self, producer: str, epoch: int, first_seq: int, payload: bytes) -> int:
        """Book a batch of usage exactly once; returns the next sequence number."""
        command = partial(
            self._store.append,
            producer=producer,
            epoch=epoch,
            first_seq=first_seq,
            payload=payload,
        )
        return int(await self._command(command))

    async def usage(self, by: list[str], tenant_id: str | None) -> list[dict[str, Any]]:
        """Sums over every booked row, sealed or not."""
        files, live = await self._command(lambda c: self._publisher.live(c, Dataset.USAGE))
        async with self._reporting:
            return await asyncio.to_thread(reports.usage, files, live, by, tenant_id)

    async def status(self) -> dict[str, Any]:
        """Counters for people and tests."""
        held = await self._command(self._store.count_open_holds)
        return {
            "pid": os.getpid(),
            "epoch": self._store.counters.epoch,
            "next_lsn": self._store.counters.next_lsn,
            "open_holds": held,
            "path": str(self._config.ledger_dir / Dataset.USAGE),
        }

    async def publish(self) -> None:
        """Make everything booked so far public."""
        async with self._publishing:
            # An earlier round may have stopped half-way (disk full, a crash): finish that first.
            await self._submit(self._publisher.repair)
            for dataset in Dataset:
                while await self._publish_part(dataset):
                    pass

    # -- the writer ------------------------------------------------------------------------

    async def _command(self, command: storage.Command) -> Any:
        if self._closed:
            raise Overloaded("the ledger is shutting down", retry_after_s=5)
        return await self._submit(command)

    async def _submit(self, command: storage.Command) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._commands.put((command, future))
        return await future

    async def _write_forever(self) -> None:
        while True:
            waiting = [await self._commands.get()]
            while len(waiting) < GROUP_MAX and not self._commands.empty():
                waiting.append(self._commands.get_nowait())
            try:
                results = await self._run_group([command for command, _ in waiting])
            except Exception as error:
                self._answer(waiting, [error] * len(waiting))
                raise
            self._answer(waiting, results)

    def _answer(self, waiting: list[Waiting], results: list[Any]) -> None:
        for (_, future), result in zip(waiting, results, strict=True):
            if future.done():
                continue  # whoever asked is gone; the command was done all the same
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _run_group(self, commands: list[storage.Command]) -> list[Any]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._writer, storage.run_group, self._engine, self._store.counters, commands
            )
        except Exception:
            # A write or commit failed: what is on disk is unknown, so recover by starting again.
            logger.exception("the ledger's database failed")
            self._on_fatal()
            raise

    # -- the publisher ---------------------------------------------------------------------

    async def _publish_forever(self) -> None:
        while True:
            today = self._clock.now().date()
            parts = await self._submit(
                partial(self._publisher.parts_on, dataset=Dataset.USAGE, day=today)
            )
            await asyncio.sleep(seal_interval(parts))
            try:
                await self.publish()
            except Exception:  # whatever it was, rows must not stay unpublished for ever
                logger.exception("publishing failed; the next round tries again")

    async def _publish_part(self, dataset: Dataset) -> bool:
        loop = asyncio.get_running_loop()
        rows = await self._submit(lambda c: self._publisher.pending(c, dataset))
        if rows is None:
            return False
        part = await loop.run_in_executor(self._files, self._publisher.stage, dataset, rows)
        await self._submit(lambda c: self._publisher.prepare(c, part))
        await loop.run_in_executor(self._files, self._publisher.link, part)
        await self._submit(lambda c: self._publisher.confirm(c, part))
        return True
