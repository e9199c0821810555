"""A gateway's core over fakes, for tests of the story and of what speaks HTTP around it."""

from market.fakes import DirectGrants, DirectSink, FakeClock, FakeRoutes, MemoryLedger
from market.inference import Inference
from market.metering import Ask
from market.queueing import Queues
from market.routing import Choice
from market.slicing import Slices
from market.types import Sampling
from tests.samples import ACME, CARD, ROUTE, deposit

PROMPT = tuple(range(10))


class Gateway:
    """One gateway; several may share a ledger and a clock."""

    def __init__(self, engine, ledger=None, clock=None, name="gw0", routes=FakeRoutes):
        self.engine = engine
        self.clock = clock or FakeClock()
        self.ledger = ledger or MemoryLedger(self.clock)
        self.sink = DirectSink(self.ledger, name)
        self.grants = DirectGrants(self.ledger)
        self.slices = Slices(self.clock, self.grants, self.ledger, self.sink)
        self.queues = Queues(self.clock)
        self.routes = routes(ROUTE, CARD, engine)
        self.inference = Inference(self.clock, self.slices, self.queues, self.sink, self.routes)

    async def start(self):
        await self.sink.start()
        return self

    async def ask(self, max_tokens=5, principal=ACME, prompt=PROMPT, **more):
        route = await self.routes.route("tiny", principal)
        prompts = more.pop("prompts", (prompt,))
        return await self.inference.admit(
            principal, Choice(route), Ask(prompts, Sampling(max_tokens), **more)
        )

    async def answer(self, **asked):
        admission = await self.ask(**asked)
        return [event async for event in self.inference.stream(admission)]

    async def rest(self):
        """Everything recorded, all money given back."""
        await self.inference.drain()
        await self.slices.close()

    async def settled(self):
        """(the one record, balance in pico) after everything came to rest."""
        await self.rest()
        account = await self.ledger.balance("acme")
        assert account.held_pico == 0, "money is still set aside"
        assert len(self.ledger.records) == 1
        return self.ledger.records[0], account.balance_pico


async def prepared(balance="1", clock=None):
    """A ledger with the tenant acme."""
    ledger = MemoryLedger(clock or FakeClock())
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    if balance != "0":
        await ledger.transfer(deposit(balance))
    return ledger


async def gateway(engine, balance="1"):
    clock = FakeClock()
    return await Gateway(engine, await prepared(balance, clock), clock).start()
