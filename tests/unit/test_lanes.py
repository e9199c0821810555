"""Rules of tenants over what a gateway sees: where each request goes, and where else."""

import contextlib
from dataclasses import replace

import pytest

from market import routing
from market.catalog import find
from market.errors import InvalidRequest, NoCapacity, NotFound
from market.pricing import make_rate_card
from market.routing import Load, Query, Reason
from market.types import Budget, KeyPolicy, Lane, LanePolicy, NotReady, Period, Rule
from serve_apps import lanes
from serve_apps.lanes import Lanes
from tests.samples import ACME, CARD, NOON, ROUTE

SMALL, BIG = "tiny-qwen", "qwen-7b"
IDLE, FULL = Load(0, 0, 16), Load(16, 40, 16, finished_per_s=1.0)
CARDS = {
    SMALL: CARD,
    BIG: make_rate_card(BIG, (1_000_000, 500_000, 4_000_000), NOON, "USD"),
}
HYBRID = Rule(SMALL, "acme", "lease-1", LanePolicy(2.0, spill_pico=5), lease_id="lease-1")
AUTO = Rule("smart", "acme", "smart-1", LanePolicy(2.0, cheap=SMALL, strong=BIG))
COLD = NotReady(SMALL, "pool", None, "cold", wakes=True)


def own(model=SMALL):
    return replace(ROUTE, model=model, lane=Lane.LEASE, lease_id="lease-1", app_name="own")


def pool(model=SMALL):
    return replace(ROUTE, model=model, app_name=f"pool-{model}")


class FakeLive:
    """What LiveRoutes shows; a pool that is woken is there."""

    model = staticmethod(find)

    def __init__(self, *rules, leases=(), pools=()):
        self.known = rules
        self.leases = {route.model: route for route in leases}
        self.pools = {entry.model: entry for entry in pools}
        self.woken, self.news, self.lease_first = [], None, False

    def rules(self, tenant_id):
        return [rule for rule in self.known if rule.tenant_id == tenant_id]

    def rule(self, model, principal):
        found = [rule for rule in self.rules(principal.subject_id) if rule.model == model]
        return found[0] if found else None

    def own(self, model, principal):
        return self.leases.get(model)

    def pool(self, model, principal, lane):
        found = self.pools.get(model)
        return found if isinstance(found, NotReady | None) else replace(found, lane=lane)

    async def look(self):
        await self.refresh()

    async def refresh(self):
        self.known, self.leases = self.news if self.news else (self.known, self.leases)

    async def awake(self, model, principal, lane=Lane.TOKENS, enough=lambda: False):
        self.woken.append(model)
        if self.lease_first:
            self.leases[model] = own(model)
            assert enough()
            return
        self.pools[model] = pool(model)

    async def route(self, model, principal):
        if model not in CARDS:
            await self.refresh()
            raise NotFound(f"model {model} is not served")
        rule = self.rule(model, principal)
        if rule is not None and rule.lease_id is not None and model not in self.leases:
            raise NoCapacity(f"model {model} is not ready")  # its lease comes before the pool
        if isinstance(self.pools.get(model), NotReady):
            await self.awake(model, principal)
        if self.leases.get(model) is None and self.pools.get(model) is None:
            raise NoCapacity(f"model {model} is not ready")
        return self.leases.get(model) or self.pools[model]

    async def rate_card(self, model):
        return CARDS[model]

    def cold(self):
        return {}


class Words:
    """Requests are as hard as they say."""

    usual = (0.2, 0.4, 0.6, 0.8)

    def score(self, text):
        return float(text)


class World:
    def __init__(self, *rules, leases=(), pools=(), **loads):
        self.live = FakeLive(*rules, leases=leases, pools=pools)
        self.loads = loads
        self.lanes = Lanes(self.live, self.load, Words())

    def load(self, name, places):
        return self.loads.get(name.replace("-", "_"), IDLE)

    async def choose(self, model=SMALL, principal=ACME, text="0.1", **query):
        return await self.lanes.choose(
            model, principal, lambda: Query(text, query.pop("tokens", 5), **query)
        )


class TestHybrid:
    def world(self, **loads):
        return World(HYBRID, leases=[own()], pools=[pool()], **loads)

    async def test_goes_to_its_lease_and_to_the_pool_if_that_fails(self):
        choice = await self.world().choose()
        assert (choice.route.lane, choice.reason, choice.cap) == (Lane.LEASE, Reason.OWN, None)
        assert choice.otherwise.route.lane is Lane.SPILL
        assert choice.otherwise.reason is Reason.FALLBACK

    async def test_spills_within_its_budget_and_falls_back_on_the_lease(self):
        choice = await self.world(lease_1=FULL).choose()
        assert (choice.route.lane, choice.route.app_name) == (Lane.SPILL, f"pool-{SMALL}")
        assert choice.reason is Reason.QUEUE
        assert choice.cap == Budget("spill:lease-1", Period.DAY, 5)
        assert ("spilled_from", "lease-1") in choice.attrs
        assert choice.otherwise.route.lane is Lane.LEASE

    async def test_is_back_at_once(self):
        world = self.world(lease_1=FULL)
        await world.choose()
        world.loads["lease_1"] = IDLE
        assert (await world.choose()).route.lane is Lane.LEASE

    async def test_key_that_may_not_spill_waits(self):
        key = replace(ACME, policy=KeyPolicy(lanes=(Lane.LEASE,)))
        choice = await self.world(lease_1=FULL).choose(principal=key)
        assert (choice.route.lane, choice.otherwise) == (Lane.LEASE, None)

    async def test_wakes_a_cold_pool_for_those_that_come_next(self):
        world = World(HYBRID, leases=[own()], pools=[COLD], lease_1=FULL)
        assert (await world.choose()).route.lane is Lane.LEASE
        for task in list(world.lanes._waking.values()):
            await task
        assert world.live.woken == [SMALL]
        assert (await world.choose()).route.lane is Lane.SPILL

    async def test_waits_for_a_cold_pool_if_its_lease_does_not_serve(self):
        world = World(HYBRID, pools=[COLD])
        choice = await world.choose()
        assert (choice.route.lane, choice.reason) == (Lane.SPILL, Reason.NOT_READY)
        assert world.live.woken == [SMALL]

    async def test_lease_that_is_there_before_the_pool_serves(self):
        world = World(HYBRID, pools=[COLD])
        world.live.lease_first = True
        choice = await world.choose()
        assert (choice.route.lane, choice.reason) == (Lane.LEASE, Reason.OWN)

    async def test_key_that_may_not_spill_wakes_nothing(self):
        world = World(HYBRID, pools=[COLD])
        with pytest.raises(NoCapacity):
            await world.choose(principal=replace(ACME, policy=KeyPolicy(lanes=(Lane.LEASE,))))
        assert world.live.woken == []

    async def test_without_a_budget_nothing_spills_nor_wakes(self):
        never = replace(HYBRID, policy=replace(HYBRID.policy, spill_pico=0))
        choice = await World(never, leases=[own()], pools=[pool()], lease_1=FULL).choose()
        assert (choice.route.lane, choice.otherwise) == (Lane.LEASE, None)
        for more in ({}, {"leases": [own()]}):
            world = World(never, pools=[COLD], lease_1=FULL, **more)
            with contextlib.suppress(NoCapacity):
                await world.choose()
            assert (world.live.woken, world.lanes._waking) == ([], {})
        with pytest.raises(NoCapacity):
            await World(never, pools=[pool()]).choose()

    async def test_pool_is_not_started_for_spills_whose_budget_is_spent(self, monkeypatch):
        cold, warm = World(HYBRID, pools=[COLD]), World(HYBRID, pools=[pool()])
        for world in (cold, warm):
            world.lanes.spent(routing.spill_cap(HYBRID))
        with pytest.raises(NoCapacity):
            await cold.choose()
        assert cold.live.woken == []
        assert (await warm.choose()).route.lane is Lane.SPILL  # a small one may yet fit
        monkeypatch.setattr(lanes, "SPENT_S", -1.0)
        cold.lanes.spent(routing.spill_cap(HYBRID))
        assert (await cold.choose()).route.lane is Lane.SPILL

    async def test_says_so_if_nothing_serves(self):
        with pytest.raises(NoCapacity):
            await World(HYBRID).choose()

    async def test_lease_that_serves_since_a_moment_is_seen(self):
        world = World(HYBRID, pools=[pool()])
        world.live.news = (HYBRID,), {SMALL: own()}
        assert (await world.choose()).route.lane is Lane.LEASE

    async def test_others_do_not_know_the_rule(self):
        other = replace(ACME, subject_id="other")
        assert (await self.world(lease_1=FULL).choose(principal=other)).reason is None


class TestAuto:
    def world(self, *rules, **more):
        return World(*(rules or (AUTO,)), pools=[pool(SMALL), pool(BIG)], **more)

    async def test_easy_ones_go_to_the_cheap_model_hard_ones_to_the_strong(self):
        world = self.world()
        easy, hard = [await world.choose("smart", text=text) for text in ("0.3", "0.7")]
        assert (easy.route.model, easy.reason) == (SMALL, Reason.SIMPLE)
        assert (hard.route.model, hard.reason) == (BIG, Reason.COMPLEX)
        assert easy.not_taken == CARDS[BIG]
        assert hard.not_taken == CARD
        assert easy.attrs == (("auto", "smart"),)

    async def test_cost_target_sets_how_many_are_hard(self):
        dear = replace(AUTO, policy=replace(AUTO.policy, cost_target=1.0))
        thrifty = replace(AUTO, policy=replace(AUTO.policy, cost_target=0.1))
        assert (await self.world(dear).choose("smart", text="0.0")).route.model == BIG
        assert (await self.world(thrifty).choose("smart", text="0.8")).route.model == SMALL

    async def test_tools_and_long_prompts_need_the_strong_one(self):
        world = self.world()
        tools = await world.choose("smart", tools=True)
        assert (tools.reason, tools.route.model, tools.otherwise) == (Reason.TOOLS, BIG, None)
        assert (await world.choose("smart", tokens=10**6)).reason is Reason.LONG

    async def test_hybrids_budget_holds_for_what_is_dealt_to_its_model(self):
        world = World(AUTO, HYBRID, leases=[own()], pools=[pool(SMALL), pool(BIG)])
        world.loads["lease_1"] = FULL
        choice = await world.choose("smart", text="0.1")
        assert (choice.route.lane, choice.cap.limit_pico) == (Lane.SPILL, 5)
        assert choice.attrs == (("auto", "smart"), ("spilled_from", "lease-1"))

    @pytest.mark.parametrize(("pin", "model"), [("cheap", SMALL), ("strong", BIG)])
    async def test_pinned(self, pin, model):
        choice = await self.world().choose(f"smart:{pin}", text="0.5")
        assert (choice.route.model, choice.reason) == (model, Reason.PINNED)
        assert choice.otherwise is None

    async def test_pinned_ones_are_not_looked_at(self):
        def unreadable():
            raise InvalidRequest("token ids are those of one model")

        choice = await self.world().lanes.choose("smart:cheap", ACME, unreadable)
        assert choice.route.model == SMALL
        with pytest.raises(InvalidRequest, match="one model"):
            await self.world().lanes.choose("smart", ACME, unreadable)

    async def test_sleeping_pool_of_a_hybrid_wakes_within_its_budget(self):
        choice = await World(AUTO, HYBRID, pools=[COLD]).choose("smart:cheap")
        assert (choice.route.lane, choice.cap.limit_pico) == (Lane.SPILL, 5)
        assert choice.attrs == (("auto", "smart"), ("spilled_from", "lease-1"))

    async def test_sleeping_pool_is_woken_while_the_lease_is_too_slow(self):
        rule = replace(AUTO, model=SMALL, policy=LanePolicy(2.0))
        world = World(rule, leases=[own()], pools=[COLD], lease_1=FULL)
        assert (await world.choose()).reason is Reason.FASTEST
        for task in list(world.lanes._waking.values()):
            await task
        assert (await world.choose()).reason is Reason.CHEAPEST

    async def test_unknown_pin(self):
        with pytest.raises(InvalidRequest, match=":cheap or :strong"):
            await self.world().choose("smart:best")

    async def test_own_lease_first_if_it_is_fast_enough(self):
        rule = replace(AUTO, model=SMALL, policy=LanePolicy(2.0))
        world = World(rule, leases=[own()], pools=[pool()])
        choice = await world.choose()
        assert (choice.route.lane, choice.reason) == (Lane.LEASE, Reason.OWN)
        assert choice.not_taken == CARD
        world.loads["lease_1"] = FULL
        choice = await world.choose()
        assert (choice.route.lane, choice.reason) == (Lane.TOKENS, Reason.CHEAPEST)
        assert (choice.cap, choice.not_taken) == (None, None)

    async def test_easy_ones_go_to_the_strong_one_while_the_cheap_one_is_slow(self):
        choice = await self.world(tiny_qwen=FULL).choose("smart", text="0.1")
        assert choice.route.model == BIG

    async def test_cheap_one_that_sleeps_is_woken_and_the_strong_one_serves(self):
        world = World(AUTO, pools=[COLD, pool(BIG)])
        assert (await world.choose("smart", text="0.1")).route.model == BIG
        for task in list(world.lanes._waking.values()):
            await task
        assert (await world.choose("smart", text="0.1")).route.model == SMALL

    async def test_price_not_taken_is_there_though_the_model_had_to_start(self):
        choice = await World(AUTO, pools=[COLD, pool(BIG)]).choose("smart:cheap")
        assert (choice.reason, choice.not_taken) == (Reason.PINNED, CARDS[BIG])

    async def test_failure_of_one_is_served_by_the_other(self):
        world = self.world()
        easy, hard = [(await world.choose("smart", text=t)).otherwise for t in ("0.1", "0.9")]
        assert (easy.route.model, hard.route.model) == (BIG, SMALL)
        assert (easy.not_taken, hard.not_taken) == (CARD, CARDS[BIG])
        assert easy.attrs == hard.attrs == (("auto", "smart"),)

    async def test_pool_of_a_hybrid_that_never_spills_is_not_woken_for_the_cheap_model(self):
        never = replace(HYBRID, policy=replace(HYBRID.policy, spill_pico=0))
        world = World(AUTO, never, pools=[COLD, pool(BIG)])
        assert (await world.choose("smart", text="0.1")).route.model == BIG
        assert world.lanes._waking == {}

    async def test_name_that_is_known_since_a_moment(self):
        world = World(pools=[pool(SMALL), pool(BIG)])
        world.live.news = (AUTO,), {}
        assert (await world.choose("smart", text="0.1")).route.model == SMALL
        with pytest.raises(NotFound):
            await world.choose("other")

    async def test_names_and_models_behind_them(self):
        lanes = self.world().lanes
        assert lanes.names(ACME) == ["smart"]
        assert lanes.models("smart", ACME) == lanes.models("smart:cheap", ACME) == (SMALL, BIG)
        assert lanes.models(SMALL, ACME) == (SMALL,)
