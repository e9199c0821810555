"""The scheduler over real SQL, a ledger in memory and a cluster that does what the test says."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from market.errors import (
    Conflict,
    InsufficientBalance,
    InvalidKey,
    InvalidRequest,
    MarketError,
    NoCapacity,
    NotFound,
    PermissionDenied,
)
from market.scheduler.nodes import Proof
from market.types import (
    AppStatus,
    CloseReason,
    DeploymentState,
    Gpu,
    Lane,
    LanePolicy,
    LeaseState,
    Mode,
    OfferState,
    OrderState,
    RecordKind,
    ReplicaState,
)
from tests.boxes import FARM, HOUR, Box, lease, order, pool, states
from tests.samples import deposit


class TestPools:
    async def test_order_becomes_an_application_and_then_a_route(self, box):
        box.cluster.instant = False
        async with box.opened() as scheduler:
            deployment, (replica,) = await pool(scheduler)
            assert deployment.engine == "transformers"
            await box.rounds(scheduler)
            (waiting,) = (await scheduler.routes()).starting
            assert waiting.model == "tiny-qwen"
            box.cluster.ready()
            await box.rounds(scheduler)
            (route,) = (await scheduler.routes()).ready
            assert (route.app_name, route.provider_id) == (replica.app_name, "local")

    async def test_restart_keeps_what_was_ordered_and_disturbs_nothing(self, box):
        async with box.opened() as scheduler:
            await pool(scheduler)
            await box.rounds(scheduler, 1, 1)
            before = await scheduler.deployments()
            state = scheduler._core.state
        async with box.opened() as scheduler:
            assert scheduler._core.state == state
            await box.rounds(scheduler)
            assert await scheduler.deployments() == before
            assert len(box.cluster.started) == 1

    async def test_whole_cluster_lost_is_started_again(self, box):
        async with box.opened() as scheduler:
            await pool(scheduler)
            await box.rounds(scheduler, 1, 1)
            box.cluster.apps.clear()
            box.cluster.instant = False
            await box.rounds(scheduler)
            assert (await scheduler.routes()).ready == ()
            assert len(box.cluster.apps) == 1

    async def test_two_orders_at_once_become_one_deployment(self, box):
        async with box.opened() as scheduler:
            first, second = await asyncio.gather(pool(scheduler), pool(scheduler))
            assert first == second
            assert len(await scheduler.deployments()) == 1

    async def test_one_that_cannot_start_does_not_starve_the_others(self, box):
        async with box.opened() as scheduler:
            box.cluster.broken.add("smollm2-135m")
            await pool(scheduler, "smollm2-135m")
            _, (replica,) = await pool(scheduler)
            await box.rounds(scheduler)
            assert list(box.cluster.apps) == [replica.app_name]

    async def test_undeploy_removes_and_forgets(self, box):
        async with box.opened() as scheduler:
            await pool(scheduler)
            await box.rounds(scheduler)
            await scheduler.undeploy("tiny-qwen")
            await box.rounds(scheduler, 3, 1)
            assert (box.cluster.apps, await scheduler.deployments()) == ({}, [])
            with pytest.raises(NotFound):
                await scheduler.undeploy("tiny-qwen")

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"minimum": 0, "maximum": 0}, InvalidRequest),
            ({"engine": "magic"}, InvalidRequest),
            ({"model": "smollm2-360m"}, InvalidRequest),
            ({"model": "nothing-like-it"}, NotFound),
            ({"model": "qwen-7b"}, NoCapacity),
            ({"minimum": 60, "maximum": 60}, NoCapacity),
        ],
    )
    async def test_what_cannot_be_is_refused_and_changes_nothing(self, box, changes, error):
        async with box.opened() as scheduler:
            with pytest.raises(error):
                await pool(scheduler, **changes)
            assert await scheduler.deployments() == []

    async def test_other_terms_for_a_deployed_model_conflict(self, box):
        async with box.opened() as scheduler:
            await pool(scheduler)
            assert await pool(scheduler) == (await scheduler.deployments())[0]
            with pytest.raises(Conflict):
                await pool(scheduler, engine="vllm")

    async def test_failed_deployment_keeps_its_reason_until_it_is_removed(self, box):
        async with box.opened() as scheduler:
            _, (replica,) = await pool(scheduler)
            await box.rounds(scheduler)
            box.cluster.apps[replica.app_name] = AppStatus(None, True, "no memory")
            await box.rounds(scheduler)
            assert await states(scheduler) == [DeploymentState.FAILED]
            with pytest.raises(Conflict, match="no memory"):
                await pool(scheduler)

    async def test_replicas_are_applications_of_their_own_at_exact_places(self, farm):
        async with farm.opened() as scheduler:
            _, replicas = await pool(scheduler, minimum=3, maximum=3)
            assert {r.place.gpu_indices for r in replicas} <= {(0,), (1,)}
            await farm.rounds(scheduler, 10, 1)
            assert len((await scheduler.routes()).ready) == 3
            assert len(farm.cluster.apps) == 3


class TestLeases:
    async def test_life_is_charged_to_the_last_digit(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler)
            assert (booked.state, booked.gpu_hour_pico) == (LeaseState.PENDING, 10**12)
            assert (await farm.ledger.balance("acme")).held_pico == 10**12
            await farm.rounds(scheduler, 1, 0.5)
            assert (await scheduler.lease(booked.lease_id)).state is LeaseState.ACTIVE
            (route,) = (await scheduler.routes()).ready
            assert (route.lane, route.tenant_id, route.lease_id) == (
                "lease", "acme", booked.lease_id,
            )  # fmt: skip
            await farm.rounds(scheduler, 1800)
            await scheduler.release(booked.lease_id)
            await farm.rounds(scheduler, 5, 1)
            over = await scheduler.lease(booked.lease_id)
        rows = farm.ledger.records
        assert over.close_reason is CloseReason.RELEASED
        assert {row.kind for row in rows} == {RecordKind.GPU}
        assert sum(row.gpu_us for row in rows) == over.gpu_us
        assert over.gpu_us == over.healthy_us
        assert over.healthy_us + over.credited_us == 1_801_000_000
        assert await farm.charged() == over.gpu_us * 10**12 // (3_600 * 10**6)
        account = await farm.ledger.balance("acme")
        assert account.held_pico == 0
        assert account.balance_pico == 100 * 10**12 - over.charged_pico

    async def test_same_order_twice_is_one_lease(self, farm):
        async with farm.opened() as scheduler:
            first = await scheduler.order(order())
            assert await scheduler.order(order()) == first
            with pytest.raises(Conflict, match="another order"):
                await scheduler.order(order(term_s=60))
            assert len(await scheduler.leases()) == 1

    async def test_two_halves_share_a_gpu_and_a_full_node_says_why(self, farm):
        async with farm.opened() as scheduler:
            first = await lease(scheduler, 1, gpu_milli=500)
            second = await lease(scheduler, 2, gpu_milli=500, tenant_id="other")
            assert first.gpu_indices == second.gpu_indices
            await lease(scheduler, 3)
            with pytest.raises(NoCapacity, match="at most 0 of a GPU free") as refused:
                await lease(scheduler, 4, gpu_milli=500)
            assert refused.value.metadata["earliest_start"] == "2026-11-01T13:00:00+00:00"
            (kept,) = await scheduler.orders("acme")
            assert (kept.state, kept.order_id) == (OrderState.REFUSED, "order-4")

    async def test_order_that_waits_is_matched_when_room_comes(self, farm):
        async with farm.opened() as scheduler:
            first = await lease(scheduler, 1, gpu_count=2)
            waits = await scheduler.order(order(2), queue=True)
            assert waits.state is OrderState.WAITING
            assert "0 of a GPU free" in waits.reason
            await scheduler.release(first.lease_id)
            await farm.rounds(scheduler, 5, 1)
            (second,) = await scheduler.leases()
            assert (second.order_id, second.state) == ("order-2", LeaseState.ACTIVE)

    async def test_without_money_nothing_is_granted(self, farm):
        async with farm.opened() as scheduler:
            with pytest.raises(InsufficientBalance, match="first hour: 200 USD"):
                await _order_dear_ones(scheduler)
            assert await scheduler.leases() == []
            assert (await farm.ledger.balance("acme")).held_pico == 0
            assert (await lease(scheduler, 9)).lease_id

    async def test_hour_by_hour_holds_never_more_than_two(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, term_s=3 * HOUR)
            for _ in range(36):
                await farm.rounds(scheduler, 300, 30)
                holds = await farm.ledger.open_holds()
                state = (await scheduler.lease(booked.lease_id)).state
                assert len(holds) in ((0,) if state is LeaseState.CLOSED else (1, 2))
            await farm.rounds(scheduler, 60, 5)
            over = await scheduler.lease(booked.lease_id)
            assert over.close_reason is CloseReason.EXPIRED
            assert (await farm.ledger.balance("acme")).held_pico == 0
            assert over.charged_pico == await farm.charged()
            assert over.healthy_us + over.credited_us == 3 * HOUR * 10**6

    async def test_out_of_funds_closes_after_the_grace(self, tmp_path):
        farm = Box(tmp_path, [FARM])
        await farm.fill("1.5")
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, term_s=3 * HOUR)
            await farm.rounds(scheduler, 5700, 30)
            seen = await scheduler.lease(booked.lease_id)
            assert seen.state is LeaseState.CLOSED
            assert seen.close_reason is CloseReason.OUT_OF_FUNDS
            account = await farm.ledger.balance("acme")
            assert 0 <= account.balance_pico < 10**10
            assert account.held_pico == 0

    async def test_money_within_the_grace_keeps_it_and_is_charged(self, tmp_path):
        farm = Box(tmp_path, [FARM])
        await farm.fill("1.5")
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, term_s=3 * HOUR)
            await farm.rounds(scheduler, 5500, 20)
            assert "deposited" in (await scheduler.lease(booked.lease_id)).reason
            await farm.ledger.transfer(deposit("5", "more"))
            await farm.rounds(scheduler, 2 * HOUR, 30)
            over = await scheduler.lease(booked.lease_id)
            assert over.close_reason is CloseReason.EXPIRED
            assert over.credited_us < 30 * 60 * 10**6 / 60

    async def test_restart_in_the_middle_loses_and_doubles_nothing(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler)
            await farm.rounds(scheduler, 130, 5)
        farm.clock.advance(40)  # nobody looks, the replica serves on
        async with farm.opened() as scheduler:
            await farm.rounds(scheduler, 130, 5)
            await scheduler.release(booked.lease_id)
            await farm.rounds(scheduler, 5, 1)
            over = await scheduler.lease(booked.lease_id)
        assert over.healthy_us == 295 * 10**6  # ready five seconds after the match
        assert over.charged_pico == await farm.charged()
        assert sum(row.gpu_us for row in farm.ledger.records) == over.gpu_us

    async def test_replica_replaced_while_nobody_looked_is_credited(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler)
            await farm.rounds(scheduler, 125, 5)
        farm.clock.advance(60)
        farm.cluster.ready()  # another process serves now
        async with farm.opened() as scheduler:
            await farm.rounds(scheduler, 5, 1)
            seen = await scheduler.lease(booked.lease_id)
            assert seen.credited_us >= 60 * 10**6
            assert seen.healthy_us == 60 * 10**6  # the rest of the first run has no witness

    async def test_serves_controller_restarted_leaves_no_gap(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler)
            await farm.rounds(scheduler, 65, 5)
            apps = dict(farm.cluster.apps)
            (app,) = apps
            farm.cluster.apps[app] = replace(apps[app], run=None, unsure=True)
            await farm.rounds(scheduler, 5, 1)
            before = await scheduler.lease(booked.lease_id)
            assert before.state is LeaseState.ACTIVE
            assert len((await scheduler.routes()).ready) == 1
            farm.cluster.apps |= apps
            await farm.rounds(scheduler, 60, 5)
            seen = await scheduler.lease(booked.lease_id)
            assert seen.credited_us == before.credited_us
            assert seen.healthy_us == before.healthy_us + 60 * 10**6

    async def test_renewal_and_the_next_booking_in_its_way(self, farm):
        async with farm.opened() as scheduler:
            first = await lease(scheduler, 1, gpu_count=2)
            renewed = await scheduler.renew(first.lease_id, HOUR)
            assert renewed.end - first.end == timedelta(hours=1)
            later = first.start + timedelta(hours=2)
            await lease(scheduler, 2, gpu_count=2, start=later, tenant_id="other")
            with pytest.raises(Conflict, match="cannot be renewed so long"):
                await scheduler.renew(first.lease_id, HOUR)
            with pytest.raises(NotFound):
                await scheduler.renew(first.lease_id, HOUR, tenant_id="other")

    async def test_booked_for_later_starts_then_and_is_bound_then(self, farm):
        async with farm.opened() as scheduler:
            start = farm.clock.now() + timedelta(hours=2)
            booked = await lease(scheduler, start=start)
            assert booked.gpu_indices == ()
            await farm.rounds(scheduler, 7000, 100)
            assert farm.cluster.apps == {}
            await farm.rounds(scheduler, 205, 5)
            seen = await scheduler.lease(booked.lease_id)
            assert (seen.state, seen.gpu_indices) == (LeaseState.ACTIVE, (0,))
            await farm.rounds(scheduler, HOUR, 30)
            over = await scheduler.lease(booked.lease_id)
            assert over.healthy_us + over.credited_us == HOUR * 10**6

    async def test_failed_engine_closes_the_lease_with_its_reason(self, farm):
        farm.cluster.instant = False
        async with farm.opened() as scheduler:
            booked = await lease(scheduler)
            await farm.rounds(scheduler, 1, 1)
            (name,) = farm.cluster.apps
            farm.cluster.apps[name] = AppStatus(None, True, "no such file")
            await farm.rounds(scheduler, 5, 1)
            over = await scheduler.lease(booked.lease_id)
            assert (over.close_reason, over.charged_pico) == (CloseReason.FAILED, 0)
            assert "no such file" in over.reason
            assert (await farm.ledger.balance("acme")).held_pico == 0


async def _order_dear_ones(scheduler):
    dear = replace(FARM, ask_pico=100 * 10**12)
    await scheduler.offer(dear)
    await scheduler.order(order(gpu_count=2, term_s=7 * HOUR))


class TestNodes:
    @pytest.fixture
    async def two(self, tmp_path):
        other = replace(FARM, offer_id="barn", node_id="barn", provider_id="gpu-farm")
        made = Box(tmp_path, [FARM, other])
        await made.fill()
        return made

    async def test_lost_node_moves_its_lease_and_the_gap_is_credited(self, two):
        async with two.opened() as scheduler:
            booked = await lease(scheduler, 1)
            home = booked.node_id
            await two.rounds(scheduler, 120, 5)
            two.cluster.nodes.discard(home)
            await two.rounds(scheduler, 60, 1)
            moved = await scheduler.lease(booked.lease_id)
            assert moved.node_id != home
            assert moved.state is LeaseState.ACTIVE
            assert (await scheduler.routes()).ready[0].node_id == moved.node_id
            assert 10 * 10**6 <= moved.credited_us <= 60 * 10**6
            await scheduler.release(booked.lease_id)
            await two.rounds(scheduler, 5, 1)
            over = await scheduler.lease(booked.lease_id)
            assert over.charged_pico == await two.charged()
            payees = {r.provider_id for r in two.ledger.records if r.charge_pico}
            assert payees == {"local", "gpu-farm"}

    async def test_lost_node_without_another_closes_with_credit(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, 1)
            await farm.rounds(scheduler, 120, 5)
            farm.cluster.nodes.clear()
            await farm.rounds(scheduler, 30, 1)
            over = await scheduler.lease(booked.lease_id)
            assert over.close_reason is CloseReason.NODE_LOST
            assert over.healthy_us <= 120 * 10**6
            assert (await scheduler.offers())[0].state is OfferState.LOST
            farm.cluster.nodes.add("farm")
            await farm.rounds(scheduler, 5, 1)
            assert (await scheduler.offers())[0].state is OfferState.OPEN
            assert farm.cluster.processes["farm"] == set()
            assert (await lease(scheduler, 2)).lease_id

    async def test_short_loss_is_waited_out_on_the_same_gpu(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, 1)
            await farm.rounds(scheduler, 120, 5)
            farm.cluster.nodes.clear()
            await farm.rounds(scheduler, 5, 1)
            farm.cluster.nodes.add("farm")
            farm.cluster.ready()
            await farm.rounds(scheduler, 5, 1)
            seen = await scheduler.lease(booked.lease_id)
            assert (seen.state, seen.gpu_indices) == (LeaseState.ACTIVE, booked.gpu_indices)
            assert seen.credited_us > 0

    async def test_join_needs_a_token_once_and_the_key_later(self, farm):
        barn = replace(FARM, offer_id="barn", node_id="barn", provider_id="gpu-farm")
        async with farm.opened() as scheduler:
            with pytest.raises(InvalidKey):
                await scheduler.join(barn, Proof("nonsense"))
            token = await scheduler.make_join_token("gpu-farm")
            with pytest.raises(InvalidKey, match="not one of provider local"):
                await scheduler.join(replace(barn, provider_id="local"), Proof(token))
            key = await scheduler.join(barn, Proof(token))
            assert (await scheduler.offers())[0].state is OfferState.LOST
            with pytest.raises(InvalidKey, match="was used by node barn"):
                await scheduler.join(replace(barn, offer_id="b2", node_id="b2"), Proof(token))
            with pytest.raises(InvalidKey):
                await scheduler.join(barn, Proof(node_key="nonsense"))
            assert await scheduler.join(barn, Proof(node_key=key)) == key
            late = await scheduler.make_join_token("gpu-farm")
            farm.clock.advance(3601)
            with pytest.raises(InvalidKey, match="expired"):
                await scheduler.join(replace(barn, offer_id="b2", node_id="b2"), Proof(late))

    async def test_drained_node_gets_nothing_new_and_leaves_when_empty(self, farm):
        async with farm.opened() as scheduler:
            booked = await lease(scheduler, 1)
            await farm.rounds(scheduler, 60, 5)
            await scheduler.drain("farm")
            with pytest.raises(NoCapacity, match="is draining"):
                await lease(scheduler, 2)
            assert (await scheduler.lease(booked.lease_id)).state is LeaseState.ACTIVE
            with pytest.raises(Conflict, match="1 lease"):
                await scheduler.leave("farm")
            await scheduler.leave("farm", force=True)
            over = await scheduler.lease(booked.lease_id)
            assert over.close_reason is CloseReason.NODE_LEFT
            await farm.rounds(scheduler, 5, 1)
            assert (await scheduler.offers())[0].state is OfferState.LEFT

    async def test_gpu_is_reused_only_when_its_memory_is_seen_free(self, farm):
        async with farm.opened() as scheduler:
            first = await lease(scheduler, 1, gpu_count=2)
            await farm.rounds(scheduler, 5, 1)
            farm.cluster.taken.add(("farm", 0))
            await scheduler.release(first.lease_id)
            second = await lease(scheduler, 2, gpu_count=2)
            await farm.rounds(scheduler, 10, 1)
            (replica,) = scheduler._core.replicas_of(second.lease_id)
            assert replica.state is ReplicaState.WAITING
            assert replica.reason == "its GPU is being freed"
            farm.cluster.taken.clear()
            await farm.rounds(scheduler, 5, 1)
            assert (await scheduler.lease(second.lease_id)).state is LeaseState.ACTIVE


POLICY = LanePolicy(2.0, spill_pico=10**12)
DEAL = LanePolicy(2.0, cheap="smollm2-135m", strong="tiny-qwen")


class TestRules:
    async def test_hybrid_is_a_lease_with_a_rule_while_it_lasts(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler)
            placed = await scheduler.order(order(policy=POLICY))
            await farm.rounds(scheduler, 10)
            table = await scheduler.routes()
            (rule,) = table.rules
            assert (rule.model, rule.tenant_id, rule.lease_id) == (
                *("tiny-qwen", "acme"),
                placed.lease_id,
            )
            assert {route.lane for route in table.ready} == {Lane.TOKENS, Lane.LEASE}
            modes = {d.mode for d, _ in await scheduler.deployments()}
            assert modes == {Mode.TOKENS, Mode.HYBRID}
            assert await scheduler.order(order(policy=POLICY)) == placed
            with pytest.raises(Conflict, match="another order"):
                await scheduler.order(order(policy=replace(POLICY, spill_pico=1)))
            with pytest.raises(Conflict, match="hybrid"):
                await scheduler.order(order(2, policy=POLICY))
            await scheduler.undeploy(placed.lease_id)
            await farm.rounds(scheduler, 20)
            assert (await scheduler.routes()).rules == ()

    async def test_hybrid_needs_a_pool(self, farm):
        async with farm.opened() as scheduler:
            with pytest.raises(NoCapacity, match="--mode lease"):
                await scheduler.order(order(policy=POLICY))

    async def test_auto_deals_by_a_name_of_the_tenants_own_and_survives_restarts(self, farm):
        async with farm.opened() as scheduler:
            first = await scheduler.open_auto("smart", "acme", DEAL)
            changed = replace(DEAL, cost_target=0.2)
            again = await scheduler.open_auto("smart", "acme", changed)
            assert again == replace(first, policy=changed)
            await scheduler.open_auto("smart", "other", DEAL)
        async with farm.opened() as scheduler:
            await farm.rounds(scheduler, 10)
            rules = (await scheduler.routes()).rules
            assert {(rule.tenant_id, rule.policy) for rule in rules} == {
                ("acme", changed),
                ("other", DEAL),
            }
            with pytest.raises(PermissionDenied):
                await scheduler.undeploy("smart", "third")
            await scheduler.undeploy("smart", "acme")
            assert [rule.tenant_id for rule in (await scheduler.routes()).rules] == ["other"]

    @pytest.mark.parametrize(
        ("name", "changes", "words"),
        [
            ("tiny-qwen", {}, "name of your own"),
            ("a/b", {}, "name of your own"),
            ("smart", {"cheap": "", "strong": "qwen-7b"}, "name both"),
            ("smart", {"cheap": "tiny-qwen", "strong": "smollm2-135m"}, "exchange"),
            ("smart", {"strong": "smollm2-135m"}, "two models"),
            ("smart", {"strong": "tiny-embed"}, "embeddings"),
            ("smart", {"strong": "smollm2-360m"}, "no price"),
            ("smart", {"strong": "nothing"}, "not in the catalog"),
            ("smart", {"cheap": "", "strong": ""}, "not in the catalog"),
        ],
    )
    async def test_senseless_ones_change_nothing(self, farm, name, changes, words):
        async with farm.opened() as scheduler:
            with pytest.raises(MarketError, match=words):
                await scheduler.open_auto(name, "acme", replace(DEAL, **changes))
            assert await scheduler.deployments() == []

    async def test_dry_run_changes_nothing(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.open_auto("smart", "acme", DEAL, dry_run=True)
            assert await scheduler.deployments() == []

    async def test_hybrid_that_waits_keeps_its_name(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler)
            asked = order(policy=POLICY, gpu_count=2, max_price_pico=1)
            assert (await scheduler.order(asked, queue=True)).lease_id is None
            with pytest.raises(Conflict, match="waits"):
                await scheduler.open_auto("tiny-qwen", "acme", LanePolicy(0.5))

    async def test_one_model_by_its_own_name(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.open_auto("tiny-qwen", "acme", LanePolicy(0.5))
            await pool(scheduler)
            with pytest.raises(Conflict, match="auto"):
                await scheduler.order(order(policy=POLICY))


class TestDisks:
    async def test_pull_see_and_remove(self, farm):
        async with farm.opened() as scheduler:
            with pytest.raises(NotFound, match="no open node can run"):
                await scheduler.pull_model("qwen-7b", [], True)  # its GPUs are only logical
            assert await scheduler.pull_model("qwen-7b", ["farm"], True) == ["farm"]
            (entry,) = (await scheduler.stored_models())["farm"]
            assert (entry.model, entry.pinned) == ("qwen-7b", True)
            assert await scheduler.remove_model("qwen-7b", ["farm"]) == {"farm": entry.bytes}
            with pytest.raises(NotFound, match="on no disk"):
                await scheduler.remove_model("qwen-7b", [])
            with pytest.raises(NotFound, match="no node"):
                await scheduler.pull_model("qwen-7b", ["nowhere"], False)
            with pytest.raises(NotFound, match="catalog"):
                await scheduler.pull_model("nothing", [], False)

    async def test_what_sleeps_or_is_booked_ahead_is_pulled_to_where_it_will_start(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            await pool(scheduler, minimum=0, maximum=1)  # made on the machine: nothing to pull
            start = farm.clock.now() + timedelta(hours=3)
            await scheduler.order(order(model="qwen-0.5b", start=start))
            await scheduler._disks.prefetch()
            assert farm.cluster.disks["farm"] == {}  # the disk was not seen yet
            await scheduler.stored_models()
            await scheduler._disks.prefetch()
            assert set(farm.cluster.disks["farm"]) == {"smollm2-135m", "qwen-0.5b"}

    @pytest.mark.parametrize(("maximum", "pulled"), [(1, set()), (2, {"smollm2-135m"})])
    async def test_pool_that_may_grow_is_pulled_to_where_it_would(self, farm, maximum, pulled):
        farm.offers = [replace(FARM, gpus=(Gpu(0, "a10", 2_000),))]
        farm.offers.append(replace(farm.offers[0], offer_id="away", node_id="away"))
        farm.cluster.nodes = {"farm", "away"}
        async with farm.opened() as scheduler:
            _, (replica,) = await pool(scheduler, "smollm2-135m", minimum=1, maximum=maximum)
            await scheduler.stored_models()
            await scheduler._disks.prefetch()
            (free,) = {"farm", "away"} - {replica.place.node_id}
            assert set(farm.cluster.disks[free]) == pulled

    async def test_what_was_removed_is_not_pulled_ahead_again_at_once(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            await scheduler.pull_model("smollm2-135m", [], False)
            await scheduler.remove_model("smollm2-135m", [])
            await scheduler.stored_models()
            await scheduler._disks.prefetch()
            assert farm.cluster.disks["farm"] == {}

    async def test_failed_pull_is_not_tried_again_at_once(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            await scheduler.stored_models()
            await scheduler._disks.prefetch()
            farm.cluster.disks["farm"].clear()
            await scheduler.stored_models()
            await scheduler._disks.prefetch()
            assert farm.cluster.disks["farm"] == {}
            farm.clock.advance(601)
            await scheduler._disks.prefetch()
            assert set(farm.cluster.disks["farm"]) == {"smollm2-135m"}

    async def test_node_that_does_not_answer_is_left_out(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.pull_model("qwen-7b", ["farm"], False)
            await scheduler.stored_models()
            farm.cluster.nodes.clear()
            assert await scheduler.stored_models() == {}
            assert scheduler._core.on_disk == {"farm": {"qwen-7b"}}


@pytest.mark.parametrize("turns", range(8))
async def test_ends_when_told_to_in_the_moment_in_which_a_look_ends(box, monkeypatch, turns):
    """Turns of the loop between the two: a cancellation may meet a result that is on its way."""
    async with box.opened() as scheduler:
        asked, looked = asyncio.Event(), asyncio.get_running_loop().create_future()

        async def look(function, *arguments):
            asked.set()
            await looked
            return function(*arguments)

        monkeypatch.setattr(asyncio, "to_thread", look)
        rounds = asyncio.create_task(scheduler._keeper.run_forever())
        await asked.wait()
        looked.set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        rounds.cancel()
        await asyncio.wait({rounds}, timeout=2)
        assert rounds.cancelled()
