"""What the ledger does inside a transaction: usage batches, holds, transfers, producers.

Every command checks everything first, writes second and changes memory last (see state). Rules
are in market.accounts, market.pricing and rating; here they meet rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, select

from market import accounts as rules
from market import pricing
from market.accounts import Account, Books, Hold, HoldResult, HoldState, Transfer, TransferKind
from market.errors import Conflict, InvalidRequest
from market.ledger import journal, registry, tables
from market.ledger.rating import money_column, require_tokens
from market.ledger.rows import account_from
from market.ledger.schema import decode, encode, encode_batch
from market.ledger.state import ProducerMark, State
from market.ports import Clock
from market.types import (
    CURRENCY,
    FinishReason,
    HoldRequest,
    RateCard,
    RecordKind,
    TokenCounts,
    UsageQuality,
    UsageRecord,
)

LEDGER_PRODUCER = "ledger"
BATCH_MAX = 65_536


class LedgerStore:
    """The ledger's commands. Not safe for concurrent use: there is one writer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loaded = False
        self.state = State()

    # -- storage.Unit: what surrounds a group of commands --------------------------------------

    def begin(self, connection: Connection) -> None:
        """Have the state in memory."""
        if not self._loaded:
            self.state.load(connection)
            self._loaded = True

    def end(self, connection: Connection) -> None:
        """Write back what the group changed."""
        self.state.flush(connection, self._clock.now())

    def forget(self) -> None:
        """The transaction failed: nothing in memory can be trusted."""
        self.state = State()
        self._loaded = False

    def open(self, connection: Connection) -> None:
        """Make the market's own accounts and take a new epoch for the ledger's own records."""
        for account in rules.chart_of_accounts(CURRENCY):
            self.open_accounts(connection, [account])
        epoch = self.mark(LEDGER_PRODUCER).epoch + 1
        self.state.set_producer(LEDGER_PRODUCER, ProducerMark(epoch, 0))

    # -- accounts and transfers ------------------------------------------------------------

    def open_accounts(self, connection: Connection, accounts: Iterable[Account]) -> None:
        """Make accounts; those that are there stay as they are."""
        for account in accounts:
            self.state.need_accounts(connection, [account.account_id])
            books = self.state.books()
            books.open_account(account)
            self.state.keep(books)

    def transfer(self, connection: Connection, transfers: Sequence[Transfer]) -> None:
        """Move money, all or nothing, each once per ``transfer_id``.

        Raises Conflict if an id was used for something else, InvalidRequest if it cannot be.
        """
        books = self.state.books()
        for transfer in transfers:
            self._add_transfer(connection, books, transfer)
        self._enter(connection, self._book_time(), None, books.new_transfers)
        self.state.keep(books)

    def _add_transfer(self, connection: Connection, books: Books, transfer: Transfer) -> None:
        table = tables.transfers
        query = select(table).where(table.c.transfer_id == transfer.transfer_id)
        row = connection.execute(query).one_or_none()
        if row is not None:
            known = (row.kind, row.debit_account, row.credit_account, row.amount_pico, row.currency)
            if known != transfer.content:
                raise Conflict(f"transfer id {transfer.transfer_id} was used for another transfer")
            return
        self.state.need_accounts(connection, [transfer.debit_account, transfer.credit_account])
        status = books.transfer(transfer)
        if status is rules.TransferStatus.EXISTS_DIFFERENT:
            raise Conflict(f"transfer id {transfer.transfer_id} was used for another transfer")
        if status not in (rules.TransferStatus.CREATED, rules.TransferStatus.EXISTS):
            raise InvalidRequest(f"transfer {transfer.transfer_id} refused: {status}")

    def account(self, connection: Connection, account_id: str) -> Account | None:
        """One account as it is now."""
        self.state.need_accounts(connection, [account_id])
        return self.state.accounts.get(account_id)

    def accounts(self, connection: Connection) -> list[Account]:
        """All accounts, by id."""
        stored = connection.execute(select(tables.accounts))
        accounts = {row.account_id: account_from(row) for row in stored}
        accounts |= {name: self.state.accounts[name] for name in self.state.dirty_accounts}
        return [accounts[name] for name in sorted(accounts)]

    # -- holds -----------------------------------------------------------------------------

    def open_hold(self, connection: Connection, request: HoldRequest) -> HoldResult:
        """Set money aside for a producer that is not fenced."""
        self._require_epoch(request.producer, request.epoch)
        self.state.need_accounts(connection, [rules.tenant_account(request.tenant_id)])
        self.state.need_hold(connection, request.hold_id)
        books = self.state.books()
        result = books.open_hold(request)
        self.state.keep(books)
        return result

    def end_hold(self, connection: Connection, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a shared hold. Doing it again changes nothing.

        Raises Conflict if the producer is fenced, InvalidRequest if the hold is not its own.
        """
        self._require_epoch(producer, epoch)
        self.state.need_hold(connection, hold_id)
        hold = self.state.holds.get(hold_id)
        if hold is None or hold.request.producer != producer or not hold.request.shared:
            raise InvalidRequest(f"{producer} has no shared hold {hold_id}")
        if hold.state is not HoldState.PENDING:
            return
        books = self.state.books()
        self.state.need_accounts(connection, [hold.account_id])
        self._release(books, [books.void_hold(hold_id)])
        self._enter(connection, self._book_time(), None, books.new_transfers)
        self.state.keep(books)

    def open_holds(self, connection: Connection) -> list[Hold]:
        """Every hold that has not ended."""
        return [h for h in self.state.holds.values() if h.state is HoldState.PENDING]

    def count_open_holds(self, connection: Connection) -> int:
        """How many holds have not ended."""
        return len(self.open_holds(connection))

    # -- producers and usage ---------------------------------------------------------------

    def register_producer(self, connection: Connection, producer: str) -> int:
        """A new epoch for a producer; whatever an older one left open is resolved.

        The old epoch is fenced with it, so an unfinished response can only end here: charge 0.
        What is left of shared holds returns.
        """
        if producer == LEDGER_PRODUCER:
            raise InvalidRequest(f"producer name {producer} is the ledger's own")
        orphans = [h for h in self.open_holds(connection) if h.request.producer == producer]
        self._expire_shared(connection, [h for h in orphans if h.request.shared])
        self._recover(connection, [h for h in orphans if not h.request.shared])
        epoch = self.mark(producer).epoch + 1
        self.state.set_producer(producer, ProducerMark(epoch, 0))
        return epoch

    def append(
        self, connection: Connection, producer: str, epoch: int, first_seq: int, payload: bytes
    ) -> int:
        """Book a batch exactly once; returns the next sequence number expected.

        A batch seen before is acknowledged, an overlap trimmed. Raises Conflict for a gap or a
        fenced epoch, InvalidRequest for records whose charge does not follow from their price.
        """
        self._require_epoch(producer, epoch)
        next_seq = self.mark(producer).next_seq
        if first_seq < 0 or first_seq > next_seq:
            raise Conflict(
                f"{producer} sent records from {first_seq}, expected {next_seq}",
                code="sequence_gap",
            )
        batch = decode(payload)
        if batch.num_rows > BATCH_MAX:
            raise InvalidRequest(f"a batch of {batch.num_rows} records; at most {BATCH_MAX}")
        end = first_seq + int(batch.num_rows)
        if end <= next_seq:
            return next_seq
        if first_seq < next_seq:
            batch = batch.slice(next_seq - first_seq)
            payload = encode(batch)
        strangers = set(batch["kind"].unique().to_pylist()) - {RecordKind.TOKENS, RecordKind.GPU}
        if strangers:
            raise InvalidRequest(f"{producer} cannot send records of kind {strangers.pop()}")
        self.book(connection, journal.Arrived(producer, epoch, next_seq, batch, payload))
        self.state.set_producer(producer, ProducerMark(epoch, end))
        return end

    def book(self, connection: Connection, arrived: journal.Arrived) -> tuple[int, int]:
        """Check and book rows with the money they move; returns (first, last) lsn.

        Corrections, which only the ledger makes, come alone and touch no holds.
        """
        batch = arrived.batch
        require_tokens(batch, self.state.cards)
        lease_totals = self._check_gpu_time(batch)
        sums = _charges(batch)
        self.state.need_accounts(
            connection,
            {rules.tenant_account(tenant_id) for tenant_id, *_ in sums}
            | {rules.provider_account(provider_id) for _, provider_id, *_ in sums},
        )
        books = self.state.books()
        if batch["kind"][0].as_py() not in _CORRECTIONS:
            self._use_holds(connection, books, arrived, sums)
        lsn_lo = self.state.counters.next_lsn
        lsn_hi = lsn_lo + int(batch.num_rows) - 1
        owed: dict[tuple[str, str, str], int] = defaultdict(int)
        for tenant_id, provider_id, currency, _, charge_pico in sums:
            owed[tenant_id, provider_id, currency] += charge_pico
        for (tenant_id, provider_id, currency), amount_pico in owed.items():
            if amount_pico:
                parties = (tenant_id, provider_id, currency)
                transfer = _charge(parties, amount_pico, (lsn_lo, lsn_hi))
                status = books.transfer(transfer)
                if status is not rules.TransferStatus.CREATED:
                    raise InvalidRequest(f"{transfer.transfer_id} refused: {status}")
        # The charge must fall on the date of the rows it pays for, also around midnight.
        self._enter(connection, self._book_time(), arrived, books.new_transfers)
        self.state.keep(books)
        for key, gpu_us in lease_totals.items():
            self.state.set_lease(key, gpu_us)
        return lsn_lo, lsn_hi

    def _use_holds(
        self,
        connection: Connection,
        books: Books,
        arrived: journal.Arrived,
        sums: Sequence[tuple[str, str, str, str | None, int]],
    ) -> None:
        """Draw on shared holds, and end those that belong to a single request."""
        ended: list[Hold] = []
        for tenant_id, _, _, slice_id, charge_pico in sums:
            if slice_id is not None:
                self._require_own_hold(connection, slice_id, tenant_id, arrived.producer, True)
                books.draw_hold(slice_id, charge_pico)
        if arrived.batch["slice_id"].null_count:
            for row in _own_hold_rows(arrived.batch):
                hold_id, charge_pico = row["request_id"], pricing.to_pico(row["charge"])
                self._require_own_hold(
                    connection, hold_id, row["tenant_id"], arrived.producer, False
                )
                if row["usage_quality"] == UsageQuality.RECOVERED:
                    ended.append(books.expire_hold(hold_id))
                elif charge_pico == 0:
                    ended.append(books.void_hold(hold_id))
                else:
                    ended.append(books.post_hold(hold_id, charge_pico))
        self._release(books, ended)

    def _require_own_hold(
        self, connection: Connection, hold_id: str, tenant_id: str, producer: str, shared: bool
    ) -> None:
        self.state.need_hold(connection, hold_id)
        hold = self.state.holds.get(hold_id)
        if hold is None:
            raise InvalidRequest(f"hold {hold_id} is unknown")
        owner = (hold.request.tenant_id, hold.request.shared)
        senders = (hold.request.producer, LEDGER_PRODUCER)
        if owner != (tenant_id, shared) or producer not in senders:
            raise InvalidRequest(f"hold {hold_id} is not for records of {tenant_id} by {producer}")

    def _release(self, books: Books, ended: Sequence[Hold]) -> None:
        """Put on record what returned to each tenant from holds that ended."""
        returned: dict[tuple[str, str], int] = defaultdict(int)
        for hold in ended:
            if hold.left_pico:
                returned[hold.account_id, hold.request.currency] += hold.left_pico
        for (account_id, currency), amount_pico in returned.items():
            books.release(
                Transfer(
                    transfer_id=f"release-{self.state.counters.next_entry}-{account_id}",
                    kind=TransferKind.RELEASE,
                    debit_account=account_id,
                    credit_account=account_id,
                    amount_pico=amount_pico,
                    currency=currency,
                    reason="end of holds",
                    made_by=LEDGER_PRODUCER,
                )
            )

    def _check_gpu_time(self, batch: pa.RecordBatch) -> dict[tuple[str, str], int]:
        """Re-rate lease segments; returns the new totals per lease and price."""
        totals: dict[tuple[str, str], int] = {}
        gpu_rows = pc.equal(batch["kind"], RecordKind.GPU)
        if not pc.any(gpu_rows, min_count=0).as_py():
            return totals
        for row in batch.filter(gpu_rows).select(_GPU_COLUMNS).to_pylist():
            key = (row["lease_id"], row["price_id"])
            card = self.state.cards.get(row["price_id"])
            # What charges nothing needs no hold: so stands for a segment that was refused.
            unpaid = row["charge"] and row["slice_id"] is None
            if None in (row["lease_id"], row["gpu_us"]) or unpaid or card is None:
                raise InvalidRequest(
                    f"GPU time of lease {row['lease_id']} needs lease_id, slice_id, gpu_us and a "
                    f"known price, has {row['price_id']}"
                )
            before = totals.get(key, self.state.leases.get(key, 0))
            expected = pricing.gpu_charge(before, row["gpu_us"], card.gpu_hour_pico)
            if row["charge"] != pricing.to_decimal(expected):
                raise InvalidRequest(
                    f"lease {key[0]}: charge {row['charge']} after {before} GPU-us does not "
                    f"follow from {card.price_id}"
                )
            totals[key] = before + row["gpu_us"]
        return totals

    def _expire_shared(self, connection: Connection, orphans: Sequence[Hold]) -> None:
        if not orphans:
            return
        self.state.need_accounts(connection, [hold.account_id for hold in orphans])
        books = self.state.books()
        self._release(books, [books.expire_hold(h.request.hold_id) for h in orphans])
        self._enter(connection, self._book_time(), None, books.new_transfers)
        self.state.keep(books)

    def _recover(self, connection: Connection, orphans: Sequence[Hold]) -> None:
        if not orphans:
            return
        now = self._book_time()
        self.book_own(
            connection,
            [
                UsageRecord.for_hold(
                    hold.request,
                    counts=TokenCounts(0, 0, 0),
                    finished_at=now,
                    charge_pico=0,
                    finish_reason=FinishReason.MARKET_FAULT,
                    usage_quality=UsageQuality.RECOVERED,
                )
                for hold in orphans
            ],
        )

    def book_own(self, connection: Connection, records: Sequence[UsageRecord]) -> tuple[int, int]:
        """Book records that the ledger itself makes; returns (first, last) lsn."""
        mark = self.mark(LEDGER_PRODUCER)
        payload = encode_batch(records)
        batch = decode(payload)
        arrived = journal.Arrived(LEDGER_PRODUCER, mark.epoch, mark.next_seq, batch, payload)
        booked = self.book(connection, arrived)
        advanced = ProducerMark(mark.epoch, mark.next_seq + len(records))
        self.state.set_producer(LEDGER_PRODUCER, advanced)
        return booked

    def add_rate_card(self, connection: Connection, card: RateCard) -> None:
        """Add a price; the same card again changes nothing."""
        if card.price_id not in self.state.cards:
            registry.add_rate_card(connection, card)
            self.state.cards[card.price_id] = card

    # -- helpers ---------------------------------------------------------------------------

    def _enter(
        self,
        connection: Connection,
        booked_at: datetime,
        arrived: journal.Arrived | None,
        transfers: Sequence[Transfer],
    ) -> None:
        if arrived is not None or transfers:
            journal.enter(connection, self.state.counters, booked_at, arrived, transfers)
            self.state.counted = True

    def _book_time(self) -> datetime:
        """The ledger's clock, which never goes back: its date is the partition."""
        counters = self.state.counters
        counters.booked_at = max(counters.booked_at, self._clock.now())
        return counters.booked_at

    def mark(self, producer: str) -> ProducerMark:
        """How far a producer is booked."""
        return self.state.producers.get(producer, ProducerMark())

    def _require_epoch(self, producer: str, epoch: int) -> None:
        known = self.mark(producer).epoch
        if epoch != known:
            raise Conflict(
                f"{producer} of epoch {epoch} is fenced: the current epoch is {known}",
                code="producer_fenced",
            )


_CORRECTIONS = (RecordKind.REVERSAL, RecordKind.ADJUSTMENT)
_CHARGED = ("tenant_id", "provider_id", "currency", "slice_id")
_GPU_COLUMNS = ["lease_id", "slice_id", "price_id", "gpu_us", "charge"]
_OWN_COLUMNS = ["request_id", "tenant_id", "charge", "usage_quality"]


def _charges(batch: pa.RecordBatch) -> list[tuple[str, str, str, str | None, int]]:
    """(tenant, provider, currency, shared hold, charge in pico units) summed over the batch."""
    charges = money_column(batch["charge"])
    keys = [batch[name].dictionary_encode("encode") for name in _CHARGED]
    codes = np.zeros(len(charges), np.int64)
    for key in keys:
        codes = codes * len(key.dictionary) + key.indices.to_numpy()
    _, firsts, places = np.unique(codes, return_index=True, return_inverse=True)
    if charges.dtype == object:
        sums = [int(charges[places == group].sum()) for group in range(len(firsts))]
    else:
        # Halves of 32 bits: their sums are exact in floats, whole charges would not be.
        low = np.bincount(places, (charges & 0xFFFFFFFF).astype(np.float64))
        high = np.bincount(places, (charges >> 32).astype(np.float64))
        sums = [(int(upper) << 32) + int(lower) for upper, lower in zip(high, low, strict=True)]
    chosen = []
    for key in keys:
        names = key.dictionary.to_pylist()
        chosen.append([names[code] for code in key.indices.to_numpy()[firsts]])
    return list(zip(*chosen, sums, strict=True))


def _own_hold_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows that end the hold of their own request."""
    own = pc.and_(pc.is_null(batch["slice_id"]), pc.equal(batch["kind"], RecordKind.TOKENS))
    own = pc.and_(own, pc.is_valid(batch["request_id"]))
    rows: list[dict[str, Any]] = batch.filter(own).select(_OWN_COLUMNS).to_pylist()
    return rows


def _charge(
    parties: tuple[str, str, str], amount_pico: int, lsn_range: tuple[int, int]
) -> Transfer:
    """What a batch moves between a tenant and a provider; a correction moves it back."""
    tenant_id, provider_id, currency = parties
    tenant, provider = rules.tenant_account(tenant_id), rules.provider_account(provider_id)
    charged = amount_pico > 0
    return Transfer(
        transfer_id=f"charge-{lsn_range[0]}-{tenant_id}-{provider_id}",
        kind=TransferKind.CHARGE if charged else TransferKind.REFUND,
        debit_account=tenant if charged else provider,
        credit_account=provider if charged else tenant,
        amount_pico=abs(amount_pico),
        currency=currency,
        reason="usage" if charged else "correction",
        made_by=LEDGER_PRODUCER,
        lsn_lo=lsn_range[0],
        lsn_hi=lsn_range[1],
    )
