"""The ledger service: every public coroutine is one command.

Thin: the writer shares transactions, the store knows what happens inside one, the sealer makes
files of it, settler and auditor do what their names say. It knows nothing of Ray; in the market it
runs inside one actor.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from market import accounts as rules
from market import budgets, storage, when
from market.config import Config
from market.errors import MarketFault, NotFound, Overloaded
from market.ledger import (
    alarms,
    exports,
    manifest,
    refunds,
    registry,
    reports,
    snapshot,
    statements,
)
from market.ledger.alarms import Watch
from market.ledger.audit import Auditor
from market.ledger.focus import FocusContext
from market.ledger.manifest import Dataset
from market.ledger.reports import UsageQuery
from market.ledger.sealing import Sealer
from market.ledger.settling import Settler, settlement_row, settlement_rows
from market.ledger.snapshot import Snapshot
from market.ledger.statement import Party, Statement
from market.ledger.store import LEDGER_PRODUCER, LedgerStore
from market.ledger.writer import Writer
from market.ports import Clock
from market.types import (
    CURRENCY,
    Access,
    HoldChange,
    HoldRequest,
    KeyPolicy,
    Lane,
    Pack,
    PackLeft,
    Period,
    Principal,
    RateCard,
    Role,
)

LOCK_PATIENCE_S = 5.0
REPORTS_MAX = 2
RESERVE_BYTES = 64 * 2**20
ROOM_CHECK_S = 1.0
WATCH_S = 60.0
# Gateways begin new slices long before.
STALE_HOLD = timedelta(hours=2)
LIVE_ENTRIES_MAX = 65_536

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
        self._store = LedgerStore(clock)
        self._writer = Writer(config.ledger_url, self._store, on_fatal)
        self._sealer = Sealer(config, clock, self._writer)
        self._settler = Settler(config, clock, self._writer, self._store, self._sealer)
        self._auditor = Auditor(config, self._writer, self._store, self._sealer)
        self._reporting = asyncio.Semaphore(REPORTS_MAX)
        self._resources = contextlib.ExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._room_asked_s = float("-inf")
        self._has_room = True
        self._watch = Watch()
        self._access_changes = 0

    async def open(self) -> None:
        """Lock, connect, migrate, repair, and start the writer and the loops.

        Raises MarketFault if another process has the lock or the database; may be tried again.
        """
        try:
            lock = storage.exclusive_lock(self._config.state_dir / "ledger.lock", LOCK_PATIENCE_S)
            await asyncio.to_thread(self._resources.enter_context, lock)
            repairs = [self._sealer.publisher.repair, self._sealer.compactor.repair]
            await self._writer.open([*repairs, self._store.open])
            await asyncio.to_thread(self._sealer.open)
            self._auditor.clear()
        except BaseException:
            self._resources.close()
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._sealer.publish_forever()),
            loop.create_task(self._sealer.keep_house_forever(lambda: self._store.state)),
            loop.create_task(self._watch_forever()),
        ]

    async def close(self) -> None:
        """Publish everything and let go of the database. Later commands are refused."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._sealer.publish()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._writer.close()
            self._resources.close()

    # -- who takes part, at what price -----------------------------------------------------

    async def create_tenant(self, tenant_id: str) -> bool:
        """Make a tenant and its account; False if it is there."""

        def command(connection: Connection) -> bool:
            created = registry.create_tenant(connection, tenant_id, self._clock.now())
            account = rules.prepaid_account(rules.tenant_account(tenant_id), CURRENCY)
            self._store.open_accounts(connection, [account])
            return created

        return bool(await self._command(command))

    async def create_provider(self, provider_id: str) -> bool:
        """Make a provider and its accounts; False if it is there."""

        def command(connection: Connection) -> bool:
            created = registry.create_provider(connection, provider_id, self._clock.now())
            accounts = rules.provider_accounts(provider_id, CURRENCY)
            self._store.open_accounts(connection, accounts)
            return created

        return bool(await self._command(command))

    async def tenants(self) -> list[str]:
        """Ids of all tenants."""
        return list(await self._command(registry.list_tenants))

    async def providers(self) -> list[str]:
        """Ids of all providers."""
        return list(await self._command(registry.list_providers))

    async def add_key(self, principal: Principal, key_hash: str) -> Principal:
        """Store the hash of a key."""
        now = self._clock.now()
        added = await self._command(lambda c: registry.add_key(c, principal, key_hash, now))
        self._access_changes += 1
        return added  # type: ignore[no-any-return]

    async def find_key(self, key_hash: str) -> Principal | None:
        """Whom a key speaks for, None if nobody."""
        now = self._clock.now()
        found = await self._command(lambda c: registry.find_key(c, key_hash, now))
        return found  # type: ignore[no-any-return]

    async def access(self) -> Access:
        """What gateways keep at hand."""
        now = self._clock.now()

        def command(connection: Connection) -> Access:
            version = f"{self._store.mark(LEDGER_PRODUCER).epoch}.{self._access_changes}"
            return Access(version, tuple(registry.current_rate_cards(connection, now)))

        found = await self._command(command)
        return found  # type: ignore[no-any-return]

    async def keys(self, owner: tuple[Role, str] | None) -> list[dict[str, Any]]:
        """Keys of one subject or all, without secrets."""
        return list(await self._command(lambda c: registry.list_keys(c, owner)))

    async def key(self, api_key_id: str) -> Principal:
        """Whose key it is and what it may do, as it was set. Raises NotFound."""
        found: Principal = await self._command(lambda c: registry.key(c, api_key_id))
        return found

    async def set_policy(self, api_key_id: str, policy: KeyPolicy) -> None:
        """What a key may do from now on. Raises NotFound."""
        await self._command(lambda c: registry.set_policy(c, api_key_id, policy))
        self._access_changes += 1

    async def rotate_key(self, api_key_id: str, key_hash: str, overlap: timedelta) -> datetime:
        """A new secret for a key; until the time returned the old one works, too.

        Raises NotFound, Conflict.
        """
        until = self._clock.now() + overlap
        await self._command(lambda c: registry.rotate_key(c, api_key_id, key_hash, until))
        self._access_changes += 1
        return until

    async def revoke_key(self, api_key_id: str) -> None:
        """End a key."""
        now = self._clock.now()
        await self._command(lambda c: registry.revoke_key(c, api_key_id, now))
        self._access_changes += 1

    async def set_weight(self, tenant_id: str, weight: int) -> None:
        """A tenant's share of contended pools. Raises NotFound, InvalidRequest."""
        await self._command(lambda c: registry.set_weight(c, tenant_id, weight))
        self._access_changes += 1

    async def weights(self) -> dict[str, int]:
        """Every tenant's share of contended pools."""
        return dict(await self._command(registry.weights))

    async def set_budgets(self, subject: str, limits: dict[Period, int | None]) -> None:
        """Set (or, with None, remove) what a key or tenant may spend per period, in pico units.

        ``subject`` is an API key's id or a tenant's account id. What it spent before in a period
        that goes on counts.
        """
        now = self._clock.now()
        self._access_changes += 1
        until_lsn = await self._command(lambda c: self._store.set_budgets(c, subject, limits))
        for period in [name for name, limit_pico in limits.items() if limit_pico is not None]:
            since = budgets.window(period, now)[0]
            before_pico = await self._ask(
                lambda s: reports.spent_before(s, subject, since, until_lsn)  # noqa: B023
            )
            await self._command(
                lambda c: self._store.found_spent(subject, period, since, before_pico)  # noqa: B023
            )

    async def budget_rows(self, subject: str) -> list[dict[str, Any]]:
        """A subject's budgets with what was spent and when they begin anew."""
        return list(await self._command(lambda c: self._store.budget_rows(subject)))

    async def buy_tokens(self, pack: Pack, card: RateCard, made_by: str) -> tuple[Pack, bool]:
        """Sell a token pack to its tenant, once per id; whether it is new.

        Raises Conflict, InsufficientBalance, NotFound.
        """
        bought = await self._command(lambda c: self._store.buy_tokens(c, pack, card, made_by))
        return bought  # type: ignore[no-any-return]

    async def packs(self, tenant_id: str) -> list[PackLeft]:
        """A tenant's packs that can be drawn on."""
        return list(await self._command(lambda c: self._store.packs_left(c, tenant_id)))

    async def add_rate_cards(self, cards: list[RateCard], only_new_models: bool) -> None:
        """Add prices; with ``only_new_models`` leave models alone that have one."""
        now = self._clock.now()

        def command(connection: Connection) -> None:
            for card in cards:
                priced = registry.rate_card(connection, card.model, now) is not None
                if not (only_new_models and priced):
                    self._store.add_rate_card(connection, card)

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

    # -- books -----------------------------------------------------------------------------

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
        await self._command(lambda c: self._store.transfer(c, [transfer]))

    async def refund(self, refund: refunds.Refund) -> dict[str, Any]:
        """Take back a request or part of it, or give an adjustment; once per id.

        Raises NotFound, Conflict (id used otherwise, taken back before), InvalidRequest.
        """
        original = None
        if refund.request_id is not None:
            rows = await self.request(refund.request_id)
            original = rows[0]
        booked = await self._command(
            lambda c: refunds.book(c, self._store, refund, original, self._clock.now())
        )
        return booked  # type: ignore[no-any-return]

    async def open_hold(self, request: HoldRequest) -> rules.HoldResult:
        """Set money aside for a request or a slice. Raises Overloaded while the disk is full."""
        if not self._room():
            raise _full_disk()
        result = await self._command(lambda c: self._store.open_hold(c, request))
        return result  # type: ignore[no-any-return]

    async def resize_hold(self, producer: str, epoch: int, change: HoldChange) -> rules.HoldResult:
        """Let a hold grow or shrink, once per version. Raises Conflict, InvalidRequest."""
        if not self._room():
            raise _full_disk()
        result = await self._command(lambda c: self._store.resize_hold(c, change, producer, epoch))
        return result  # type: ignore[no-any-return]

    async def end_hold(self, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a hold."""
        await self._command(lambda c: self._store.end_hold(c, producer, epoch, hold_id))

    async def open_holds(self) -> list[rules.Hold]:
        """Holds that have not ended."""
        return list(await self._command(self._store.open_holds))

    async def register_producer(self, producer: str) -> int:
        """A new epoch; the old one is fenced and its open holds resolved."""
        epoch = await self._command(lambda c: self._store.register_producer(c, producer))
        return int(epoch)

    async def producer_mark(self, producer: str) -> tuple[int, int]:
        """(epoch, next sequence number) of a producer."""
        mark = await self._command(lambda c: self._store.mark(producer))
        return mark.epoch, mark.next_seq

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

    # -- questions -------------------------------------------------------------------------

    async def usage(self, query: UsageQuery) -> list[dict[str, Any]]:
        """Sums over every booked row, sealed or not."""
        return await self._ask(lambda s: reports.usage(s, query))

    async def usage_buckets(
        self, query: UsageQuery, width: str, groups: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Sums per time bucket. Raises InvalidRequest."""
        return await self._ask(lambda s: reports.buckets(s, query, width, groups))

    async def arrivals(self, since: datetime) -> list[tuple[str, int, int, float]]:
        """What pools were asked, by model and ten minutes. See reports.arrivals."""
        return await self._ask(lambda s: reports.arrivals(s, since))

    async def request(self, request_id: str) -> list[dict[str, Any]]:
        """The rows of a request: its record and what was taken back of it. Raises NotFound."""
        rows = await self._ask(lambda s: reports.rows_of_request(s, request_id))
        if not rows:
            raise NotFound(f"no request {request_id!r} is on record", code="request_not_found")
        return rows

    async def live(self, dataset: str, after: int) -> bytes:
        """Rows beyond ``after``, as an Arrow IPC stream: what a reader of the files lacks.

        Raises Overloaded while there are too many: they are being published.
        """
        entries = await self._command(
            lambda c: manifest.entries_after(c, Dataset(dataset), after, LIVE_ENTRIES_MAX + 1)
        )
        if len(entries) > LIVE_ENTRIES_MAX:
            raise Overloaded("too much is unpublished, try again soon", retry_after_s=5)
        return await asyncio.to_thread(reports.live_stream, Dataset(dataset), entries, after)

    async def status(self) -> dict[str, Any]:
        """Numbers for people, metrics and tests."""
        return {
            "pid": os.getpid(),
            "path": str(self._config.ledger_dir / Dataset.USAGE),
            "has_room": self._room(),
            "alarms": [asdict(alarm) for alarm in self._watch.alarms],
            "capture_ratio": dict(self._watch.capture),
            **await self._command(self._numbers),
        }

    async def watch(self) -> Watch:
        """Look for what may be losing money; what is new is logged."""
        numbers = await self._command(self._numbers)
        seen = await self._ask(lambda s: alarms.look(s, self._clock.now(), numbers))
        for alarm in set(seen.alarms) - set(self._watch.alarms):
            logger.error("ALARM %s of %s: %s", alarm.name, alarm.about, alarm.detail)
        self._watch = seen
        return seen

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self._command(self._store.expire_packs)
                await self.watch()
            except Exception:  # the next look may do better; the ledger goes on
                logger.exception("looking for alarms failed")

    def _numbers(self, connection: Connection) -> dict[str, Any]:
        now = self._clock.now()
        holds = self._store.open_holds(connection)
        waiting = manifest.first_unsealed_at(connection)
        return {
            "epoch": self._store.mark(LEDGER_PRODUCER).epoch,
            "next_lsn": self._store.state.counters.next_lsn,
            "sealed_until": manifest.sealed_until(connection, Dataset.USAGE),
            "publish_lag_s": 0.0 if waiting is None else (now - waiting).total_seconds(),
            "open_holds": len(holds),
            "held_pico": sum(hold.left_pico for hold in holds),
            "stale_holds": sum(
                h.request.lane is not Lane.LEASE and now - h.request.started_at > STALE_HOLD
                for h in holds
            ),
        }

    # -- files, proofs, settlement ---------------------------------------------------------

    async def publish(self) -> None:
        """Make everything booked so far public."""
        await self._sealer.publish()

    async def compact(self) -> list[str]:
        """Make each closed day one file; returns the names of the new files."""
        await self._sealer.publish()
        return await self._sealer.compact()

    async def keep_house(self) -> None:
        """What the ledger does every minute."""
        await self._command(self._store.expire_packs)
        await self._sealer.keep_house(self._store.state)

    async def checkpoint(self) -> str:
        """A signed note of everything that is public."""
        await self._sealer.publish()
        return await self._sealer.sign()

    async def verify(self) -> dict[str, Any]:
        """Recompute everything; ``finding`` is None or the first thing that is wrong."""
        return await self._auditor.verify()

    async def prove(self, request_id: str, size: int | None = None) -> dict[str, Any]:
        """An inclusion proof of a request's row, by default in the log as it is now.

        Raises NotFound.
        """
        return await self._auditor.prove(request_id, size)

    async def settle(self, period: str, made_by: str, dry_run: bool = False) -> dict[str, Any]:
        """Close a month, if the ledger verifies; closing it again changes nothing.

        Raises InvalidRequest, or MarketFault if something does not add up.
        """
        when.month(period)
        known = await self._command(lambda c: settlement_row(c, period))
        if not dry_run and known is None:
            report = await self._auditor.verify()
            if report["finding"] is not None:
                finding = report["finding"]
                raise MarketFault(
                    f"not settled: the ledger does not verify: {finding['where']}, "
                    f"row {finding['row']}: {finding['reason']}"
                )
        summary = await self._settler.settle(period, made_by, dry_run)
        if not dry_run:
            summary["statements"] = await self._write_statements(period)
        return summary

    async def statement(self, party: Party, name: str, period: str) -> Statement:
        """What a tenant or provider had, used and paid in a month. Raises NotFound."""
        if name not in await self._parties(party):
            raise NotFound(f"{party} {name!r} does not exist", code=f"{party}_not_found")
        return (await self._statements(party, [name], period))[name]

    async def _parties(self, party: Party) -> list[str]:
        if party is Party.TENANT:
            return await self.tenants()
        return [*await self.providers(), rules.MARKET_PROVIDER]

    async def _statements(
        self, party: Party, names: Sequence[str], period: str
    ) -> dict[str, Statement]:
        start, end = when.month(period)
        settled = {row.period: row for row in await self._command(settlement_rows)}.get(period)
        path = self._settler.file(period)
        month = statements.Month(
            period=period,
            start=start,
            end=end,
            issuer=self._config.issuer,
            currency=CURRENCY,
            checkpoint=await self.checkpoint(),
            settlement_id=settled and settled.settlement_id,
            settlement_file=path if settled and path.exists() else None,
        )
        return await self._ask(lambda s: statements.build(s, party, names, month))

    async def statement_as(self, party: Party, name: str, period: str, form: str) -> str:
        """A statement as ``json``, ``csv`` or ``html``. Raises InvalidRequest, NotFound."""
        statement = await self.statement(party, name, period)
        return await asyncio.to_thread(exports.statement_text, statement, form)

    async def focus(self, period: str, version: str, form: str, tenant: str | None) -> bytes:
        """A month in the FOCUS format, as the bytes of a ``parquet`` or ``csv`` file.

        Raises InvalidRequest for a version or form that does not exist.
        """
        start, end = when.month(period)
        settled = await self._command(settlement_rows)
        closed = {row.period for row in settled}
        names = await self.tenants()
        ids = {name: statements.statement_id(Party.TENANT, name, period) for name in names}
        context = FocusContext(
            period_start=start,
            period_end=end,
            issuer=self._config.issuer,
            currency=CURRENCY,
            invoice_ids=ids if period in closed else {},
            settled_until_lsn=max((r.lsn_until for r in settled if r.period < period), default=0),
        )
        return await self._ask(lambda s: exports.focus_file(s, context, version, form, tenant))

    async def _write_statements(self, period: str) -> int:
        """Statements of everybody, as JSON and HTML, beside the settlement."""
        folder = self._settler.file(period).parent
        written = 0
        for party in Party:
            names = await (self.tenants() if party is Party.TENANT else self.providers())
            built = await self._statements(party, names, period)
            for name, statement in built.items():
                for form in ("json", "html"):
                    text = await asyncio.to_thread(exports.statement_text, statement, form)
                    path = folder / f"{party}s" / f"{name}.{form}"
                    await asyncio.to_thread(_write_text, path, text)
                written += 1
        return written

    # -- how it works ----------------------------------------------------------------------

    async def _command(self, command: storage.Command) -> Any:
        if self._closed:
            raise Overloaded("the ledger is shutting down", retry_after_s=5)
        return await self._writer.submit(command)

    async def _ask(self, question: Callable[[Snapshot], Result]) -> Result:
        """Answer from an exact snapshot, again if compaction moves a file meanwhile."""
        async with self._reporting:
            for _ in range(snapshot.TRIES):
                taken = await self._command(
                    lambda c: snapshot.take(c, self._sealer.publisher, self._store.state.cards)
                )
                try:
                    return await asyncio.to_thread(question, taken)
                except (OSError, snapshot.DuckDBError) as error:
                    if not snapshot.gone(error):
                        raise
        raise Overloaded("the ledger's files keep moving, try again", retry_after_s=5)

    def _room(self) -> bool:
        """Whether the disk has more than the reserve; asked at most once a second."""
        now_s = time.monotonic()
        if now_s - self._room_asked_s > ROOM_CHECK_S:
            self._room_asked_s = now_s
            self._has_room = self._sealer.publisher.free_bytes() > RESERVE_BYTES
        return self._has_room


def _full_disk() -> Overloaded:
    return Overloaded(
        "the ledger's disk is full: nothing new is admitted until there is room",
        code="storage_full",
        retry_after_s=10,
    )


def _write_text(path: Any, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(text, encoding="utf-8", newline="")
    fresh.replace(path)
