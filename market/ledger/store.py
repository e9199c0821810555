"""What the ledger does inside a transaction: usage batches, holds, transfers, producers.

Every command checks everything first, writes second and changes memory last (see state). Rules
are in market.accounts, market.pricing and rating; here they meet rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, select

from market import accounts as rules
from market import budgets, pricing
from market.accounts import (
    Account,
    Books,
    Hold,
    HoldResult,
    HoldState,
    HoldStatus,
    Transfer,
    TransferKind,
)
from market.budgets import Allowance, Spend
from market.errors import Conflict, InsufficientBalance, InvalidRequest, NotFound
from market.ledger import journal, registry, tables
from market.ledger.rating import money_column, money_sum, require_tokens
from market.ledger.rows import account_from
from market.ledger.schema import decode, encode, encode_batch
from market.ledger.state import ProducerMark, State
from market.ports import Clock
from market.types import (
    CURRENCY,
    Budget,
    HoldChange,
    HoldRequest,
    Lane,
    Pack,
    PackLeft,
    Period,
    RateCard,
    RecordKind,
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
        self.state.need_accounts(connection, [rules.account_of(request)])
        self.state.need_hold(connection, request.hold_id)
        books = self.state.books()
        pack = self.state.packs.get(request.pack_id or "")
        if request.pack_id is not None and (pack is None or self._is_over(pack)):
            result = HoldResult(HoldStatus.EXCEEDS_BALANCE, None, 0)
        else:
            result = books.open_hold(request, self._allowance(request))
        self.state.keep(books)
        return self._explained(connection, request, result)

    def resize_hold(
        self, connection: Connection, change: HoldChange, producer: str, epoch: int
    ) -> HoldResult:
        """Let a hold grow or shrink, once per version.

        Raises Conflict if the producer is fenced, InvalidRequest if the hold is not its own.
        """
        hold = self._own_hold(connection, producer, epoch, change.hold_id)
        self.state.need_accounts(connection, [hold.account_id])
        books = self.state.books()
        result = books.resize_hold(
            *(change.hold_id, change.version, change.wanted_pico, change.minimum_pico),
            self._allowance(hold.request),
        )
        self.state.keep(books)
        return self._explained(connection, hold.request, result)

    def end_hold(self, connection: Connection, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a hold. Doing it again changes nothing.

        Raises Conflict if the producer is fenced, InvalidRequest if the hold is not its own.
        """
        hold = self._own_hold(connection, producer, epoch, hold_id)
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

    def _own_hold(self, connection: Connection, producer: str, epoch: int, hold_id: str) -> Hold:
        self._require_epoch(producer, epoch)
        self.state.need_hold(connection, hold_id)
        hold = self.state.holds.get(hold_id)
        if hold is None or hold.request.producer != producer:
            raise InvalidRequest(f"{producer} has no hold {hold_id}")
        return hold

    def _allowance(self, request: HoldRequest) -> Allowance | None:
        """What the budgets of key and tenant and its own cap leave; None without any."""
        found = [] if request.cap is None else [request.cap]
        for subject in _spenders(request):
            found.extend(self.state.budgets.get(subject, ()))
        bounds = []
        for budget in found:
            held = sum(
                hold.left_pico
                for hold in self.state.holds.values()
                if hold.state is HoldState.PENDING and budget.subject in _spenders(hold.request)
            )
            bounds.append((budget, held))
        return budgets.allowance(bounds, self.state.spends, self._clock.now())

    def set_budgets(
        self, connection: Connection, subject: str, limits: dict[Period, int | None]
    ) -> int:
        """Set or remove limits. Charges from the returned lsn on are counted; see found_spent.

        Raises NotFound if ``subject`` is neither an account nor a key.
        """
        if self.account(connection, subject) is None:
            registry.key(connection, subject)
        now = self._clock.now()
        for period, limit_pico in limits.items():
            self.state.set_spend((subject, period), Spend(budgets.window(period, now)[0], 0))
            if limit_pico is None:
                registry.remove_budget(connection, subject, period)
            else:
                registry.set_budget(connection, Budget(subject, period, limit_pico))
        kept = registry.all_budgets(connection).get(subject, ())
        if kept:
            self.state.budgets[subject] = kept
        else:
            self.state.budgets.pop(subject, None)
        return self.state.counters.next_lsn

    def found_spent(self, subject: str, period: Period, since: datetime, before_pico: int) -> None:
        """Count what was spent in a period before its budget was set."""
        spend = self.state.spends.get((subject, period))
        if spend is not None and spend.since == since:
            counted = Spend(since, spend.spent_pico + before_pico)
            self.state.set_spend((subject, period), counted)

    def budget_rows(self, subject: str) -> list[dict[str, Any]]:
        """A subject's budgets, what was spent of them, and when they begin anew."""
        now = self._clock.now()
        rows = []
        for budget in self.state.budgets.get(subject, ()):
            spend = self.state.spends.get((subject, budget.period))
            spent_pico = budgets.spent(spend, budget.period, now)
            resets_at = budgets.window(budget.period, now)[1]
            rows.append(
                {
                    "period": str(budget.period),
                    "limit": pricing.format_money(budget.limit_pico),
                    "spent": pricing.format_money(spent_pico),
                    "resets_at": None if resets_at is None else resets_at.isoformat(),
                }
            )
        return rows

    # -- token packs -----------------------------------------------------------------------

    def buy_tokens(
        self, connection: Connection, pack: Pack, card: RateCard, made_by: str
    ) -> tuple[Pack, bool]:
        """Move the price of a pack from the tenant's balance to the pack, once per ``pack_id``.

        Returns the pack and whether it is new. Raises Conflict, InsufficientBalance, NotFound.
        """
        known = registry.find_pack(connection, pack.pack_id)
        if known is not None:
            asked = (pack.tenant_id, pack.model, pack.tokens)
            if (known.tenant_id, known.model, known.tokens) != asked:
                raise Conflict(f"pack id {pack.pack_id} was used for another pack")
            return known, False
        amount_pico = pack.tokens * card.output_pico
        tenant = self.account(connection, rules.tenant_account(pack.tenant_id))
        if tenant is None:
            raise NotFound(f"tenant {pack.tenant_id!r} does not exist", code="tenant_not_found")
        if tenant.available_pico < amount_pico:
            need, have = map(pricing.format_money, (amount_pico, tenant.available_pico))
            raise InsufficientBalance(f"the pack costs {need} {pack.currency}, available is {have}")
        account_id = rules.pack_account(pack.tenant_id, pack.pack_id)
        self.open_accounts(connection, [rules.prepaid_account(account_id, pack.currency)])
        self.add_rate_card(connection, card)
        purchase = Transfer(
            transfer_id=f"purchase-{pack.pack_id}",
            kind=TransferKind.PURCHASE,
            debit_account=tenant.account_id,
            credit_account=account_id,
            amount_pico=amount_pico,
            currency=pack.currency,
            reason=f"{pack.tokens} tokens of {pack.model}",
            made_by=made_by,
        )
        self.transfer(connection, [purchase])
        registry.add_pack(connection, pack)
        self.state.packs[pack.pack_id] = pack
        return pack, True

    def expire_packs(self, connection: Connection) -> None:
        """What is left of packs that are over, and that no hold draws on, is the market's."""
        busy = {hold.request.pack_id for hold in self.open_holds(connection)}
        for pack in [p for p in self.state.packs.values() if self._is_over(p)]:
            account_id = rules.pack_account(pack.tenant_id, pack.pack_id)
            account = self.account(connection, account_id)
            if pack.pack_id in busy or account is None:
                continue
            if account.balance_pico:
                leftover = Transfer(
                    transfer_id=f"expire-{pack.pack_id}",
                    kind=TransferKind.EXPIRE,
                    debit_account=account_id,
                    credit_account=rules.FEES,
                    amount_pico=account.balance_pico,
                    currency=pack.currency,
                    reason=f"tokens of {pack.model} expired",
                    made_by=LEDGER_PRODUCER,
                )
                self.transfer(connection, [leftover])
            registry.close_pack(connection, pack.pack_id, self._clock.now())
            del self.state.packs[pack.pack_id]

    def packs_left(
        self, connection: Connection, tenant_id: str, model: str | None = None
    ) -> tuple[PackLeft, ...]:
        """A tenant's packs, of one model or all, that can be drawn on; first to expire first."""
        own = [
            pack
            for pack in self.state.packs.values()
            if pack.tenant_id == tenant_id
            and model in (None, pack.model)
            and not self._is_over(pack)
        ]
        found = []
        for pack in sorted(own, key=lambda pack: (pack.expires_at, pack.pack_id)):
            account = self.account(connection, rules.pack_account(tenant_id, pack.pack_id))
            if account is not None and account.balance_pico:
                card = self.state.cards[pack.price_id]
                found.append(PackLeft(pack, card, account.available_pico))
        return tuple(found)

    def _explained(
        self, connection: Connection, request: HoldRequest, result: HoldResult
    ) -> HoldResult:
        """The answer to a gateway, with what else could pay: packs, and slices of others."""
        if request.lane is Lane.LEASE:
            return result
        if self.state.packs:
            packs = self.packs_left(connection, request.tenant_id, request.model)
            result = replace(result, packs=packs)
        if result.hold is None:
            elsewhere_pico = sum(
                hold.left_pico
                for hold in self.open_holds(connection)
                if hold.request.tenant_id == request.tenant_id
                and hold.request.lane is not Lane.LEASE
                and hold.request.producer != request.producer
            )
            result = replace(result, elsewhere_pico=elsewhere_pico)
        return result

    def _is_over(self, pack: Pack) -> bool:
        return pack.expires_at <= self._clock.now()

    # -- producers and usage ---------------------------------------------------------------

    def register_producer(self, connection: Connection, producer: str) -> int:
        """A new epoch for a producer; whatever an older one left open is resolved.

        The old epoch is fenced with it, so that what is left of its holds can return.
        """
        if producer == LEDGER_PRODUCER:
            raise InvalidRequest(f"producer name {producer} is the ledger's own")
        orphans = [h for h in self.open_holds(connection) if h.request.producer == producer]
        self._expire(connection, orphans)
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
        corrects = batch["kind"][0].as_py() in _CORRECTIONS
        if corrects:  # they give back to the balance, whatever paid
            payers = [rules.tenant_account(tenant_id) for tenant_id, *_ in sums]
        else:
            payers = [
                self._payer(connection, slice_id, tenant_id, arrived.producer)
                for tenant_id, _, _, slice_id, _ in sums
            ]
        providers = {rules.provider_account(provider_id) for _, provider_id, *_ in sums}
        self.state.need_accounts(connection, {*payers, *providers})
        books = self.state.books()
        if not corrects:
            self._use_holds(books, batch, sums)
        lsn_lo = self.state.counters.next_lsn
        lsn_hi = lsn_lo + int(batch.num_rows) - 1
        owed: dict[tuple[str, str, str], int] = defaultdict(int)
        for payer, (_, provider_id, currency, _, charge_pico) in zip(payers, sums, strict=True):
            owed[payer, provider_id, currency] += charge_pico
        for parties, amount_pico in owed.items():
            if amount_pico:
                transfer = _charge(parties, amount_pico, (lsn_lo, lsn_hi))
                status = books.transfer(transfer)
                if status is not rules.TransferStatus.CREATED:
                    raise InvalidRequest(f"{transfer.transfer_id} refused: {status}")
        # The charge must fall on the date of the rows it pays for, also around midnight.
        booked_at = self._book_time()
        self._enter(connection, booked_at, arrived, books.new_transfers)
        self.state.keep(books)
        if not corrects:
            self._count_spends(batch, booked_at)
        for key, gpu_us in lease_totals.items():
            self.state.set_lease(key, gpu_us)
        return lsn_lo, lsn_hi

    def _payer(
        self, connection: Connection, slice_id: str | None, tenant_id: str, producer: str
    ) -> str:
        """The account that pays for rows which name a hold, or none."""
        if slice_id is None:
            return rules.tenant_account(tenant_id)
        self.state.need_hold(connection, slice_id)
        hold = self.state.holds.get(slice_id)
        if hold is None:
            raise InvalidRequest(f"hold {slice_id} is unknown")
        senders = (hold.request.producer, LEDGER_PRODUCER)
        if hold.request.tenant_id != tenant_id or producer not in senders:
            raise InvalidRequest(f"hold {slice_id} is not for records of {tenant_id} by {producer}")
        return hold.account_id

    def _use_holds(
        self,
        books: Books,
        batch: pa.RecordBatch,
        sums: Sequence[tuple[str, str, str, str | None, int]],
    ) -> None:
        """Draw on holds. What names none must charge nothing; a pack pays only its own price."""
        for tenant_id, _, _, slice_id, charge_pico in sums:
            if slice_id is not None:
                hold = books.draw_hold(slice_id, charge_pico)
                if hold.request.pack_id is not None:
                    pack = self.state.packs[hold.request.pack_id]
                    drawn = batch.filter(pc.equal(batch["slice_id"], slice_id))
                    if set(drawn["price_id"].unique().to_pylist()) - {pack.price_id, _FREE}:
                        raise InvalidRequest(f"pack {pack.pack_id} is for {pack.price_id} only")
            elif charge_pico:
                raise InvalidRequest(f"records of {tenant_id} charge, but name no hold")

    def _count_spends(self, batch: pa.RecordBatch, now: datetime) -> None:
        """Add a batch's charges to the budgets of their keys and tenants, and to holds' caps."""

        def count(column: str, name: str, bounds: Iterable[Budget]) -> None:
            own = batch.filter(pc.equal(batch[column], name))
            amount_pico = money_sum(own["charge"])
            for budget in bounds:
                key = (budget.subject, budget.period)
                spend = budgets.add(self.state.spends.get(key), budget.period, now, amount_pico)
                self.state.set_spend(key, spend)

        if self.state.budgets:
            for column, subject_of in (("api_key_id", str), ("tenant_id", rules.tenant_account)):
                for name in batch[column].unique().drop_null().to_pylist():
                    bounds = self.state.budgets.get(subject_of(name), ())
                    if bounds:
                        count(column, name, bounds)
        for name in batch["slice_id"].unique().drop_null().to_pylist():
            hold = self.state.holds.get(name)
            if hold is not None and hold.request.cap is not None:
                count("slice_id", name, [hold.request.cap])

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
            if None in (row["lease_id"], row["gpu_us"]) or card is None:
                raise InvalidRequest(
                    f"GPU time of lease {row['lease_id']} needs lease_id, gpu_us and a known "
                    f"price, has {row['price_id']}"
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

    def _expire(self, connection: Connection, orphans: Sequence[Hold]) -> None:
        if not orphans:
            return
        self.state.need_accounts(connection, [hold.account_id for hold in orphans])
        books = self.state.books()
        self._release(books, [books.expire_hold(h.request.hold_id) for h in orphans])
        self._enter(connection, self._book_time(), None, books.new_transfers)
        self.state.keep(books)

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
_GPU_COLUMNS = ["lease_id", "price_id", "gpu_us", "charge"]
_FREE = pricing.NO_PRICE.price_id


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


def _charge(
    parties: tuple[str, str, str], amount_pico: int, lsn_range: tuple[int, int]
) -> Transfer:
    """What a batch moves between a tenant's account and a provider; a correction moves it back."""
    payer, provider_id, currency = parties
    provider = rules.provider_account(provider_id)
    charged = amount_pico > 0
    return Transfer(
        transfer_id=f"charge-{lsn_range[0]}-{payer.partition(':')[2]}-{provider_id}",
        kind=TransferKind.CHARGE if charged else TransferKind.REFUND,
        debit_account=payer if charged else provider,
        credit_account=provider if charged else payer,
        amount_pico=abs(amount_pico),
        currency=currency,
        reason="usage" if charged else "correction",
        made_by=LEDGER_PRODUCER,
        lsn_lo=lsn_range[0],
        lsn_hi=lsn_range[1],
    )


def _spenders(request: HoldRequest) -> tuple[str, ...]:
    """Whose budgets a hold counts against."""
    cap = () if request.cap is None else (request.cap.subject,)
    key = () if request.api_key_id is None else (request.api_key_id,)
    return (rules.tenant_account(request.tenant_id), *key, *cap)
