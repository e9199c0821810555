"""What the ledger does inside a transaction: usage batches, holds, transfers, producers.

Every function takes the connection of the running group; ``Counters`` are the numbers the single
writer keeps in memory. Rules are in market.accounts; here they meet rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from sqlalchemy import Connection, func, select, update

from market import accounts as rules
from market import pricing
from market.accounts import Account, Books, Hold, HoldResult, HoldState, Transfer, TransferKind
from market.errors import Conflict, InvalidRequest
from market.ledger import tables
from market.ledger.registry import rate_cards_by_id
from market.ledger.rows import account_from, hold_from, hold_row, load_books
from market.ledger.schema import decode_batch, encode_batch, serialize
from market.ports import Clock
from market.storage import upsert
from market.types import (
    CURRENCY,
    FinishReason,
    HoldRequest,
    Lane,
    RateCard,
    TokenCounts,
    UsageQuality,
    UsageRecord,
)

LEDGER_PRODUCER = "ledger"


@dataclass
class Counters:
    """Next numbers to give out and the last booking time, as of the running transaction."""

    next_lsn: int
    next_tsn: int
    booked_at: datetime
    epoch: int = 0
    seq: int = 0


class LedgerStore:
    """The ledger's commands. Not safe for concurrent use: there is one writer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.counters = Counters(1, 1, datetime(1970, 1, 1, tzinfo=UTC))

    def load(self, connection: Connection) -> None:
        """Read the counters, make the market's own accounts, take a new epoch."""
        lsn = connection.execute(select(func.max(tables.parts.c.hi)).where(_USAGE_PARTS)).scalar()
        journalled = connection.execute(select(func.max(tables.journal.c.lsn_hi))).scalar()
        tsn = connection.execute(select(func.max(tables.transfers.c.tsn))).scalar()
        booked = [
            connection.execute(select(func.max(table.c.booked_at))).scalar()
            for table in (tables.journal, tables.transfers)
        ]
        self.counters.next_lsn = max(lsn or 0, journalled or 0) + 1
        self.counters.next_tsn = (tsn or 0) + 1
        self.counters.booked_at = max([self.counters.booked_at, *filter(None, booked)])
        for account in rules.chart_of_accounts(CURRENCY):
            self.open_account(connection, account)
        self.counters.epoch = _next_epoch(connection, LEDGER_PRODUCER)
        self.counters.seq = 0

    # -- accounts and transfers ------------------------------------------------------------

    def open_account(self, connection: Connection, account: Account) -> None:
        """Make an account; nothing happens if it is there."""
        books = load_books(connection, account_ids=[account.account_id])
        books.open_account(account)
        self._save_books(connection, books)

    def transfer(self, connection: Connection, transfer: Transfer) -> None:
        """Move money once per ``transfer_id``.

        Raises Conflict if the id was used for something else, InvalidRequest if it cannot be.
        """
        books = load_books(
            connection,
            account_ids=[transfer.debit_account, transfer.credit_account],
            transfer_ids=[transfer.transfer_id],
        )
        status = books.transfer(transfer)
        if status is rules.TransferStatus.EXISTS_DIFFERENT:
            raise Conflict(f"transfer id {transfer.transfer_id} was used for another transfer")
        if status not in (rules.TransferStatus.CREATED, rules.TransferStatus.EXISTS):
            raise InvalidRequest(f"transfer {transfer.transfer_id} refused: {status}")
        self._save_books(connection, books)

    def account(self, connection: Connection, account_id: str) -> Account | None:
        """One account as it is now."""
        return load_books(connection, account_ids=[account_id]).accounts.get(account_id)

    def accounts(self, connection: Connection) -> list[Account]:
        """All accounts, by id."""
        rows = connection.execute(select(tables.accounts).order_by(tables.accounts.c.account_id))
        return [account_from(row) for row in rows]

    # -- holds -----------------------------------------------------------------------------

    def open_hold(self, connection: Connection, request: HoldRequest) -> HoldResult:
        """Set money aside for a request of a producer that is not fenced."""
        epoch, _ = _producer(connection, request.producer)
        if request.epoch != epoch:
            raise _fenced(request.producer, request.epoch, epoch)
        books = load_books(
            connection,
            account_ids=[rules.tenant_account(request.tenant_id)],
            hold_ids=[request.hold_id],
        )
        result = books.open_hold(request)
        self._save_books(connection, books)
        return result

    def open_holds(self, connection: Connection) -> list[Hold]:
        """Every hold that has not ended."""
        pending = tables.holds.c.state == HoldState.PENDING
        return [hold_from(row) for row in connection.execute(select(tables.holds).where(pending))]

    def count_open_holds(self, connection: Connection) -> int:
        """How many holds have not ended."""
        pending = tables.holds.c.state == HoldState.PENDING
        query = select(func.count()).select_from(tables.holds).where(pending)
        return int(connection.execute(query).scalar_one())

    # -- producers and usage ---------------------------------------------------------------

    def register_producer(self, connection: Connection, producer: str) -> int:
        """A new epoch for a producer; whatever an older one left open is resolved.

        The old epoch is fenced first, so an unfinished response can only end here: charge 0.
        """
        if producer == LEDGER_PRODUCER:
            raise InvalidRequest(f"producer name {producer} is the ledger's own")
        epoch = _next_epoch(connection, producer)
        orphans = connection.execute(
            select(tables.holds).where(
                tables.holds.c.producer == producer, tables.holds.c.state == HoldState.PENDING
            )
        ).all()
        self._recover(connection, [hold_from(row) for row in orphans])
        return epoch

    def append(
        self, connection: Connection, producer: str, epoch: int, first_seq: int, payload: bytes
    ) -> int:
        """Book a batch exactly once; returns the next sequence number expected.

        A batch seen before is acknowledged, an overlap trimmed. Raises Conflict for a gap or a
        fenced epoch, InvalidRequest for records whose charge does not follow from their price.
        """
        known_epoch, next_seq = _producer(connection, producer)
        if epoch != known_epoch:
            raise _fenced(producer, epoch, known_epoch)
        batch = decode_batch(payload)
        if first_seq > next_seq:
            raise Conflict(
                f"{producer} sent records from {first_seq}, expected {next_seq}",
                code="sequence_gap",
            )
        if first_seq + batch.num_rows <= next_seq:
            return next_seq
        fresh = batch.slice(next_seq - first_seq)
        _check_identity(fresh, producer, epoch, next_seq)
        self._book(connection, fresh)
        next_seq = first_seq + int(batch.num_rows)
        connection.execute(
            update(tables.producers)
            .where(tables.producers.c.producer == producer)
            .values(next_seq=next_seq)
        )
        return next_seq

    def _book(self, connection: Connection, batch: pa.RecordBatch) -> None:
        rows = batch.select(_BOOKED_COLUMNS).to_pylist()
        check_charges(rows, rate_cards_by_id(connection, {row["price_id"] for row in rows}))
        booked_at = self._book_time()
        lsn_lo = self.counters.next_lsn
        lsn_hi = lsn_lo + len(rows) - 1
        owed: dict[tuple[str, str, str], int] = defaultdict(int)
        books = load_books(
            connection,
            account_ids={
                account
                for row in rows
                for account in (
                    rules.tenant_account(row["tenant_id"]),
                    rules.provider_account(row["provider_id"]),
                )
            },
            hold_ids=[row["request_id"] for row in rows],
        )
        for row in rows:
            charge_pico = int(row["charge"].scaleb(12))
            if row["usage_quality"] == UsageQuality.RECOVERED:
                books.expire_hold(row["request_id"])
            elif charge_pico == 0:
                books.void_hold(row["request_id"])
            else:
                books.post_hold(row["request_id"], charge_pico)
            owed[row["tenant_id"], row["provider_id"], row["currency"]] += charge_pico
        for (tenant_id, provider_id, currency), amount_pico in owed.items():
            if amount_pico == 0:
                continue
            status = books.transfer(
                Transfer(
                    transfer_id=f"charge-{lsn_lo}-{lsn_hi}-{tenant_id}-{provider_id}",
                    kind=TransferKind.CHARGE,
                    debit_account=rules.tenant_account(tenant_id),
                    credit_account=rules.provider_account(provider_id),
                    amount_pico=amount_pico,
                    currency=currency,
                    reason="usage",
                    made_by=LEDGER_PRODUCER,
                    lsn_lo=lsn_lo,
                    lsn_hi=lsn_hi,
                )
            )
            assert status is rules.TransferStatus.CREATED, status
        # The charge must fall on the date of the rows it pays for, also around midnight.
        self._save_books(connection, books, booked_at)
        connection.execute(
            tables.journal.insert().values(
                lsn_lo=lsn_lo, lsn_hi=lsn_hi, booked_at=booked_at, batch=serialize(batch)
            )
        )
        self.counters.next_lsn = lsn_hi + 1

    def _recover(self, connection: Connection, orphans: Sequence[Hold]) -> None:
        if not orphans:
            return
        now = self._book_time()
        records = []
        for offset, hold in enumerate(orphans):
            records.append(
                UsageRecord.for_hold(
                    hold.request,
                    counts=TokenCounts(0, 0, 0),
                    finished_at=now,
                    charge_pico=0,
                    finish_reason=FinishReason.MARKET_FAULT,
                    usage_quality=UsageQuality.RECOVERED,
                ).emitted_by(LEDGER_PRODUCER, self.counters.epoch, self.counters.seq + offset)
            )
        self._book(connection, decode_batch(encode_batch(records)))
        self.counters.seq += len(records)

    def _book_time(self) -> datetime:
        """The ledger's clock, which never goes back: its date is the partition."""
        self.counters.booked_at = max(self.counters.booked_at, self._clock.now())
        return self.counters.booked_at

    def _save_books(
        self, connection: Connection, books: Books, booked_at: datetime | None = None
    ) -> None:
        if books.changed_accounts:
            changed = [asdict(books.accounts[name]) for name in sorted(books.changed_accounts)]
            upsert(connection, tables.accounts, changed)
        if books.changed_holds:
            upsert(
                connection,
                tables.holds,
                [hold_row(books.holds[name]) for name in sorted(books.changed_holds)],
            )
        for transfer in books.new_transfers:
            row = asdict(transfer) | {
                "tsn": self.counters.next_tsn,
                "booked_at": booked_at or self._book_time(),
            }
            connection.execute(tables.transfers.insert().values(row))
            self.counters.next_tsn += 1


_USAGE_PARTS = tables.parts.c.dataset == "usage"
_BOOKED_COLUMNS = [
    "request_id",
    "tenant_id",
    "provider_id",
    "lane",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "finish_reason",
    "usage_quality",
    "price_id",
    "charge",
    "currency",
]


def check_charges(rows: Iterable[dict[str, Any]], cards: dict[str, RateCard]) -> None:
    """Re-rate every row. Raises InvalidRequest for an unknown price or another charge."""
    for row in rows:
        card = cards.get(row["price_id"])
        if card is None or card.currency != row["currency"]:
            raise InvalidRequest(f"{row['request_id']}: unknown price {row['price_id']}")
        reason = row["finish_reason"]
        counts = TokenCounts(
            row["input_tokens"],
            row["cached_input_tokens"],
            row["output_tokens"],
        )
        expected = pricing.charge(
            counts, card, FinishReason(reason) if reason else None, Lane(row["lane"])
        )
        if pricing.to_decimal(expected) != row["charge"]:
            raise InvalidRequest(
                f"{row['request_id']}: charge {row['charge']} does not follow from {card.price_id}"
            )


def _producer(connection: Connection, producer: str) -> tuple[int, int]:
    """(epoch, next_seq) of a producer; (0, 0) if it never registered."""
    query = select(tables.producers.c.epoch, tables.producers.c.next_seq)
    row = connection.execute(query.where(tables.producers.c.producer == producer)).one_or_none()
    return (0, 0) if row is None else (row.epoch, row.next_seq)


def _next_epoch(connection: Connection, producer: str) -> int:
    epoch = _producer(connection, producer)[0] + 1
    upsert(connection, tables.producers, [{"producer": producer, "epoch": epoch, "next_seq": 0}])
    return epoch


def _fenced(producer: str, epoch: int, known: int) -> Conflict:
    return Conflict(
        f"{producer} of epoch {epoch} is fenced: the current epoch is {known}",
        code="producer_fenced",
    )


def _check_identity(batch: pa.RecordBatch, producer: str, epoch: int, first_seq: int) -> None:
    expected = list(range(first_seq, first_seq + batch.num_rows))
    producers, epochs = (set(batch.column(c).to_pylist()) for c in ("producer", "epoch"))
    if producers != {producer} or epochs != {epoch} or batch.column("seq").to_pylist() != expected:
        raise InvalidRequest(f"batch of {producer} carries other identities than its envelope")
