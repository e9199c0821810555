"""What the single writer keeps in memory of its tables, and writes back once per transaction.

Commands read and check against it and change it only as their last step, so a refused command
leaves nothing behind; after a failed transaction all of it is dropped and read again.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, bindparam, select, update

from market import accounts as rules
from market.accounts import Account, Books, Hold, HoldState
from market.budgets import Spend
from market.ledger import registry, tables
from market.ledger.rows import account_from, account_row, hold_from, hold_row, rows_by_key
from market.pricing import NO_PRICE
from market.storage import upsert
from market.types import CURRENCY, Budget, Pack, Period, RateCard

ACCOUNTS_KEPT = 100_000
_CHANGE_HOLD = (
    update(tables.holds)
    .where(tables.holds.c.hold_id == bindparam("id"))
    .values(
        state=bindparam("now_state"),
        amount_pico=bindparam("now_amount"),
        posted_pico=bindparam("now_posted"),
        version=bindparam("now_version"),
        changed_at=bindparam("now"),
    )
)


@dataclass
class Counters:
    """Next numbers to give out, the last booking time, and the head of the hash chain."""

    next_entry: int = 1
    next_lsn: int = 1
    next_tsn: int = 1
    booked_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    head: bytes = bytes(32)
    pruned_entry: int = 0
    pruned_head: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class ProducerMark:
    """How far a producer's records are booked."""

    epoch: int = 0
    next_seq: int = 0


@dataclass
class State:
    """Caches over the tables; ``dirty_*`` are the keys to write back."""

    counters: Counters = field(default_factory=Counters)
    accounts: dict[str, Account] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    producers: dict[str, ProducerMark] = field(default_factory=dict)
    leases: dict[tuple[str, str], int] = field(default_factory=dict)
    cards: dict[str, RateCard] = field(default_factory=dict)
    budgets: dict[str, tuple[Budget, ...]] = field(default_factory=dict)
    spends: dict[tuple[str, Period], Spend] = field(default_factory=dict)
    packs: dict[str, Pack] = field(default_factory=dict)
    visited_holds: set[str] = field(default_factory=set)
    dirty_accounts: set[str] = field(default_factory=set)
    new_holds: set[str] = field(default_factory=set)
    dirty_holds: set[str] = field(default_factory=set)
    dirty_producers: set[str] = field(default_factory=set)
    dirty_leases: set[tuple[str, str]] = field(default_factory=set)
    dirty_spends: set[tuple[str, Period]] = field(default_factory=set)
    counted: bool = False

    def load(self, connection: Connection) -> None:
        """Read all but accounts, keys and holds that ended: those come when they are needed."""
        row = connection.execute(select(tables.counters)).one_or_none()
        if row is not None:
            values = dict(row._mapping)
            del values["id"]
            self.counters = Counters(**values)
        for row in connection.execute(select(tables.producers)):
            self.producers[row.producer] = ProducerMark(row.epoch, row.next_seq)
        for row in connection.execute(select(tables.lease_totals)):
            self.leases[row.lease_id, row.price_id] = row.gpu_us
        self.cards = registry.all_rate_cards(connection) | {NO_PRICE.price_id: NO_PRICE}
        self.budgets = registry.all_budgets(connection)
        self.spends = registry.all_spends(connection)
        self.packs = registry.open_packs(connection)
        pending = select(tables.holds).where(tables.holds.c.state == HoldState.PENDING)
        self.holds = {row.hold_id: hold_from(row) for row in connection.execute(pending)}
        self.need_accounts(connection, [a.account_id for a in rules.chart_of_accounts(CURRENCY)])

    def need_accounts(self, connection: Connection, account_ids: Iterable[str]) -> None:
        """Have these accounts in memory, those that exist."""
        missing = [name for name in set(account_ids) if name not in self.accounts]
        for row in rows_by_key(connection, tables.accounts, "account_id", missing):
            account = account_from(row)
            self.accounts[account.account_id] = account

    def need_hold(self, connection: Connection, hold_id: str) -> None:
        """Have this hold in memory, also if it has ended."""
        if hold_id not in self.holds:
            for row in rows_by_key(connection, tables.holds, "hold_id", [hold_id]):
                self.holds[hold_id] = hold_from(row)
                self.visited_holds.add(hold_id)

    def books(self) -> Books:
        """Books over everything in memory; ``keep`` takes their changes."""
        return Books(self.accounts, self.holds)

    def keep(self, books: Books) -> None:
        """Take over what a step changed."""
        for name in books.changed_holds:
            unknown = name not in self.holds or name in self.new_holds
            (self.new_holds if unknown else self.dirty_holds).add(name)
        self.accounts.update(books.changed_accounts)
        self.holds.update(books.changed_holds)
        self.dirty_accounts.update(books.changed_accounts)

    def set_producer(self, producer: str, mark: ProducerMark) -> None:
        """Advance a producer."""
        self.producers[producer] = mark
        self.dirty_producers.add(producer)

    def set_lease(self, key: tuple[str, str], gpu_us: int) -> None:
        """Advance a lease's GPU time at one price."""
        self.leases[key] = gpu_us
        self.dirty_leases.add(key)

    def set_spend(self, key: tuple[str, Period], spend: Spend) -> None:
        """Advance what was spent of a budget."""
        self.spends[key] = spend
        self.dirty_spends.add(key)

    def flush(self, connection: Connection, now: datetime) -> None:
        """Write back what changed; drop holds that have ended and accounts beyond the limit."""
        if self.dirty_accounts:
            rows = [account_row(self.accounts[name]) for name in sorted(self.dirty_accounts)]
            upsert(connection, tables.accounts, rows)
        if self.new_holds:
            opened = [self.holds[name] for name in sorted(self.new_holds)]
            rows = [hold_row(hold) | {"changed_at": now} for hold in opened]
            connection.execute(tables.holds.insert(), rows)
        if self.dirty_holds:
            changed = [self.holds[name] for name in sorted(self.dirty_holds)]
            rows = [
                {
                    "id": hold.request.hold_id,
                    "now_state": hold.state,
                    "now_amount": hold.amount_pico,
                    "now_posted": hold.posted_pico,
                    "now_version": hold.version,
                    "now": now,
                }
                for hold in changed
            ]
            connection.execute(_CHANGE_HOLD, rows)
        if self.dirty_producers:
            rows = [
                {"producer": name, **asdict(self.producers[name])}
                for name in sorted(self.dirty_producers)
            ]
            upsert(connection, tables.producers, rows)
        if self.dirty_leases:
            rows = [
                {"lease_id": key[0], "price_id": key[1], "gpu_us": self.leases[key]}
                for key in sorted(self.dirty_leases)
            ]
            upsert(connection, tables.lease_totals, rows)
        if self.dirty_spends:
            rows = [
                {"subject": key[0], "period": key[1], **asdict(self.spends[key])}
                for key in sorted(self.dirty_spends)
            ]
            upsert(connection, tables.spends, rows)
        if self.counted:
            upsert(connection, tables.counters, [{"id": 1, **asdict(self.counters)}])
        self._settle_down()

    def _settle_down(self) -> None:
        for name in self.dirty_holds | self.new_holds | self.visited_holds:
            if self.holds[name].state is not HoldState.PENDING:
                del self.holds[name]
        if len(self.accounts) > ACCOUNTS_KEPT:
            self.accounts.clear()
        for names in (self.visited_holds, self.dirty_accounts, self.new_holds, self.dirty_holds):
            names.clear()
        self.dirty_producers.clear()
        self.dirty_leases.clear()
        self.dirty_spends.clear()
        self.counted = False
