"""A seeded world of gateways, a scheduler and a ledger in virtual time, with everything that dies.

Gateways run the real admission, slices, queues and shares; the books are the fake ledger's (its
contract is the real one's), the engine's answers come in blocks. Calls take time, are lost on the
way there or back; gateways are killed with their slices open and come back with what they had on
disk; the ledger and the scheduler go away and return. Nobody's account may ever be below zero, and
in the end every hold is resolved and every answer that was recorded is paid for exactly.
"""

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta

from market import accounts as rules
from market.accounts import HoldState
from market.credit import within
from market.errors import EngineFailed, MarketError, MarketFault, Overloaded
from market.fakes import FakeClock, FakeRoutes, MemoryLedger
from market.inference import Inference
from market.metering import Ask
from market.queueing import Queues
from market.routing import Choice
from market.scheduler.shares import GatewayReport, Shares
from market.slicing import Slices
from market.types import (
    EngineChunk,
    FinishReason,
    Principal,
    Role,
    RouteTable,
    Sampling,
    TokenCounts,
    UsageQuality,
)
from tests.samples import CARD, NOON, ROUTE, deposit

GATEWAYS = ("gw0", "gw1", "gw2")
# Deposits in pico units: one is rich, one can pay for a few hundred requests, two for a handful.
MONEY = {"rich": "1000", "middling": "0.5", "poor": "0.004", "poorer": "0.001"}
PLACES = 40
TOKEN_S = 0.001


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nobody has anything to do; a world that waits for nothing is an error.

    Loops schedule by ``time()``, so it is enough to jump to the next timer.
    """

    def __init__(self) -> None:
        self._virtual_s = 0.0
        super().__init__()

    def time(self) -> float:
        """Seconds since the world began."""
        return self._virtual_s

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [t for t in self._scheduled if not t.cancelled()]  # type: ignore[attr-defined]
            assert timers, "everybody waits and nothing will happen"
            self._virtual_s = max(self._virtual_s, min(timer.when() for timer in timers))
        super()._run_once()  # type: ignore[misc]


class WorldClock(FakeClock):
    """The loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self):
        return NOON + timedelta(seconds=self.monotonic())


class Engine:
    """Answers in blocks of random size; stops early or fails now and then."""

    def __init__(self, rng):
        self._rng = rng

    def generate(self, request, credit):
        return within(self._chunks(request), credit)

    async def _chunks(self, request):
        rng, produced = self._rng, 0
        end = rng.choice((1.0, rng.random())) * request.sampling.max_tokens
        fails_at = rng.random() * 3000 if rng.random() < 0.02 else None
        cached = rng.randint(0, len(request.prompt_token_ids)) if rng.random() < 0.3 else 0
        while True:
            size = min(rng.randint(1, 200), request.sampling.max_tokens - produced)
            await asyncio.sleep(size * TOKEN_S)
            produced += size
            if fails_at is not None and produced > fails_at:
                raise EngineFailed("the world's engine broke")
            counts = TokenCounts(len(request.prompt_token_ids), cached, produced)
            finish = None
            if produced >= request.sampling.max_tokens:
                finish = FinishReason.LENGTH
            elif produced >= end:
                finish = FinishReason.STOP
            yield EngineChunk("x", tuple(range(size)), counts, finish)
            if finish is not None:
                return


class Wire:
    """Calls from a gateway to ledger and scheduler: slow, lost, or to nobody."""

    def __init__(self, world):
        self._world = world
        self.dead = False

    async def call(self, target, function, *arguments):
        await self._travel()
        self._world.require_up(target)
        if self._world.rng.random() < self._world.loss:
            raise Overloaded("lost on the way there", retry_after_s=1)
        answer = await function(*arguments)
        await self._travel()
        if self._world.rng.random() < self._world.loss:
            self._world.seen["answers lost"] += 1
            raise Overloaded("lost on the way back", retry_after_s=1)
        return answer

    async def _travel(self):
        await asyncio.sleep(self._world.rng.random() * 0.01)
        if self.dead:
            await asyncio.get_running_loop().create_future()  # its process is gone


class Sink:
    """What a gateway has on disk (spool and requests under way), and the pump that sends it.

    The process writes while it lives; the disk stays.
    """

    def __init__(self, wire, ledger, name):
        self._wire, self._ledger, self._name = wire, ledger, name
        self._epoch = self._requests = 0
        self.spool = []
        self.booked = 0
        self.under_way = {}

    async def start(self):
        self._epoch = await self._ledger.register_producer(self._name)

    def identity(self):
        return self._name, self._epoch

    @property
    def next_seq(self):
        return len(self.spool)

    def next_request_id(self):
        self._requests += 1
        return f"req-{self._name}-{self._epoch}-{self._requests}"

    def begin(self, record):
        if not self._wire.dead:
            self.under_way[record.request_id] = record

    async def record(self, record):
        if not self._wire.dead:
            self.spool.append(record)
            self.under_way.pop(record.request_id, None)
        return record

    async def pump_forever(self):
        while not self._wire.dead:
            await asyncio.sleep(0.05)
            if self.booked < len(self.spool):
                try:
                    await self._wire.call("ledger", self.send)
                except Overloaded:
                    continue

    async def send(self):
        """Book what is in the spool; again is harmless."""
        records = self.spool[self.booked :]
        seq = await self._ledger.append_records(self._name, self._epoch, self.booked, records)
        self.booked = max(self.booked, seq)

    async def flush(self):
        while self.booked < len(self.spool):
            await asyncio.sleep(0.05)

    async def recover(self):
        """After the process died: the spool, then a free record for what was under way."""
        await self.send()
        self.spool += list(self.under_way.values())
        self.under_way.clear()
        await self.send()


class Gateway:
    """One process: all of it is lost when it is killed, except its sink's disk."""

    def __init__(self, world, name):
        self.name = name
        self._world = world
        self.wire = Wire(world)
        self.sink = Sink(self.wire, world.ledger, name)
        clock = world.clock
        self.slices = Slices(clock, self, self, self.sink)
        self.queues = Queues(clock)
        self.routes = FakeRoutes(ROUTE, CARD, world.engine)
        self.inference = Inference(clock, self.slices, self.queues, self.sink, self.routes)
        self._tasks = []

    async def start(self):
        await self.sink.start()
        loops = (
            self.sink.pump_forever(),
            self._exchange_forever(),
            self.slices.keep_house_forever(),
        )
        self._tasks = [self._world.spawn(loop) for loop in loops]

    async def grant(self, ask):
        self._world.seen["grants"] += 1
        return await self.wire.call("scheduler", lambda: self._world.shares.grant(ask))

    async def resize_hold(self, *arguments):
        self._world.seen["returns"] += 1
        return await self.wire.call("ledger", self._world.ledger.resize_hold, *arguments)

    async def end_hold(self, *arguments):
        return await self.wire.call("ledger", self._world.ledger.end_hold, *arguments)

    async def _exchange_forever(self):
        while not self.wire.dead:
            await asyncio.sleep(0.5)
            try:
                orders = await self.wire.call("scheduler", self._sync)
            except Overloaded:
                continue
            self.queues.take_shares(orders.pools.items())
            self.slices.recall(orders.recalls)

    async def _sync(self):
        report = GatewayReport(*self.sink.identity(), self.queues.reports(), frozenset())
        return self._world.shares.sync(report, self._world.table)

    async def rest(self):
        """An orderly end."""
        await self.inference.drain()
        await self.sink.flush()
        for task in self._tasks:
            task.cancel()
        for _ in range(100):  # the network loses calls; whoever ends tries again
            try:
                await self.slices.close()
                return
            except Overloaded:
                await asyncio.sleep(0.1)
        raise AssertionError("the slices could not be given back")


class World:
    """Everything, from one seed. ``loss``: share of calls that are lost each way."""

    def __init__(self, seed, loss=0.01):
        self.rng = random.Random(seed)
        self.loss = loss
        self.seen = Counter()
        self.clock = WorldClock()
        self.ledger = MemoryLedger(self.clock)
        self.engine = Engine(self.rng)
        self.table = RouteTable((replace(ROUTE, places=PLACES),), ())
        self.shares = Shares(self.clock, self)
        self.down = set()
        self.gateways = {}
        self.tasks = set()

    # The scheduler's way to the ledger.

    async def open_hold(self, request):
        self.require_up("ledger")
        return await self.ledger.open_hold(request)

    async def resize_hold(self, producer, epoch, change):
        self.require_up("ledger")
        return await self.ledger.resize_hold(producer, epoch, change)

    def require_up(self, target):
        if target in self.down:
            raise Overloaded(f"the {target} is away", retry_after_s=1)

    async def prepare(self):
        await self.ledger.create_provider("local")
        await self.ledger.add_rate_cards([CARD], only_new_models=False)
        for tenant, amount in MONEY.items():
            await self.ledger.create_tenant(tenant)
            await self.ledger.transfer(deposit(amount, f"deposit-{tenant}", tenant))
        for name in GATEWAYS:
            await self.boot(name)

    async def boot(self, name):
        gateway = Gateway(self, name)
        self.gateways[name] = gateway
        await gateway.start()

    def spawn(self, work):
        """A task that may not fail."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        return task

    async def client(self):
        """One request, whoever it is from, to a gateway that lives."""
        rng = self.rng
        tenant = rng.choice(tuple(MONEY))
        gateway = self.gateways.get(rng.choice(GATEWAYS))
        if gateway is None:
            return
        principal = Principal(f"key-{tenant}", Role.TENANT, tenant)
        prompts = tuple(tuple(range(rng.randint(1, 80))) for _ in range(rng.choice((1, 1, 1, 2))))
        ask = Ask(prompts, Sampling(rng.choice((1, 20, 300, 900))), answers=rng.choice((1, 1, 3)))
        self.seen["admissions"] += 1
        try:
            admission = await gateway.inference.admit(principal, Choice(ROUTE), ask)
        except MarketFault:
            raise  # a bug
        except MarketError as error:
            self.seen[f"refused {error.code}"] += 1
            return
        leaves_after = rng.randint(0, 8) if rng.random() < 0.1 else None
        events = 0
        try:
            async with aclosing(gateway.inference.stream(admission)) as stream:
                async for _ in stream:
                    events += 1
                    if leaves_after is not None and events > leaves_after:
                        self.seen["hang-ups"] += 1
                        return
            self.seen["completions"] += 1
        except MarketFault:
            raise  # a bug
        except MarketError as error:
            self.seen[f"failed {error.code}"] += 1

    async def kill_and_restart(self, name):
        gateway = self.gateways.pop(name)
        gateway.wire.dead = True
        self.seen["crashes"] += 1
        self.seen["under way at a crash"] += len(gateway.sink.under_way)
        await asyncio.sleep(self.rng.random() * 3)
        await self.recover(gateway)
        await self.boot(name)

    async def recover(self, gateway):
        """As a gateway does that takes over the slot."""
        while "ledger" in self.down:
            await asyncio.sleep(0.1)
        await gateway.sink.recover()

    async def outage(self, target):
        self.seen[f"{target} outages"] += 1
        self.down.add(target)
        await asyncio.sleep(self.rng.random() * 2)
        if target == "scheduler":  # all that it knew of gateways is gone
            self.shares = Shares(self.clock, self)
        self.down.discard(target)

    async def run(self, requests):
        """So many requests, and what happens besides; then everything comes to rest."""
        both = {asyncio.create_task(self._run(requests)), asyncio.create_task(self._watch())}
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _run(self, requests):
        await self.prepare()
        clients = set()
        trouble = set()
        for _ in range(requests):
            # Bursts and lulls: slices are grown and returned, queues fill and empty.
            await asyncio.sleep(self.rng.choice((0.0, 0.002, 0.01)))
            if self.rng.random() < 0.0005:
                await asyncio.sleep(self.rng.random() * 40)
            clients.add(task := self.spawn(self.client()))
            task.add_done_callback(clients.discard)
            chance = self.rng.random()
            if chance < 0.0007 and len(self.gateways) > 1:
                name = self.rng.choice(tuple(self.gateways))
                trouble.add(asyncio.create_task(self.kill_and_restart(name)))
            elif chance < 0.001 and not self.down:
                trouble.add(asyncio.create_task(self.outage("ledger")))
            elif chance < 0.0013 and not self.down:
                trouble.add(asyncio.create_task(self.outage("scheduler")))
        await asyncio.gather(*trouble)
        # Clients of gateways that were killed wait for ever, as their connections are gone.
        if clients:
            await asyncio.wait(clients, timeout=120)
        for gateway in self.gateways.values():
            await gateway.rest()
        await self.check()

    async def _watch(self):
        while True:
            await asyncio.sleep(0.1)
            self._check_slices()
            ended = {task for task in self.tasks if task.done()}
            self.tasks -= ended
            for task in ended:
                if not task.cancelled():
                    task.result()
            for account in await self.ledger.accounts():
                assert account.may_overdraw or account.available_pico >= 0, account

    def _check_slices(self):
        """What a gateway believes to have is never more than the ledger holds for it."""
        for gateway in self.gateways.values():
            for purse in gateway.slices._purses.values():
                for part in purse.slices():
                    if part.is_open:
                        hold = self.ledger.hold(part.slice_id)
                        assert part.granted_pico <= hold.amount_pico, (part, hold)
                    assert part.free_pico >= 0, part

    async def check(self):
        """Every hold is resolved, every record paid for, nothing else is."""
        books = self.ledger
        open_holds = [hold for hold in await books.open_holds() if hold.state is HoldState.PENDING]
        assert not open_holds, open_holds[:3]
        charged = Counter()
        for record in books.records:
            charged[record.tenant_id] += record.charge_pico
            if record.usage_quality is UsageQuality.RECOVERED:
                assert record.charge_pico == 0
        names = Counter(record.request_id for record in books.records)
        assert max(names.values(), default=1) == 1, names.most_common(1)
        for tenant in MONEY:
            account = await books.balance(tenant)
            assert account.held_pico == 0, account
            assert account.balance_pico == account.credits_pico - charged[tenant], account
            assert account.balance_pico >= 0
        accounts = {account.account_id: account for account in await books.accounts()}
        earned = accounts[rules.provider_account("local")].balance_pico
        assert earned == sum(charged.values())


def run_world(seed, requests, loss=0.01):
    """Run a world to its end; returns what was seen. Raises AssertionError if anything is wrong."""
    loop = VirtualLoop()
    # Whatever a killed process had under way is simply gone.
    loop.set_exception_handler(lambda _loop, _context: None)
    try:
        world = World(seed, loss)
        loop.run_until_complete(world.run(requests))
        return world.seen
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        for _ in range(10):
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()
