"""Kills a real scheduler again and again, and checks what is left.

One case is one seed: a script of orders, renewals, releases, deposits, dying nodes and replicas,
drains, prices, pools and hours that pass. Scheduler and ledger are forked processes that really die
(SIGKILL at a named point, or at any moment). What runs in the cluster is a file that outlives both
and keeps a diary, so that in the end every charged second can be held against it.

After each death the stored state must be what the dead scheduler had committed last, and in the end
everything is recomputed from the ledger's rows alone.
"""

import asyncio
import fcntl
import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import blake2b
from itertools import chain, combinations
from pathlib import Path
from zlib import crc32

import pyarrow.parquet as pq

from market import catalog, crash
from market.errors import MarketError, MarketFault, Overloaded
from market.fairness import PoolReport
from market.fakes import FakeCluster
from market.leasing import PRODUCER
from market.ledger import producer
from market.matching import micros
from market.scheduler import service
from market.scheduler.core import Core, has_gpus
from market.scheduler.service import Scheduler
from market.scheduler.shares import GatewayReport
from market.scheduler.store import State, Store
from market.types import (
    Bounds,
    CloseReason,
    Gpu,
    Lease,
    LeaseState,
    Offer,
    Order,
    OrderState,
    Place,
    StartCost,
)
from tests.faults import harness
from tests.faults.harness import DEADLINE_S, START, Child, TorturedLedger, Wire
from tests.samples import deposit

POINTS = (
    *("before-commit", "committed", "lease-held", "lease-hold-ended", "stranger-ended"),
    *("segments-sent", "steps-decided", "step-done"),
    *("order-granted", "lease-renewed", "lease-bound", "lease-moved"),
)
# How often a point may be passed before the process dies there; once where it is rare.
MOST = {"before-commit": 40, "committed": 40, "segments-sent": 6, "steps-decided": 8}
MOST |= {"step-done": 8, "lease-held": 4, "order-granted": 3}
# What leads to a rare point.
CAUSES = {
    "lease-renewed": {"renew": 8},
    "lease-bound": {"order": 8},
    "lease-moved": {"order": 8, "lose": 4, "back": 3},
}
LEDGER_POINTS = harness.LEDGER_POINTS[:7]
ANY_MOMENT = "any moment"
# The rich one never runs out of money, so no lease of it may end for lack of it.
RICH, POOR = "acme", "bolt"
MICRO = timedelta(microseconds=1)
GPU_US_PER_HOUR = 3_600_000_000


def _offer(name: str, provider: str, gpus: int, ask_pico: int) -> Offer:
    found = tuple(Gpu(index, "a10", 24_564) for index in range(gpus))
    kind = "a10" if gpus else "cpu"
    place = (name, provider, name, kind, found, 16, 64_000)
    return Offer(*place, ask_pico, "USD", START, logical=True)


# Asks that divide badly: the last digit must be right too.
OFFERS = (
    _offer("barn", "farmer", 2, 1_234_567_890_123),
    _offer("farm", "farmer", 4, 1_234_567_890_123),
    _offer("shed", "smith", 1, 700_000_000_001),
    _offer("desk", "smith", 0, 0),
)


# -- the cluster, which outlives every process ----------------------------------------------


class World(FakeCluster):
    """Nodes that die or fall silent, processes that linger, and the diary of what served when."""

    def __init__(self) -> None:
        super().__init__(offer.node_id for offer in OFFERS)
        self.sleepers = {"transformers"}
        self.now_us = 0
        self.places = {}
        self.served = {}  # run -> [application, since, until or None], microseconds
        self.crowded = []
        self._asked = Counter()

    def start(self, replica, deployment, model, offer):
        if self.now_us % 7 == 3:
            raise RuntimeError("this start went wrong")
        super().start(replica, deployment, model, offer)
        self.places[replica.process_id] = replica.place
        if offer.node_id not in self.nodes:
            self.processes[offer.node_id].discard(replica.process_id)
        self._count(offer.node_id)

    def start_spare(self, spare, offer):
        super().start_spare(spare, offer)
        self.places[spare.process] = Place(spare.offer_id, spare.node_id)
        if offer.node_id not in self.nodes:
            self.processes[offer.node_id].discard(spare.process)

    def ready(self, app_name=None):
        self._ended(app_name)
        super().ready(app_name)
        self.served[self.apps[app_name].run] = [app_name, self.now_us, None]

    def remove(self, app_name):
        self._asked[app_name] += 1
        kind = crc32(app_name.encode())
        if app_name not in self.apps or self._asked[app_name] <= kind % 2:
            return  # gone before, or still draining
        self._ended(app_name)
        node_id = self.homes[app_name]
        if node_id in self.nodes and kind % 3:
            self._dirty(app_name.removeprefix("model-"), node_id)
            super().remove(app_name)
        else:  # nobody tells its process, or it does not listen
            del self.apps[app_name], self.homes[app_name]

    def residents(self, node_id):
        self._require(node_id)
        return super().residents(node_id)

    def memory_taken(self, node_id, others_milli):
        self._require(node_id)
        return super().memory_taken(node_id, others_milli)

    def end(self, replica_id, node_id):
        self._require(node_id)
        self._dirty(replica_id, node_id)
        super().end(replica_id, node_id)

    def lose(self, node_id, dead):
        """The node is dead with everything on it, or only silent."""
        self.nodes.discard(node_id)
        if dead:
            self.processes[node_id].clear()
            for name in [n for n, home in self.homes.items() if home == node_id]:
                self._ended(name)
                self.apps[name] = replace(self.apps[name], run=None, failed=False)

    def back(self, node_id):
        self.nodes.add(node_id)
        own = [n for n, home in self.homes.items() if home == node_id]
        self.processes[node_id].update(name.removeprefix("model-") for name in own)
        self._count(node_id)

    def fail(self, app_name):
        self._ended(app_name)
        failed = replace(self.apps[app_name], run=None, failed=True, message="out of memory")
        self.apps[app_name] = failed

    def pass_time(self, now_us, rng):
        """Most of what starts is ready by now, and half of the memory is clean."""
        self.now_us = now_us
        for name, app in sorted(self.apps.items()):
            waits = app.run is None and not app.failed and self.homes[name] in self.nodes
            if waits and rng.random() < 0.7:
                self.ready(name)
        self.taken = {gpu for gpu in sorted(self.taken) if rng.random() < 0.5}

    def _ended(self, app_name):
        run = self.apps[app_name].run
        if run is not None:
            self.served[run][2] = self.now_us

    def _dirty(self, replica_id, node_id):
        place = self.places[replica_id]
        self.taken.update((node_id, index) for index in place.gpu_indices)

    def _require(self, node_id):
        if node_id not in self.nodes:
            raise Overloaded(f"node {node_id} does not answer")

    def _count(self, node_id):
        used = Counter()
        for process_id in self.processes[node_id]:
            app = self.apps.get(f"model-{process_id}")
            if app is not None and app.asleep:
                continue
            place = self.places[process_id]
            used.update(dict.fromkeys(place.gpu_indices, place.gpu_milli))
        if any(milli > 1000 for milli in used.values()):
            self.crowded.append((self.now_us, node_id, sorted(self.processes[node_id])))


class SharedCluster:
    """The Cluster port over the file."""

    def __init__(self, home: Path) -> None:
        self._file, self._lock = home / "world", home / "world.lock"

    @contextmanager
    def opened(self):
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            world = pickle.loads(self._file.read_bytes())
            yield world
            self.keep(world)

    def keep(self, world: World) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(pickle.dumps(world))
        fresh.replace(self._file)

    def __getattr__(self, method):
        if method.startswith("__"):  # it travels to other processes
            raise AttributeError(method)

        def call(*arguments):
            with self.opened() as world:
                return getattr(world, method)(*arguments)

        call.__name__ = method
        return call


# -- the scheduler's process ----------------------------------------------------------------


def fingerprint(state: State) -> int:
    """A sum over everything that is stored, types and all."""
    total = _digest(("sender", state.epoch, state.next_seq))
    shelves = (state.offers, state.orders, state.leases, state.deployments, state.replicas)
    shelves += (state.starts, state.models)
    total += sum(_digest(value) for shelf in shelves for value in shelf.values())
    return total + sum(_digest((seq, *row)) for seq, row in state.outbox.items())


def _digest(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=16).digest())


class WitnessedStore(Store):
    """Writes down, outside of SQL, what each transaction is about to change and that it did."""

    async def open(self):
        await super().open()
        self._witness = os.open(self._lock_file.with_name("witness"), os.O_WRONLY | os.O_APPEND)
        self._count = 0
        self._total = fingerprint(self.state)
        self._note("open", self._total)

    async def save(self, values=(), gone=(), records=(), epoch=None):
        kept, deleted, state = list(values), list(gone), self.state
        after = {_shelf_key(v): None for v in deleted} | {_shelf_key(v): v for v in kept}
        before = {(shelf, key): getattr(state, shelf).get(key) for shelf, key in after}
        change = sum(_digest(value) for value in after.values() if value is not None)
        change -= sum(_digest(value) for value in before.values() if value is not None)
        change += sum(_digest((seq, *row)) for seq, row in enumerate(records, state.next_seq))
        sender = (epoch or state.epoch, state.next_seq + len(records))
        change += _digest(("sender", *sender)) - _digest(("sender", state.epoch, state.next_seq))
        await self._witnessed(change, super().save(kept, deleted, records, epoch))

    async def sent(self, before_seq):
        rows = self.state.outbox.items()
        change = -sum(_digest((seq, *row)) for seq, row in rows if seq < before_seq)
        await self._witnessed(change, super().sent(before_seq))

    async def _witnessed(self, change, done):
        self._count += 1
        number = self._count
        self._note("begin", number, change)
        await done
        self._total += change
        self._note("end", number)

    def agrees(self) -> bool:
        """Whether memory is what was stored."""
        return fingerprint(self.state) == self._total

    def _note(self, *words):
        os.write(self._witness, f"{' '.join(map(str, words))}\n".encode())


def _shelf_key(value):
    if isinstance(value, StartCost):
        return "starts", value.start_id
    name = type(value).__name__.lower()
    return f"{name}s", getattr(value, f"{name}_id")


def possible_fingerprints(case: "Case", point: str) -> set[int]:
    """What SQL may say after a death, by what was written down; exact where the point tells."""
    stored, under_way = case.fingerprint, {}
    for line in case.witness.read_text().splitlines():
        word, *numbers = line.split()
        if word == "open":
            assert int(numbers[0]) == stored, "another state was loaded than was committed"
        elif word == "begin":
            under_way[numbers[0]] = int(numbers[1])
        else:
            stored += under_way.pop(numbers[0])
    changes = list(under_way.values())
    if len(changes) == 1 and point in ("before-commit", "committed"):
        return {stored + changes[0] * (point == "committed")}
    some = chain.from_iterable(combinations(changes, n) for n in range(len(changes) + 1))
    return {stored + sum(done) for done in some}


class QuietLedger(TorturedLedger):
    """Publishes and keeps house when told, so that the seed decides over what it dies."""

    async def open(self):
        await super().open()
        for task in self._tasks:
            task.cancel()

    async def publish(self):
        pass

    async def keep_house(self):
        pass

    async def work(self):
        await super().publish()
        await super().keep_house()


def ledger_process(case: "Case", plan: str) -> None:
    harness.TorturedLedger = QuietLedger
    harness.ledger_process(case, plan)


class LedgerWire(Wire):
    """A network that doubles and loses; a patient client asks until it is answered."""

    def __init__(self, case: "Case", rng: random.Random | None) -> None:
        super().__init__(case, rng)
        self._patient = case.patient

    def __getattr__(self, method):
        async def call(*arguments, **keywords):
            ask = partial(self._call, method, (*arguments, *keywords.values()))
            return await (harness.patiently(ask) if self._patient else ask())

        return call

    def calm(self):
        self._rng, self._patient = None, True


class CaseClock:
    """The case's time, as of the last command."""

    us = 0

    def now(self):
        return START + self.us * MICRO

    def monotonic(self):
        return self.us / 10**6


class Errors(logging.Handler):
    """Whatever the scheduler calls an error must not happen, but for starts that we spoil."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record):
        if record.msg != "%s of %s failed, tried again":
            with self._file.open("a") as file:
                file.write(f"{logging.Formatter().format(record)}\n")


def scheduler_process(case: "Case", channel, life: int, plan: str) -> None:
    crash.arm(plan)
    logging.disable(logging.NOTSET)
    logging.getLogger().addHandler(Errors(case.errors))
    service.Store = WitnessedStore
    asyncio.run(_serve(case, channel, life))


async def _serve(case: "Case", channel, life: int) -> None:
    wire, clock = LedgerWire(case, random.Random(f"{case.seed}/{life}")), CaseClock()
    send = partial(producer.send, wire)
    scheduler = Scheduler(case.config, clock, wire, SharedCluster(case.home), send)
    await scheduler._store.open()
    scheduler._core.rebuild_calendar()
    channel.send("open")
    while not scheduler._closed:
        clock.us, commands = channel.recv()
        channel.send(await asyncio.gather(*(_obey(scheduler, wire, *c) for c in commands)))


async def _obey(scheduler: Scheduler, wire: LedgerWire, name: str, *arguments):
    """(True, result), or (False, error) if the scheduler refuses."""
    keeper, core = scheduler._keeper, scheduler._core
    if name == "arm":
        return True, crash.arm(*arguments)
    if name == "calm":
        return True, wire.calm()
    if name == "inspect":
        assert core.store.agrees(), "memory is not what is stored"
        return True, (core.state, _calendar_differs(core))
    if name == "round":
        await keeper.round()
        while keeper._working:
            await asyncio.gather(*keeper._working.values())
        return True, _overview(core.state)
    try:
        return True, await getattr(scheduler, name)(*arguments)
    except MarketFault:
        raise
    except MarketError as error:
        return False, error


def _overview(state: State):
    """What the script chooses from."""
    return {
        "offers": sorted(o.offer_id for o in state.offers.values()),
        "leases": sorted(v.lease_id for v in state.leases.values() if not _closed(v)),
        "waiting": sorted(
            o.order_id for o in state.orders.values() if o.state is OrderState.WAITING
        ),
        "pools": sorted(d.deployment_id for d in state.deployments.values() if d.lease_id is None),
        "deployments": sorted(state.deployments),
    }


def _closed(lease: Lease) -> bool:
    return lease.state is LeaseState.CLOSED


def _calendar_differs(core: Core) -> list[str]:
    """Where a calendar made of the stored state would decide otherwise than the one in memory."""
    kept, now = core.calendar, micros(core.clock.now())
    core.rebuild_calendar()
    made, core.calendar = core.calendar, kept
    differences = []
    for node_id in sorted(core.state.offers):
        for hours in (0, 0.5, 1, 2, 4, 8):
            start = now + int(hours * GPU_US_PER_HOUR)
            for end in (start + 10**6, start + GPU_US_PER_HOUR, None):
                before, after = (c.room(node_id, start, end) for c in (kept, made))
                if before != after:
                    differences.append(f"{node_id} in {hours} h: {before}, loaded {after}")
    return differences


# -- the case -------------------------------------------------------------------------------


class Case(harness.Case):
    """A seed's plan, and what of it has happened."""

    def __post_init__(self):
        super().__post_init__()
        self.config = replace(self.config, node_patience_s=10)
        self.witness = self.config.state_dir / "witness"
        self.errors = self.home / "errors"
        self.cluster = SharedCluster(self.home)
        self.cluster.keep(World())
        self.patient = self.rng.random() < 0.5
        # An exact case does one thing at a time, so that its seed decides everything.
        self.exact = self.seed % 2 == 0
        self.fate = self.random("fate")
        self.elapsed_us = 0
        self.fingerprint = fingerprint(State())
        self.deposited = Counter()
        self.counts = Counter()

    def random(self, use: str) -> random.Random:
        """Numbers for one use: what one draws must not shift what the others draw."""
        return random.Random(f"{self.seed}/{use}")

    @property
    def now(self) -> datetime:
        return START + self.elapsed_us * MICRO

    def pass_time(self, seconds: float) -> None:
        self.elapsed_us += round(seconds * 10**6)
        self.set_clock(self.elapsed_us / 10**6)
        with self.cluster.opened() as world:
            world.pass_time(self.elapsed_us, self.fate)


class Market:
    """The two processes of a case, as their parent sees them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.children: list[Child] = []
        self.rng = case.random("deaths")
        self._ledger_rng = case.random("ledger")
        self.ledger_kills = self._ledger_rng.randint(0, 2)
        self.ledger: Child | None = None
        self.scheduler: Child | None = None
        self.seen = {"offers": [], "leases": [], "waiting": [], "pools": []}
        self._lives = 0

    def keep_ledger(self) -> None:
        """Have a ledger; the first ones die sooner or later."""
        if self.ledger is not None and self.ledger.alive():
            return
        if self.ledger is not None:
            _note_death(self.case, self.ledger, "ledger ")
        rng, plan = self._ledger_rng, ""
        if self.ledger_kills > 0:
            plan = f"{rng.choice(LEDGER_POINTS)}:{rng.randint(1, 40)}"
        self.ledger_kills -= 1
        self.ledger = self._child(ledger_process, self.case, plan)

    def spare_ledger(self) -> None:
        """From now on it lives."""
        self.ledger_kills = 0
        if self.ledger.plan:
            self.ledger.killed_by_case = True
            self.ledger.kill()

    def ask_ledger(self, method: str, *arguments):
        """A safe command, until it is answered."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self.keep_ledger()
            try:
                return asyncio.run(Wire(self.case)._once(method, arguments))
            except Overloaded:
                assert time.monotonic() < deadline, "the ledger does not answer"
                time.sleep(0.01)

    def start(self, plan: str) -> bool:
        """A new scheduler; False if it died before it was open."""
        self._lives += 1
        self.case.witness.parent.mkdir(exist_ok=True)
        self.case.witness.write_text("")
        self._channel, theirs = multiprocessing.Pipe()
        self.scheduler = self._child(scheduler_process, self.case, theirs, self._lives, plan)
        theirs.close()
        return self._answer() is not None

    def tell(self, *commands):
        """Results of commands that run at once, None if the scheduler dies over them."""
        self._channel.send((self.case.elapsed_us, commands))
        results = self._answer()
        for (name, *_), (_, value) in zip(commands, results or (), strict=False):
            if name == "round":
                self.seen = value
        return results

    def arm(self, plan: str) -> None:
        """Let the scheduler die in what it does next."""
        if self.tell(("arm", plan)):
            self.scheduler.plan = plan

    def die(self, *commands) -> None:
        """Kill the scheduler while it is busy with something."""
        self._channel.send((self.case.elapsed_us, commands))
        time.sleep(self.rng.uniform(0, 0.02))
        self.scheduler.killed_by_case = True
        self.scheduler.kill()

    def bury(self) -> None:
        """After a death: what is stored is what was committed, each time it is read."""
        case, child = self.case, self.scheduler
        point = _note_death(case, child)
        first, second = (asyncio.run(_load(case)) for _ in range(2))
        assert first == second, "two loads differ"
        found = fingerprint(first)
        expected = possible_fingerprints(case, point)
        assert found in expected, f"after {point}: not the state that was committed"
        case.fingerprint = found
        self.scheduler = None

    def _answer(self):
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not self._channel.poll(0.01):
                self.keep_ledger()
                assert time.monotonic() < deadline, "the scheduler does not answer"
            return self._channel.recv()
        except (EOFError, ConnectionResetError):
            while self.scheduler.alive():
                time.sleep(0.001)
            return None

    def _child(self, work, *arguments) -> Child:
        child = Child(work, *arguments)
        self.children.append(child)
        return child


async def _load(case: Case) -> State:
    lock_file = case.config.state_dir / "scheduler.lock"
    store = Store(case.config.scheduler_url, lock_file, on_fatal=lambda: None)
    await store.open()
    await store.close()
    return store.state


def _note_death(case: Case, child: Child, who: str = "") -> str:
    """Count a death that was meant; returns its point."""
    if child.status != -signal.SIGKILL:
        failures = case.home / "failures"
        text = failures.read_text()[-3000:] if failures.exists() else ""
        raise AssertionError(f"a process ended with {child.status}: {text}")
    case.kills += 1
    point = ANY_MOMENT if child.killed_by_case else child.plan.split(":")[0]
    case.points[who + point] = case.points.get(who + point, 0) + 1
    return point


WEIGHTS = {
    **{"order": 12, "again": 2, "renew": 4, "release": 3, "cancel": 1, "deposit": 2},
    **{"lose": 2, "back": 4, "replace": 2, "fail": 1, "drain": 1, "leave": 0.5},
    **{"open_pool": 2, "undeploy": 1, "reprice": 1, "publish": 2, "wait": 4},
    "report": 6,
}


class Script:
    """What tenants, providers and fate do, drawn from the seed.

    Each step moves the world, or returns commands for the scheduler, or does nothing.
    """

    def __init__(self, market: Market, point: str | None) -> None:
        self._market, self._case = market, market.case
        self._weights = Counter(WEIGHTS) + Counter(CAUSES.get(point))
        self._rng = market.case.random("script")
        self._deposits = 0
        self._orders: list[tuple[Order, bool]] = []
        self._offers = {offer.offer_id: offer for offer in OFFERS}

    def step(self) -> list[tuple]:
        (name,) = self._rng.choices(list(self._weights), list(self._weights.values()))
        return getattr(self, f"_{name}")() or []

    def missing_offers(self) -> list[tuple]:
        return [
            ("offer", o) for name, o in self._offers.items() if name not in self._seen("offers")
        ]

    def pause_s(self) -> float:
        """Mostly short; some leave no time to hold money ahead."""
        low, high = self._rng.choice(((0.1, 3), (0.1, 3), (5, 90), (5, 90), (90, 500), (600, 4000)))
        return round(self._rng.uniform(low, high), self._rng.choice((0, 1, 6)))

    def _order(self):
        rng, number = self._rng, len(self._orders)
        share = rng.random() < 0.5
        later = rng.random() < 0.3
        order = Order(
            order_id=f"order-{number}",
            tenant_id=rng.choice((RICH, POOR)),
            api_key_id="key",
            model=rng.choice(("tiny-qwen", "smollm2-135m")),
            engine="transformers",
            gpu_count=1 if share else rng.choice((1, 1, 2, 3)),
            gpu_milli=rng.choice((100, 250, 333, 500, 700)) if share else 1000,
            start=self._case.now + timedelta(seconds=rng.randint(1, 9000)) if later else None,
            term_s=rng.choice((rng.randint(10, 120), rng.randint(300, 3600), 7200, 14_400)),
            created_at=self._case.now,
            max_price_pico=rng.choice((None, None, 10**12)),
        )
        self._orders.append((order, rng.random() < 0.5))
        return [("order", *self._orders[-1])]

    def _again(self):
        """An order whose answer was lost, or not."""
        return self._orders and [("order", *self._rng.choice(self._orders[-4:]))]

    def _renew(self):
        return [("renew", name, self._rng.choice((60, 3600, 9000))) for name in self._one("leases")]

    def _release(self):
        return [("release", name) for name in self._one("leases")]

    def _cancel(self):
        return [("cancel_order", name, None) for name in self._one("waiting")]

    def _deposit(self):
        self.deposit(POOR, self._rng.choice(("0.5", "1.000000000001", "5")))

    def deposit(self, tenant: str, amount: str) -> None:
        self._deposits += 1
        transfer = deposit(amount, f"deposit-{self._deposits}", tenant)
        self._market.ask_ledger("transfer", transfer)
        self._case.deposited[tenant] += transfer.amount_pico

    def _lose(self):
        with self._case.cluster.opened() as world:
            busy = world.nodes & set(world.homes.values())
            for node_id in self._rng.sample(sorted(busy or world.nodes), min(1, len(world.nodes))):
                world.lose(node_id, dead=self._rng.random() < 0.5)

    def _back(self):
        with self._case.cluster.opened() as world:
            lost = sorted(set(self._offers) - world.nodes)
            if lost:
                world.back(self._rng.choice(lost))

    def _replace(self):
        with self._case.cluster.opened() as world:
            running = sorted(name for name, app in world.apps.items() if app.run is not None)
            if running:
                world.ready(self._rng.choice(running))

    def _fail(self):
        with self._case.cluster.opened() as world:
            if world.apps:
                world.fail(self._rng.choice(sorted(world.apps)))

    def _drain(self):
        return [("drain", node, self._rng.random() < 0.6) for node in self._one("offers")]

    def _leave(self):
        """Out by force, then in again."""
        return [
            command
            for node in self._one("offers")
            for command in (("leave", node, True), ("offer", self._offers[node]))
        ]

    def _reprice(self):
        for name in self._one("offers"):
            ask_pico = self._rng.choice((0, self._rng.randint(1, 2 * 10**12)))
            offer = replace(self._offers[name], ask_pico=ask_pico, priced_at=self._case.now)
            self._offers[name] = offer
            return [("offer", offer)]

    def _open_pool(self):
        model = self._rng.choice(("tiny-qwen", "smollm2-135m"))
        least = self._rng.randint(0, 2)
        bounds = Bounds(least, max(1, least + self._rng.randint(0, 2)), keep_alive_s=5.0)
        return [("open_pool", model, None, bounds, False)]

    def _report(self):
        """What a gateway says: pools grow, wake, drain and fall asleep by it."""
        asked = self._rng.choice((0, 0, 1, 200))
        pools = {
            model: PoolReport(asked, 0, {}, {}, frozenset(), {})
            for model in ("tiny-qwen", "smollm2-135m")
        }
        cold = {"tiny-qwen": 1} if self._rng.random() < 0.5 else {}
        return [("sync", GatewayReport("gw0", 1, pools, frozenset(), cold))]

    def _undeploy(self):
        return [("undeploy", name) for name in self._one("pools")]

    def _publish(self):
        self._market.ask_ledger("work")

    def _wait(self):
        pass

    def _seen(self, what):
        return self._market.seen[what]

    def _one(self, what):
        return self._rng.sample(self._seen(what), min(1, len(self._seen(what))))


def run_case(seed: int, home: Path, point: str | None = None) -> Case:
    """Run a seed; raises AssertionError with the seed if anything is lost, doubled or wrong."""
    home.mkdir(parents=True)
    case = Case(seed, home)
    market = Market(case)
    try:
        script = Script(market, point)
        _prepare(market, script)
        for _ in range(market.rng.randint(4, 6)):
            _live(market, script, point)
            case.pass_time(script.pause_s())
            for _ in range(market.rng.randint(0, 3)):
                script.step()  # the world moves on; nobody hears commands
        _finish(market, script)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        for child in market.children:
            child.kill()
    return case


def _prepare(market: Market, script: Script) -> None:
    for tenant, amount in ((RICH, "1000000"), (POOR, "4")):
        market.ask_ledger("create_tenant", tenant)
        script.deposit(tenant, amount)
    for provider in ("farmer", "smith"):
        market.ask_ledger("create_provider", provider)
    market.ask_ledger("add_rate_cards", catalog.default_rate_cards(), True)


def _live(market: Market, script: Script, point: str | None) -> None:
    """One life of the scheduler, from its start to its death or its close."""
    rng = market.rng
    chosen = point or rng.choice(POINTS)
    if chosen == "stranger-ended":  # there must be a stranger
        chosen = rng.choice(("lease-held", chosen))
    plan = f"{chosen}:{rng.randint(1, MOST.get(chosen, 1))}"
    opened = market.start(plan)
    for number in range(rng.randint(8, 50 if chosen in CAUSES else 25)):
        if not opened or not _step(market, script, number):
            return market.bury()
    if rng.random() < 0.3 and not _calm(market):
        return market.bury()
    if rng.random() < 0.2:
        return _closed_well(market) if market.tell(("close",)) else market.bury()
    if market.case.exact:
        market.arm(f"{rng.choice(POINTS[:2])}:{rng.randint(1, 9)}")
        while _step(market, script, number=1):
            pass
    else:
        market.die(("round",), *script.step())
    return market.bury()


def _step(market: Market, script: Script, number: int) -> bool:
    """False if the scheduler died."""
    if number > 0:
        market.case.pass_time(script.pause_s())
    commands = script.step() + (script.missing_offers() if number < 2 else [])
    if not market.case.exact and market.rng.random() < 0.5:
        return market.tell(("round",), *commands) is not None
    return all(market.tell(command) is not None for command in (*commands, ("round",)))


def _calm(market: Market) -> bool:
    """A few quiet rounds, after which everything must be in order. False if it died."""
    told = market.tell(("calm",))
    for seconds in (3, 60, 3):
        market.case.pass_time(seconds)
        told = told and market.tell(("round",))
    told = told and market.tell(("inspect",))
    if told:
        ((_, (state, differences)),) = told
        assert not differences, f"a calendar loaded from SQL differs: {differences}"
        check_state(market.case, state, market.ask_ledger("open_holds"))
    return bool(told)


def _closed_well(market: Market) -> None:
    child = market.scheduler
    while child.alive():
        time.sleep(0.001)
    assert child.status == 0, f"the scheduler closed with {child.status}"
    loaded = fingerprint(asyncio.run(_load(market.case)))
    assert {loaded} == possible_fingerprints(market.case, "")
    market.case.fingerprint = loaded


def _finish(market: Market, script: Script) -> None:
    """Bring everything to its end without further trouble, then check the books."""
    case = market.case
    market.spare_ledger()
    assert market.start("")
    market.tell(("calm",))
    market.tell(("round",))
    with case.cluster.opened() as world:
        for offer in OFFERS:
            world.back(offer.node_id)
    ends = [("offer", offer) for offer in OFFERS]
    ends += [("drain", offer.node_id, True) for offer in OFFERS]
    ends += [("undeploy", name) for name in market.seen["pools"]]
    for command in ends:
        market.tell(command)
    for _ in range(200):
        if not any(market.seen[what] for what in ("leases", "waiting", "deployments")):
            break
        for order_id in market.seen["waiting"]:
            market.tell(("cancel_order", order_id, None))
        case.pass_time(300)
        assert market.tell(("round",)), "the scheduler died"
    assert _calm(market)
    ((_, (state, _)),) = market.tell(("inspect",))
    assert market.tell(("close",))
    _closed_well(market)
    asyncio.run(harness._stop(case, market.ledger))
    check_end(case, state)
    asyncio.run(check_books(case))
    assert not case.errors.exists(), f"errors: {case.errors.read_text()[:3000]}"


# -- what must be right ---------------------------------------------------------------------


def check_state(case: Case, state: State, holds) -> None:
    """Holds, reasons and bookings of a market at rest."""
    held = defaultdict(set)
    for hold in holds:
        if hold.request.producer == PRODUCER:
            lease_id = hold.request.hold_id.rpartition("-hold-")[0]
            held[lease_id].add(hold.request.hold_id)
    for lease in state.leases.values():
        wanted = {lease.hold_id(n) for n in range(lease.ended_index + 1, lease.hold_index + 1)}
        found = held.pop(lease.lease_id, set())
        assert found == wanted, f"{lease.lease_id} has the holds {found}, not {wanted}"
        assert len(found) in ((0,) if _closed(lease) else (1, 2)), (lease, found)
    assert not held, f"holds of nobody: {dict(held)}"
    for order in state.orders.values():
        lease = state.leases.get(order.lease_id)
        matched = order.state is OrderState.MATCHED
        assert matched == (lease is not None), order
        assert matched or order.reason, f"{order.order_id} is {order.state} without a reason"
    orders = [lease.order_id for lease in state.leases.values()]
    assert len(set(orders)) == len(orders), "an order has two leases"
    _check_bookings(state, case.now)
    with case.cluster.opened() as world:
        assert not world.crowded, f"more ran on a GPU than fits: {world.crowded}"


def _check_bookings(state: State, now: datetime) -> None:
    """From now on nothing is promised twice; who waits for any GPU will get one."""
    fixed, floating = defaultdict(list), defaultdict(list)
    for lease in state.leases.values():
        span = (max(lease.start, now), lease.end, lease.gpu_milli)
        if not _closed(lease) and span[0] < span[1]:
            for index in lease.gpu_indices:
                fixed[lease.node_id, index].append(span)
            if not lease.gpu_indices:
                floating[lease.node_id].append(span)
    for replica in state.replicas.values():
        if replica.deployment_id not in state.leases and has_gpus(replica):
            for index in replica.place.gpu_indices:
                span = (now, datetime.max.replace(tzinfo=now.tzinfo), replica.place.gpu_milli)
                fixed[replica.place.node_id, index].append(span)
    for gpu, spans in fixed.items():
        assert _highest(spans) <= 1000, f"{gpu} is promised twice: {spans}"
    for offer in state.offers.values():
        spans = list(floating[offer.node_id])
        for gpu in offer.gpus:
            spans += [(s, e, 1000) for s, e, _ in fixed[offer.node_id, gpu.index]]
        waiting = floating[offer.node_id]
        for start, _, _ in waiting:
            busy = sum(
                any(s <= start < e for s, e, _ in fixed[offer.node_id, gpu.index])
                for gpu in offer.gpus
            )
            waits = sum(s <= start < e for s, e, _ in waiting)
            assert busy + waits <= len(offer.gpus), f"{offer.node_id} is promised twice"


def _highest(spans) -> int:
    """The most that (start, end, amount) add up to at any instant."""
    steps = [(s, n) for s, _, n in spans] + [(e, -n) for _, e, n in spans]
    level = highest = 0
    for _, amount in sorted(steps):  # at one instant ends come before starts
        level += amount
        highest = max(highest, level)
    return highest


def check_end(case: Case, state: State) -> None:
    """Nothing is left, and every lease is what the ledger's rows say of it."""
    left = (state.replicas, state.deployments, state.outbox)
    assert not any(left), f"left over: {left}"
    with case.cluster.opened() as world:
        assert not world.apps, f"still running: {world.apps}"
        assert not any(world.processes.values()), f"processes stay: {world.processes}"
    rows_by_lease = defaultdict(list)
    table = pq.read_table(case.config.ledger_dir / "usage", partitioning=None)
    for row in sorted(table.to_pylist(), key=lambda row: row["lsn"]):
        rows_by_lease[row["lease_id"]].append(row)
    busy = defaultdict(list)
    for lease in state.leases.values():
        assert _closed(lease), f"{lease.lease_id} is {lease.state}"
        dry = lease.close_reason is CloseReason.OUT_OF_FUNDS
        assert not (dry and lease.tenant_id == RICH), f"money was there: {lease}"
        for row in check_lease(case, lease, rows_by_lease.pop(lease.lease_id, []), world):
            busy[row["node_id"]].append((row["started_at"], row["finished_at"], row["gpu_milli"]))
    assert not rows_by_lease, f"rows of unknown leases: {list(rows_by_lease)}"
    for offer in OFFERS:
        assert _highest(busy[offer.node_id]) <= 1000 * len(offer.gpus), f"{offer.node_id} oversold"


def check_lease(case: Case, lease: Lease, rows, world: World):
    """All of its time is in the rows once, and its price follows; returns the charged rows."""
    at, healthy_us, credited_us, gpu_us, charged = lease.start, 0, 0, 0, 0
    served = defaultdict(list)
    for app_name, since_us, until_us in world.served.values():
        served[app_name.rpartition("-")[0]].append((since_us, until_us))
    runs = served[f"model-{lease.lease_id}"]
    paid = []
    for row in rows:
        assert row["started_at"] == at < row["finished_at"], f"a gap or overlap at {at}: {lease}"
        at = row["finished_at"]
        long_us = (at - row["started_at"]) // MICRO
        gpu_us += row["gpu_us"]
        charged += int(row["charge"].scaleb(12))
        credit_us = int(dict(row["attrs"] or ()).get("credited_us", 0))
        assert credit_us in (0, long_us), row
        if credit_us:
            assert (row["gpu_us"], row["charge"]) == (0, 0), row
            credited_us += credit_us
            continue
        healthy_us += long_us
        since, until = ((row[name] - START) // MICRO for name in ("started_at", "finished_at"))
        ran = any(s <= since and until <= (e or case.elapsed_us) for s, e in runs)
        assert ran, f"charged from {since} to {until}, served in {runs}: {lease}"
        paid.append(row)
    assert at == lease.end, f"rows end at {at}: {lease}"
    total_milli = lease.gpu_count * lease.gpu_milli
    recomputed = (healthy_us, credited_us, gpu_us, charged)
    assert gpu_us == healthy_us * total_milli // 1000, (recomputed, lease)
    assert charged == gpu_us * lease.gpu_hour_pico // GPU_US_PER_HOUR, (recomputed, lease)
    said = (lease.healthy_us, lease.credited_us, lease.gpu_us, lease.charged_pico)
    assert said == recomputed, f"the lease says {said}, its rows {recomputed}: {lease}"
    counted = {"charged_s": healthy_us // 10**6, "credited_s": credited_us // 10**6}
    case.counts.update(leases=1, segments=len(rows), **counted)
    return paid


async def check_books(case: Case) -> None:
    """Balances are deposits less charges, nothing is held, and the ledger verifies."""
    table = pq.read_table(case.config.ledger_dir / "usage", partitioning=None)
    charged, earned = Counter(), Counter()
    for row in table.select(["tenant_id", "provider_id", "charge"]).to_pylist():
        charged[row["tenant_id"]] += int(row["charge"].scaleb(12))
        earned[row["provider_id"]] += int(row["charge"].scaleb(12))
    ledger = TorturedLedger(case)
    await ledger.open()
    accounts = {account.account_id: account for account in await ledger.accounts()}
    assert all(a.held_pico == 0 for a in accounts.values()), "money stays held"
    assert not await ledger.open_holds()
    for tenant, deposited_pico in case.deposited.items():
        left_pico = accounts[f"tenant:{tenant}"].balance_pico
        assert 0 <= left_pico == deposited_pico - charged[tenant], (tenant, left_pico)
    for provider, earned_pico in earned.items():
        assert accounts[f"provider:{provider}"].balance_pico == earned_pico, provider
    report = await ledger.verify()
    assert report["finding"] is None, report["finding"]
    await ledger.close()
