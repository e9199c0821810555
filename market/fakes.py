"""A fake for each port: small, exact, and held to the same contract tests as the real ones."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from market import accounts as rules
from market import pricing
from market.accounts import Account, Books, Hold, HoldResult, HoldState, Transfer, TransferKind
from market.catalog import Model
from market.credit import Credit, within
from market.errors import (
    Conflict,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    Revoked,
)
from market.ports import Engine
from market.types import (
    APP_PREFIX,
    CURRENCY,
    AppStatus,
    ClusterView,
    Deployment,
    EngineChunk,
    EngineRequest,
    FinishReason,
    HoldChange,
    HoldRequest,
    Offer,
    Principal,
    RateCard,
    RecordKind,
    Replica,
    ReplicaState,
    Route,
    SliceAsk,
    Spare,
    StoredModel,
    StoredState,
    TokenCounts,
    UsageRecord,
    app_name,
)


class FakeClock:
    """Time that moves only when told."""

    def __init__(self, start: datetime = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed_s = 0.0

    def now(self) -> datetime:
        """The start plus what was advanced."""
        return self._start + timedelta(seconds=self._elapsed_s)

    def monotonic(self) -> float:
        """Seconds advanced so far."""
        return self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._elapsed_s += seconds


@dataclass
class FakeEngine:
    """Answers with the tokens 0, 1, 2 ... as far as asked; can die, be slow, or stop early.

    ``fail_at`` kills the first ``failures`` requests after so many tokens; ``revoke_at`` sends
    those away that only borrow a place. ``gate``, if given, is awaited before each token.
    """

    stop_after: int | None = None
    cached_input_tokens: int = 0
    fail_at: int | None = None
    failures: int = 1_000_000
    revoke_at: int | None = None
    gate: asyncio.Semaphore | None = None
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def generate(
        self, request: EngineRequest, credit: Credit | None = None
    ) -> AsyncGenerator[EngineChunk, None]:
        """One chunk per token; the text of token n is its number and a space."""
        chunks = self._generate(request)
        return chunks if credit is None else within(chunks, credit, request.resumed)

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        self.requests.append(request)
        assert request.sampling.max_tokens is not None
        limit = request.sampling.max_tokens
        last = limit if self.stop_after is None else min(limit, self.stop_after)
        ended = False
        try:
            for produced in range(request.resumed + 1, last + 1):
                if self.gate is not None:
                    await self.gate.acquire()
                if request.borrowed and self.revoke_at == produced - 1:
                    ended = True
                    raise Revoked("the test wants its place")
                if self.failures > 0 and self.fail_at == produced - 1:
                    self.failures -= 1
                    ended = True
                    raise EngineFailed("killed by the test")
                inputs = len(request.prompt_token_ids) - request.resumed
                counts = TokenCounts(inputs, self.cached_input_tokens, produced)
                reason = None
                if produced == last:
                    stopped = last == self.stop_after
                    reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                    ended = True
                yield EngineChunk(f"{produced - 1} ", (produced - 1,), counts, reason)
        finally:
            if not ended:
                self.aborted.append(request.request_id)


class FakeRoutes:
    """One model behind one engine at one price, perhaps with a replica that is ``lent``."""

    def __init__(self, route: Route, card: RateCard | None, engine: Engine) -> None:
        self._route, self.card, self._engine = route, card, engine
        self.lent: Route | None = None
        self.moves = 0

    async def route(self, model: str, principal: Principal) -> Route:
        """Raises NotFound for any other model."""
        if model != self._route.model:
            raise NotFound(f"model {model!r} is not served", code="model_not_found")
        return self._route

    def least_busy(self, route: Route, borrower: str | None) -> Route:
        """What is lent, if there is anything."""
        return route if self.lent is None or borrower is None else self.lent

    async def elsewhere(self, route: Route, principal: Principal, *, borrows: bool) -> Route:
        """The pool's own."""
        self.moves += 1
        return self._route

    async def another(self, route: Route) -> Route:
        """There is no other."""
        return route

    async def rate_card(self, model: str) -> RateCard:
        """The card, or NotFound."""
        if self.card is None:
            raise NotFound(f"model {model} has no price", code="model_not_found")
        return self.card

    def engine(self, route: Route) -> Engine:
        """The engine."""
        return self._engine


class MemoryLedger:
    """The ledger's promises without SQL: books in memory, each record booked once."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._books = Books({a.account_id: a for a in rules.chart_of_accounts(CURRENCY)})
        self._cards = {pricing.NO_PRICE.price_id: pricing.NO_PRICE}
        self._producers: dict[str, tuple[int, int]] = {}
        self._lease_us: dict[tuple[str, str], int] = defaultdict(int)
        self.records: list[UsageRecord] = []
        self.asked: list[tuple[str, int, int, float]] = []

    async def arrivals(self, since: datetime) -> list[tuple[str, int, int, float]]:
        """As the test says."""
        return self.asked

    async def create_tenant(self, tenant_id: str) -> bool:
        """Make a tenant's account."""
        account = rules.prepaid_account(rules.tenant_account(tenant_id), CURRENCY)
        return self._books.open_account(account)

    async def create_provider(self, provider_id: str) -> bool:
        """Make a provider's accounts."""
        accounts = rules.provider_accounts(provider_id, CURRENCY)
        created = [self._books.open_account(account) for account in accounts]
        return all(created)

    async def add_rate_cards(self, cards: list[RateCard], only_new_models: bool) -> None:
        """Add prices."""
        for card in cards:
            known = any(other.model == card.model for other in self._cards.values())
            if not (only_new_models and known):
                self._cards[card.price_id] = card

    async def rate_card(self, model: str) -> RateCard | None:
        """A price of the model, None if there is none."""
        return next((card for card in self._cards.values() if card.model == model), None)

    async def balance(self, tenant_id: str) -> Account:
        """A tenant's account."""
        account = self._books.accounts.get(rules.tenant_account(tenant_id))
        if account is None:
            raise NotFound(f"tenant {tenant_id!r} does not exist", code="tenant_not_found")
        return account

    async def accounts(self) -> list[Account]:
        """All accounts, by id."""
        return [self._books.accounts[name] for name in sorted(self._books.accounts)]

    async def transfer(self, transfer: Transfer) -> None:
        """Move money once per id."""
        status = self._books.transfer(transfer)
        if status is rules.TransferStatus.EXISTS_DIFFERENT:
            raise Conflict(f"transfer id {transfer.transfer_id} was used for another transfer")
        if status not in (rules.TransferStatus.CREATED, rules.TransferStatus.EXISTS):
            raise InvalidRequest(f"transfer {transfer.transfer_id} refused: {status}")

    async def open_hold(self, request: HoldRequest) -> HoldResult:
        """Set money aside."""
        self._check_epoch(request.producer, request.epoch)
        return self._books.open_hold(request)

    async def resize_hold(self, producer: str, epoch: int, change: HoldChange) -> HoldResult:
        """Let a hold grow or shrink."""
        self._own_hold(producer, epoch, change.hold_id)
        return self._books.resize_hold(
            change.hold_id, change.version, change.wanted_pico, change.minimum_pico
        )

    def hold(self, hold_id: str) -> Hold:
        """A hold, whatever became of it."""
        return self._books.holds[hold_id]

    async def open_holds(self) -> list[Hold]:
        """Holds that have not ended."""
        return [h for h in self._books.holds.values() if h.state is HoldState.PENDING]

    async def register_producer(self, producer: str) -> int:
        """A new epoch; open holds of the old one expire."""
        epoch = self._producers.get(producer, (0, 0))[0] + 1
        self._producers[producer] = (epoch, 0)
        for hold in await self.open_holds():
            if hold.request.producer == producer:
                self._books.expire_hold(hold.request.hold_id)
        return epoch

    async def producer_mark(self, producer: str) -> tuple[int, int]:
        """(epoch, next sequence number)."""
        return self._producers.get(producer, (0, 0))

    async def end_hold(self, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a hold."""
        if self._own_hold(producer, epoch, hold_id).state is HoldState.PENDING:
            self._books.void_hold(hold_id)

    def _own_hold(self, producer: str, epoch: int, hold_id: str) -> Hold:
        self._check_epoch(producer, epoch)
        hold = self._books.holds.get(hold_id)
        if hold is None or hold.request.producer != producer:
            raise InvalidRequest(f"{producer} has no hold {hold_id}")
        return hold

    async def append_records(
        self, producer: str, epoch: int, first_seq: int, records: Sequence[UsageRecord]
    ) -> int:
        """Book each record once; the same rules as ``append`` of the real ledger."""
        self._check_epoch(producer, epoch)
        next_seq = self._producers[producer][1]
        if first_seq > next_seq:
            raise Conflict("gap in the sequence", code="sequence_gap")
        fresh = records[next_seq - first_seq :]
        lease_us = self._lease_us.copy()
        for record in fresh:
            self._check_charge(record, lease_us)
        self._check_holds(fresh)
        self._lease_us = lease_us
        for record in fresh:
            self._book(record)
        next_seq = max(next_seq, first_seq + len(records))
        self._producers[producer] = (epoch, next_seq)
        return next_seq

    def _check_epoch(self, producer: str, epoch: int) -> None:
        known = self._producers.get(producer, (0, 0))[0]
        if epoch != known:
            raise Conflict(f"{producer} of epoch {epoch} is fenced", code="producer_fenced")

    def _check_charge(self, record: UsageRecord, lease_us: dict[tuple[str, str], int]) -> None:
        card = self._cards.get(record.price_id)
        if card is None:
            raise InvalidRequest(f"unknown price {record.price_id}")
        counts = TokenCounts(record.input_tokens, record.cached_input_tokens, record.output_tokens)
        if record.kind is RecordKind.GPU:
            lease = (record.lease_id or "", record.price_id)
            before_us, gpu_us = lease_us[lease], record.gpu_us or 0
            expected = pricing.gpu_charge(before_us, gpu_us, card.gpu_hour_pico)
            lease_us[lease] += gpu_us
        else:
            expected = pricing.charge(counts, card, record.finish_reason, record.lane)
        if record.charge_pico != expected:
            raise InvalidRequest(f"charge does not follow from {card.price_id}")

    def _check_holds(self, records: Sequence[UsageRecord]) -> None:
        drawn: dict[str, int] = defaultdict(int)
        for record in records:
            if record.slice_id is not None:
                drawn[record.slice_id] += record.charge_pico
        for hold_id, amount_pico in drawn.items():
            hold = self._books.holds.get(hold_id)
            if hold is not None and amount_pico > hold.left_pico:
                raise InvalidRequest(f"hold {hold_id} has only {hold.left_pico} left")
        for record in records:
            hold = self._books.holds.get(record.slice_id or "")
            if record.slice_id is None and record.charge_pico == 0:
                continue
            if hold is None or hold.request.tenant_id != record.tenant_id:
                raise InvalidRequest(
                    f"hold {record.slice_id} is unknown or not of {record.tenant_id}"
                )

    def _book(self, record: UsageRecord) -> None:
        if record.slice_id is not None:
            self._books.draw_hold(record.slice_id, record.charge_pico)
        self.records.append(record)
        if record.charge_pico:
            lsn = len(self.records)
            self._books.transfer(
                Transfer(
                    transfer_id=f"charge-{lsn}",
                    kind=TransferKind.CHARGE,
                    debit_account=rules.tenant_account(record.tenant_id),
                    credit_account=rules.provider_account(record.provider_id),
                    amount_pico=record.charge_pico,
                    currency=record.currency,
                    reason="usage",
                    made_by="ledger",
                    lsn_lo=lsn,
                    lsn_hi=lsn,
                )
            )


class FakeCluster:
    """Nodes and applications that do what the test says; a started replica is ready when told.

    With ``instant`` it is ready at once.
    """

    def __init__(self, nodes: Iterable[str] = ("local",), instant: bool = False) -> None:
        self.nodes = set(nodes)
        self.instant = instant
        self.apps: dict[str, AppStatus] = {}
        self.homes: dict[str, str] = {}
        self.processes: dict[str, set[str]] = defaultdict(set)
        self.taken: set[tuple[str, int]] = set()
        self.broken: set[str] = set()
        self.started: list[str] = []
        self.disks: dict[str, dict[str, StoredModel]] = defaultdict(dict)
        self.sleepers: set[str] = set()
        self._runs = 0

    def check(self, model: Model, engine: str) -> None:
        """Raises InvalidRequest for engines that nobody knows."""
        if engine not in ("transformers", "vllm"):
            raise InvalidRequest(f"engine {engine} is unknown", param="engine")

    def look(self) -> ClusterView:
        """Nodes that live, applications as they are; none runs on a node that is lost."""
        seen = {
            name: app if self.homes[name] in self.nodes else AppStatus(None, False, "node lost")
            for name, app in self.apps.items()
        }
        return ClusterView(frozenset(self.nodes), seen)

    def start(self, replica: Replica, deployment: Deployment, model: Model, offer: Offer) -> None:
        """Begin to run it."""
        if deployment.model in self.broken:
            raise RuntimeError("cannot start this one")
        asleep = replica.state is ReplicaState.FALLING_ASLEEP
        known = self.apps.get(replica.app_name, AppStatus(None, False, ""))
        self.apps[replica.app_name] = replace(known, replica_id=replica.replica_id, asleep=asleep)
        self.homes[replica.app_name] = offer.node_id
        self.processes[offer.node_id].add(replica.process_id)
        self.started.append(replica.replica_id)
        if self.instant:
            self.ready(replica.app_name)

    def start_spare(self, spare: Spare, offer: Offer) -> None:
        """Begin to run a process without a model."""
        name = app_name(spare.process)
        self.apps.setdefault(name, AppStatus(None, False, ""))
        self.homes[name] = offer.node_id
        self.processes[offer.node_id].add(spare.process)
        if self.instant:
            self.ready(name)

    def can_sleep(self, engine: str, offer: Offer) -> bool:
        """As the test says."""
        return engine in self.sleepers

    def models(self, offer: Offer) -> tuple[StoredModel, ...]:
        """What was pulled."""
        if offer.node_id not in self.nodes:
            raise Overloaded(f"node {offer.node_id} does not answer")
        return tuple(self.disks[offer.node_id].values())

    def pull(self, model: Model, offer: Offer, *, pin: bool | None, evict: bool) -> None:
        """There at once."""
        size, known = model.weights_bytes, self.disks[offer.node_id].get(model.name)
        pinned = pin if pin is not None else known is not None and known.pinned
        stored = StoredModel(model.name, StoredState.READY, size, size, 0.0, pinned)
        self.disks[offer.node_id][model.name] = stored

    def read_in(self, model: Model, offer: Offer) -> None:
        """There at once."""
        known = self.disks[offer.node_id][model.name]
        self.disks[offer.node_id][model.name] = replace(known, cached=1.0)

    def remove_model(self, name: str, offer: Offer) -> int:
        """Raises NotFound."""
        known = self.disks[offer.node_id].pop(name, None)
        if known is None:
            raise NotFound(f"{name} is not on this disk")
        return known.bytes

    def ready(self, only: str | None = None) -> None:
        """A new process of this application (or of all) serves."""
        for name in list(self.apps) if only is None else [only]:
            self._runs += 1
            self.apps[name] = replace(self.apps[name], run=f"run-{self._runs}", failed=False)

    def remove(self, app_name: str) -> None:
        """Gone at once, with its processes."""
        if self.apps.pop(app_name, None) is not None:
            self.processes[self.homes.pop(app_name)].discard(app_name.removeprefix(APP_PREFIX))

    def residents(self, node_id: str) -> frozenset[str]:
        """Replicas with processes there."""
        return frozenset(self.processes[node_id])

    def memory_taken(self, node_id: str, others_milli: Mapping[int, int]) -> frozenset[int]:
        """As the test says."""
        return frozenset(index for index in others_milli if (node_id, index) in self.taken)

    def end(self, replica_id: str, node_id: str) -> None:
        """Its processes are gone."""
        self.processes[node_id].discard(replica_id)


class DirectSink:
    """A UsageSink that books each record at once in a MemoryLedger."""

    def __init__(self, ledger: MemoryLedger, producer: str = "gw0") -> None:
        self._ledger = ledger
        self._producer = producer
        self._epoch = 0
        self._requests = 0
        self.next_seq = 0
        self.under_way: dict[str | None, UsageRecord] = {}

    @property
    def booked(self) -> int:
        """All that was recorded."""
        return self.next_seq

    async def start(self) -> None:
        """Take an epoch."""
        self._epoch = await self._ledger.register_producer(self._producer)

    def identity(self) -> tuple[str, int]:
        """(producer, epoch)."""
        return self._producer, self._epoch

    def next_request_id(self) -> str:
        """Counted from one."""
        self._requests += 1
        return f"req-{self._producer}-{self._requests}"

    def begin(self, record: UsageRecord) -> None:
        """Remember it."""
        self.under_way[record.request_id] = record

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Book it."""
        self.next_seq = await self._ledger.append_records(
            self._producer, self._epoch, self.next_seq, [record]
        )
        self.under_way.pop(record.request_id, None)
        return record

    async def recover(self) -> None:
        """What a sweep does when this process has died: the unfinished get their records."""
        for record in list(self.under_way.values()):
            await self.record(record)
        await self._ledger.register_producer(self._producer)


class DirectGrants:
    """The Grants port straight on a ledger: there is no scheduler."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self._ledger = ledger
        self.asked: list[SliceAsk] = []

    async def grant(self, ask: SliceAsk) -> HoldResult:
        """Whatever the ledger says."""
        self.asked.append(ask)
        if ask.opens is not None:
            return await self._ledger.open_hold(ask.opens)
        assert ask.changes is not None
        return await self._ledger.resize_hold(ask.producer, ask.epoch, ask.changes)
