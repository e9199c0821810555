"""Pools that grow, shrink, sleep and wake, by what gateways report."""

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from market import catalog, matching
from market.errors import (
    InvalidRequest,
    NoCapacity,
    Overloaded,
)
from market.fairness import PoolReport
from market.forecast import BUCKET_S, DAY
from market.scheduler import keeper
from market.scheduler.shares import GatewayReport
from market.types import (
    AppStatus,
    DeploymentState,
    Gpu,
    Lane,
    LeaseState,
    Loan,
    ReplicaState,
)
from tests.boxes import FARM, Box, Demands, lease, pool, states


class TestElasticPools:
    async def test_begins_with_its_minimum_and_wakes_for_the_first_request(self, box):
        async with box.opened() as scheduler:
            demands = Demands(box, scheduler)
            deployment, replicas = await pool(scheduler, minimum=0, maximum=2)
            assert replicas == ()
            await demands(5)
            assert await states(scheduler) == [DeploymentState.COLD]
            (entry,) = (await scheduler.routes()).starting
            assert entry.wakes
            await demands(2, cold={"tiny-qwen": 3})
            (route,) = (await scheduler.routes()).ready
            assert route.deployment_id == deployment.deployment_id
            assert await states(scheduler) == [DeploymentState.READY]

    async def test_one_that_fits_nowhere_is_refused_though_it_begins_with_none(self, box):
        async with box.opened() as scheduler:
            with pytest.raises(NoCapacity):
                await pool(scheduler, "qwen-7b", minimum=0, maximum=1)

    async def test_grows_with_demand_and_shrinks_late(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=1, maximum=4)
            await demands(6, tiny_qwen=300)  # of 128 places each; starts on a GPU queue
            assert len((await scheduler.routes()).ready) == 3
            await demands(100, tiny_qwen=10)
            assert len((await scheduler.routes()).ready) == 3
            await demands(60, tiny_qwen=10)
            assert len((await scheduler.routes()).ready) == 1
            await demands(60, tiny_qwen=10)
            assert len(farm.cluster.apps) == 1

    async def test_stream_keeps_its_replica_and_new_demand_takes_it_back(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=1, maximum=2)
            await demands(3, tiny_qwen=200)
            busy = {route.app_name: 1 for route in (await scheduler.routes()).ready}
            assert len(busy) == 2
            await demands(400, streams=busy, tiny_qwen=2)
            assert len((await scheduler.routes()).ready) == 1
            assert len(farm.cluster.apps) == 2  # it drains as long as the stream lasts
            await demands(3, streams=busy, tiny_qwen=200)
            assert {r.app_name for r in (await scheduler.routes()).ready} == set(busy)

    async def test_sleeps_after_its_keep_alive_and_frees_the_gpu(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=0, maximum=1, keep_alive_s=30)
            await demands(2, cold={"tiny-qwen": 1})
            await demands(20, tiny_qwen=1)
            await demands(25)
            assert await states(scheduler) == [DeploymentState.READY]
            await demands(15)
            assert await states(scheduler) == [DeploymentState.COLD]
            assert farm.cluster.apps == {}
            assert scheduler._core.state.replicas == {}

    async def test_nothing_shrinks_while_no_gateway_is_heard(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=1, keep_alive_s=30)
            await Demands(farm, scheduler)(2, cold={"tiny-qwen": 1})
            scheduler._shares._gateways.clear()
            await farm.rounds(scheduler, 300)
            assert await states(scheduler) == [DeploymentState.READY]

    async def test_bounds_may_be_changed_while_it_serves(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            first, _ = await pool(scheduler)
            await demands(2)
            again, _ = await pool(scheduler, minimum=2, maximum=2)
            assert again.deployment_id == first.deployment_id
            await demands(2)
            assert len((await scheduler.routes()).ready) == 2
            with pytest.raises(InvalidRequest, match="MIN:MAX"):
                await pool(scheduler, minimum=3, maximum=2)

    async def test_budget_bounds_it(self, farm):
        async with farm.opened() as scheduler:
            share = -(-catalog.find("tiny-qwen").memory_mib * 1000 // 24_564)
            spend_max_pico = 10**12 * share * 2 // 1000
            await pool(scheduler, minimum=0, maximum=8, spend_max_pico=spend_max_pico)
            demands = Demands(farm, scheduler)
            await demands(2, cold={"tiny-qwen": 1})
            await demands(5, tiny_qwen=1000)
            assert len((await scheduler.routes()).ready) == 2
            (deployment, _) = (await scheduler.deployments())[0]
            assert "budget" in scheduler._elastic.reason(deployment.deployment_id)

    async def test_budget_buys_the_dear_one_beside_the_cheap_one_or_neither(self, farm):
        """What is there counts at its own price: nothing is started only to be stopped."""
        cheap = replace(FARM, gpus=(Gpu(0, "a10", 1_200),))
        dear = replace(cheap, offer_id="dear", node_id="dear", ask_pico=4 * 10**12)
        farm.offers, farm.cluster.nodes = [cheap, dear], {"farm", "dear"}
        async with farm.opened() as scheduler:
            milli = matching.share_milli(catalog.find("tiny-qwen"), cheap)
            hours = [offer.ask_pico * milli // 1000 for offer in (cheap, dear)]
            demands = Demands(farm, scheduler)
            for spend_max_pico, nodes in (
                (sum(hours) - 1, {"farm"}),
                (sum(hours), {"farm", "dear"}),
            ):
                await pool(scheduler, minimum=0, maximum=6, spend_max_pico=spend_max_pico)
                await demands(2, cold={"tiny-qwen": 1})
                await demands(20, tiny_qwen=600)
                assert {r.place.node_id for r in scheduler._core.state.replicas.values()} == nodes
                (deployment,) = scheduler._core.state.deployments.values()
                assert deployment.made == len(nodes)

    @pytest.fixture
    def priced(self, farm):
        """A cheap node and one ten times as dear, each with room for one model at a time."""
        cheap = replace(FARM, gpus=(Gpu(0, "a10", 1500),))
        dear = replace(cheap, offer_id="dear", node_id="dear", ask_pico=10 * FARM.ask_pico)
        farm.offers, farm.cluster.nodes = [cheap, dear], {"farm", "dear"}
        return farm

    async def test_dear_replica_that_the_budget_does_not_pay_goes_for_good(self, priced):
        async with priced.opened() as scheduler:
            demands = Demands(priced, scheduler)
            await scheduler.drain("farm")
            await pool(scheduler, minimum=0, maximum=1)
            await demands(3, cold={"tiny-qwen": 1})
            await scheduler.drain("farm", back=True)
            await pool(scheduler, minimum=0, maximum=1, spend_max_pico=10**12)
            (dear,) = scheduler._core.state.replicas.values()
            streams = {dear.app_name: 1}
            for _ in range(10):
                await demands(1, tiny_qwen=1, streams=streams)
                assert scheduler._core.state.replicas[dear.replica_id].state is (
                    ReplicaState.DRAINING
                )
            assert [r.node_id for r in (await scheduler.routes()).ready] == ["farm"]

    async def test_nobody_makes_room_for_what_the_budget_does_not_pay(self, priced):
        async with priced.opened() as scheduler:
            demands = Demands(priced, scheduler)
            await pool(scheduler, minimum=0, maximum=2, spend_max_pico=5 * 10**12)
            await demands(3, cold={"tiny-qwen": 1})
            await pool(scheduler, "tiny-embed", minimum=0, maximum=1)
            await demands(3, cold={"tiny-embed": 1}, tiny_qwen=1)
            await demands(20, tiny_qwen=600)
            models = {r.node_id: r.model for r in (await scheduler.routes()).ready}
            assert models == {"farm": "tiny-qwen", "dear": "tiny-embed"}

    async def test_room_is_made_where_the_budget_pays_though_a_dear_gpu_is_free(self, priced):
        async with priced.opened() as scheduler:
            demands = Demands(priced, scheduler)
            await pool(scheduler, "tiny-embed", minimum=0, maximum=1)
            await demands(3, cold={"tiny-embed": 1})
            for _ in range(2):  # the same again is no error
                await pool(scheduler, minimum=0, maximum=1, spend_max_pico=5 * 10**12)
            await demands(20, cold={"tiny-qwen": 1})
            models = {r.node_id: r.model for r in (await scheduler.routes()).ready}
            assert models == {"farm": "tiny-qwen"}

    async def test_budget_that_pays_for_none_is_refused_and_nobody_waits_for_it(self, farm):
        async with farm.opened() as scheduler:
            with pytest.raises(InvalidRequest, match=r"the cheapest costs 0\.042"):
                await pool(scheduler, minimum=0, maximum=2, spend_max_pico=10**9)
            await pool(scheduler, minimum=0, maximum=2, spend_max_pico=10**11)
            await scheduler.offer(replace(FARM, ask_pico=10 * FARM.ask_pico))  # dearer since
            demands = Demands(farm, scheduler)
            await demands(2, cold={"tiny-qwen": 1})
            assert (await scheduler.routes()).starting[0].wakes  # it may come
            await demands(40, cold={"tiny-qwen": 1})
            (entry,) = (await scheduler.routes()).starting
            assert not entry.wakes
            assert "budget pays for 0" in entry.reason
            await demands(40)
            assert (await scheduler.routes()).starting[0].wakes  # prices may have changed

    async def test_what_cannot_be_stored_takes_no_gpu(self, farm, monkeypatch):
        async with farm.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=8)
            demands = Demands(farm, scheduler)

            async def full(*_, **__):
                raise Overloaded("the disk is full", retry_after_s=1)

            with monkeypatch.context() as patched:
                patched.setattr(scheduler._store, "save", full)
                await demands(5, cold={"tiny-qwen": 1})
            assert scheduler._core.free_milli(FARM) == [1000, 1000]
            await demands(2, cold={"tiny-qwen": 1})
            assert len((await scheduler.routes()).ready) == 1

    async def test_failed_replica_keeps_its_place_and_others_do_its_work(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=1, maximum=4)
            await demands(2)
            farm.cluster.instant = False
            await demands(2, tiny_qwen=200)
            (started,) = scheduler._core.in_state(ReplicaState.STARTING)
            farm.cluster.apps[started.app_name] = AppStatus(None, True, "no memory")
            farm.cluster.instant = True
            await demands(10, tiny_qwen=200)
            assert len((await scheduler.routes()).ready) == 2
            (failed,) = scheduler._core.in_state(ReplicaState.FAILED)
            assert failed.replica_id == started.replica_id
            await demands(600, tiny_qwen=200)
            assert failed.replica_id not in scheduler._core.state.replicas

    async def test_failed_replica_is_given_up_when_those_that_served_have_gone(self, farm):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=0, maximum=2, keep_alive_s=5)
            await demands(2, cold={"tiny-qwen": 1})
            farm.cluster.instant = False
            await demands(2, tiny_qwen=200)
            (started,) = scheduler._core.in_state(ReplicaState.STARTING)
            farm.cluster.apps[started.app_name] = AppStatus(None, True, "no memory")
            farm.cluster.instant = True
            await demands(3, tiny_qwen=1)
            await demands(20)
            assert scheduler._core.state.replicas == {}
            await demands(3, cold={"tiny-qwen": 1})
            assert len((await scheduler.routes()).ready) == 1

    async def test_who_waits_for_a_replica_that_starts_is_not_told_that_there_is_no_room(
        self, farm
    ):
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, minimum=0, maximum=4)
            farm.cluster.instant = False
            await demands(2, cold={"tiny-qwen": 1})
            await scheduler.drain("farm")
            await demands(60, cold={"tiny-qwen": 400})
            (entry,) = (await scheduler.routes()).starting
            assert entry.wakes

    async def test_who_is_only_expected_makes_nobody_go_whatever_the_bounds_say(
        self, farm, monkeypatch
    ):
        farm.offers = [replace(FARM, gpus=(Gpu(0, "a10", 1500),))]
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, "tiny-embed", minimum=0, maximum=1)
            await demands(3, cold={"tiny-embed": 1})
            await pool(scheduler, minimum=0, maximum=1)
            elastic = scheduler._elastic
            monkeypatch.setattr(
                elastic, "_ahead", lambda deployment, *_: 3 * (deployment.model == "tiny-qwen")
            )
            await demands(20)
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-embed"]

    async def test_pool_whose_model_is_known_no_more_does_not_stop_others(self, farm, monkeypatch):
        farm.config = replace(farm.config, spares=1)
        async with farm.opened() as scheduler:
            await pool(scheduler, "tiny-embed", minimum=1, maximum=2)
            await Demands(farm, scheduler)(2)
            await pool(scheduler, minimum=0, maximum=1)
            others = tuple(m for m in catalog.models() if m.name != "tiny-embed")
            monkeypatch.setattr(catalog, "_shipped", lambda: others)
            await Demands(farm, scheduler)(3, cold={"tiny-qwen": 1})
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-qwen"]
            assert [r.deployment_id for r in scheduler._core.state.replicas.values()] == [
                (await scheduler.routes()).ready[0].deployment_id
            ]

    async def test_failed_replica_is_replica_is_not_started_again_and_again(self, box):
        async with box.opened() as scheduler:
            demands = Demands(box, scheduler)
            await pool(scheduler, minimum=0, maximum=3)
            await demands(2, cold={"tiny-qwen": 1})
            (app,) = box.cluster.apps
            box.cluster.apps[app] = AppStatus(None, True, "no memory")
            await demands(1, cold={"tiny-qwen": 1})
            await demands(20, cold={"tiny-qwen": 500})
            assert len(scheduler._core.state.replicas) == 1
            (entry,) = (await scheduler.routes()).starting
            assert not entry.wakes
            assert "no memory" in entry.reason

    async def test_starts_are_measured_and_kept(self, farm):
        async with farm.opened() as scheduler:
            farm.cluster.instant = False
            await pool(scheduler)
            await farm.rounds(scheduler, 40, 5)
            farm.cluster.ready()
            await farm.rounds(scheduler, 1, 1)
        async with farm.opened() as scheduler:
            (cost,) = scheduler._core.state.starts.values()
            assert cost.start_id.startswith("tiny-qwen/transformers/a10")
            assert 35 <= cost.seconds <= 41  # rounds are five seconds apart here

    async def test_without_spares_weights_in_memory_make_the_next_start_shorter(self, farm):
        async with farm.opened() as scheduler:
            first, _ = await pool(scheduler, minimum=0, maximum=1)
            starts = scheduler._elastic._starts
            cold_s = starts.costs(first, []).start_s
            scheduler._core.in_memory["farm"] = frozenset({"tiny-qwen"})
            assert starts.costs(first, []).start_s < cold_s

    async def test_neither_a_download_nor_a_node_out_of_sight_is_a_start(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.stored_models()  # the disk is empty
            await pool(scheduler, minimum=1, maximum=1)
            await farm.rounds(scheduler, 20, 5)
            assert scheduler._core.state.starts == {}
            await scheduler.pull_model("tiny-qwen", ["farm"], pin=False)
            await scheduler.stored_models()
            farm.cluster.nodes.clear()
            await farm.rounds(scheduler, 5, 1)
            farm.cluster.nodes.add("farm")
            await farm.rounds(scheduler, 20, 5)
            assert len((await scheduler.routes()).ready) == 1
            assert scheduler._core.state.starts == {}

    async def test_nodes_that_say_nothing_keep_nobody_waiting(self, farm, monkeypatch):
        """A round waits a moment for all of them; what they say late counts, too."""
        silent = [replace(FARM, offer_id=n, node_id=n, ask_pico=9**13) for n in ("b", "c", "d")]
        farm.offers, farm.cluster.nodes = [FARM, *silent], {"farm", "b", "c", "d"}
        asked, over, residents = [], threading.Event(), farm.cluster.residents

        def hangs(node_id):
            asked.append(node_id)
            if node_id == "d":
                raise Overloaded("no answer", retry_after_s=1)
            if node_id != "farm":
                over.wait(60)
            return residents(node_id)

        farm.cluster.residents = hangs
        monkeypatch.setattr(keeper, "ANSWER_PATIENCE_S", 0.1)
        try:
            async with farm.opened() as scheduler:
                await pool(scheduler, minimum=0, maximum=1)
                async with asyncio.timeout(10):
                    await Demands(farm, scheduler)(5, cold={"tiny-qwen": 1})
                assert len((await scheduler.routes()).ready) == 1
                assert sorted(asked) == ["b", "c", "d", "farm"]
                over.set()
                await Demands(farm, scheduler)(20)
                assert sorted(asked) == ["b", "c", "d", "d", "farm"]
        finally:
            over.set()

    async def test_idle_model_makes_room_for_one_that_is_asked_but_never_a_lease(self, farm):
        """Two whole GPUs: one leased, the other shared in turn."""
        small = replace(FARM, gpus=tuple(Gpu(n, "a10", 1500) for n in (0, 1)))
        drained = replace(small, offer_id="away", node_id="away")
        farm.offers, farm.cluster.nodes = [small, drained], {"farm", "away"}
        async with farm.opened() as scheduler:
            await scheduler.drain("away")  # its empty GPUs are no reason to wait for room
            demands = Demands(farm, scheduler)
            booked = await lease(scheduler, 1)
            await demands(2)
            await pool(scheduler, "tiny-qwen", minimum=0, maximum=1)
            await pool(scheduler, "tiny-embed", minimum=0, maximum=1)
            for asked, other in (("tiny-qwen", "tiny-embed"), ("tiny-embed", "tiny-qwen")) * 2:
                await demands(14, cold={asked: 1})
                ready = [r.model for r in (await scheduler.routes()).ready if r.lease_id is None]
                assert ready == [asked], other
            assert (await scheduler.lease(booked.lease_id)).state is LeaseState.ACTIVE

    async def test_of_all_nodes_the_one_idle_for_longest_makes_room(self, farm):
        """A pool that finds no room now may be opened all the same."""
        small = replace(FARM, gpus=(Gpu(0, "a10", 1500),))
        farm.offers = [replace(small, offer_id=n, node_id=n) for n in ("a", "b")]
        farm.cluster.nodes = {"a", "b"}
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            for model in ("tiny-qwen", "tiny-embed"):
                await pool(scheduler, model, minimum=0, maximum=1)
            await demands(3, cold={"tiny-qwen": 1})
            await demands(3, cold={"tiny-embed": 1})
            homes = {r.model: r for r in (await scheduler.routes()).ready}
            assert {route.node_id for route in homes.values()} == {"a", "b"}
            older = min(homes.values(), key=lambda route: route.node_id)
            younger = max(homes.values(), key=lambda route: route.node_id)
            await demands(3, **{older.model.replace("-", "_"): 1})
            await demands(10)
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            await demands(14, cold={"smollm2-135m": 1})
            ready = {r.model for r in (await scheduler.routes()).ready}
            assert ready == {older.model, "smollm2-135m"}
            assert younger.model not in ready

    async def test_room_is_made_elsewhere_if_an_answer_keeps_what_is_about_to_leave(self, farm):
        small = replace(FARM, gpus=tuple(Gpu(n, "a10", 1500) for n in (0, 1)))
        farm.offers = [small]
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            for model in ("tiny-qwen", "tiny-embed", "smollm2-135m"):
                await pool(scheduler, model, minimum=0, maximum=1)
            await demands(3, cold={"tiny-qwen": 1})
            await demands(3, cold={"tiny-embed": 1})
            await scheduler.undeploy("tiny-qwen", None)
            app = {r.model: r.app_name for r in (await scheduler.routes()).ready}["tiny-embed"]
            (leaves,) = [r for r in scheduler._core.state.replicas.values() if r.app_name != app]
            draining = replace(leaves, state=ReplicaState.DRAINING)
            await scheduler._store.save([draining])
            await demands(14, cold={"smollm2-135m": 1}, streams={leaves.app_name: 1})
            ready = {r.model for r in (await scheduler.routes()).ready}
            assert ready == {"smollm2-135m"}

    async def test_where_an_eviction_would_make_room_a_model_is_pulled_ahead(self, farm):
        farm.offers = [replace(FARM, gpus=(Gpu(0, "a10", 2_000),))]
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            await pool(scheduler, "tiny-qwen", minimum=0, maximum=1)
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            await demands(3, cold={"tiny-qwen": 1})
            await scheduler._disks.stored()
            await scheduler._disks.prefetch()
            assert not farm.cluster.disks["farm"]  # tiny-qwen has just been asked
            await demands(10)
            await scheduler._disks.prefetch()
            assert set(farm.cluster.disks["farm"]) == {"smollm2-135m"}


@pytest.fixture
async def spared(tmp_path):
    """Two GPUs, and spare processes."""
    made = Box(tmp_path, [FARM], spares=1)
    await made.fill()
    return made


async def waiting(box, scheduler, **bounds):
    """A pool at zero: its demands, and the application of the spare process that waits for it."""
    demands = Demands(box, scheduler)
    await pool(scheduler, minimum=0, **bounds)
    await demands(3)
    (spare,) = box.cluster.apps
    return demands, spare


class TestSpares:
    async def test_next_replica_gets_a_process_that_waits_and_another_is_made(self, spared):
        async with spared.opened() as scheduler:
            demands, spare = await waiting(spared, scheduler, maximum=2)
            assert (await scheduler.status())["spares_ready"] == 1
            await demands(2, cold={"tiny-qwen": 1})
            (replica,) = scheduler._core.state.replicas.values()
            assert replica.app_name == spare
            assert spared.cluster.apps[spare].replica_id == replica.replica_id
            assert [r.app_name for r in (await scheduler.routes()).ready] == [spare]
            await demands(3, tiny_qwen=1)
            assert len(spared.cluster.apps) == 2  # a spare for the second
            await demands(3, tiny_qwen=300)
            await demands(3, tiny_qwen=300)
            assert len(spared.cluster.apps) == 2  # it may have no third
            (cost,) = scheduler._core.state.starts.values()
            assert cost.start_id.endswith("/spare")

    async def test_one_that_is_starting_is_waited_for(self, spared):
        async with spared.opened() as scheduler:
            spared.cluster.instant = False
            demands = Demands(spared, scheduler)
            await pool(scheduler, minimum=0, maximum=1)
            await demands(2)
            (spare,) = spared.cluster.apps
            await demands(3, cold={"tiny-qwen": 1})
            assert list(spared.cluster.apps) == [spare]
            spared.cluster.ready()
            await demands(2, cold={"tiny-qwen": 1})
            assert [r.app_name for r in (await scheduler.routes()).ready] == [spare]

    async def test_gateways_know_it_before_it_serves(self, spared):
        async with spared.opened() as scheduler:
            demands, spare = await waiting(spared, scheduler, maximum=1)
            table = await scheduler.routes()
            assert (table.standby, table.early) == ((spare,), ())
            spared.cluster.instant = False
            await demands(1, cold={"tiny-qwen": 1})
            table = await scheduler.routes()
            assert ([r.app_name for r in table.early], table.ready) == ([spare], ())
            assert table.starting[0].wakes
            assert table.standby == ()
            spared.cluster.ready()
            await demands(1, cold={"tiny-qwen": 1})
            table = await scheduler.routes()
            assert ([r.app_name for r in table.ready], table.early) == ([spare], ())

    async def test_one_that_serves_before_it_is_seen_ready_is_drained_not_ended(self, spared):
        async with spared.opened() as scheduler:
            demands, spare = await waiting(spared, scheduler, maximum=1, keep_alive_s=1)
            spared.cluster.instant = False
            await demands(1, cold={"tiny-qwen": 1})
            streams = {spare: 1}
            await scheduler.sync(GatewayReport("gw0", 1, {}, frozenset(), {}, streams))
            (replica,) = scheduler._core.state.replicas.values()
            assert replica.state is ReplicaState.STARTING
            await scheduler._elastic._drain([replica.replica_id], "too many")
            (replica,) = scheduler._core.state.replicas.values()
            assert replica.state is ReplicaState.DRAINING
            await demands(10)
            assert scheduler._core.state.replicas == {}

    async def test_second_one_is_told_beside_the_first_that_serves(self, spared):
        async with spared.opened() as scheduler:
            demands, _ = await waiting(spared, scheduler, maximum=2)
            await demands(3, cold={"tiny-qwen": 1})
            await demands(3, tiny_qwen=1)
            spared.cluster.instant = False
            await demands(1, tiny_qwen=300)
            table = await scheduler.routes()
            assert (len(table.ready), len(table.early)) == (1, 1)
            assert table.early[0].app_name != table.ready[0].app_name

    async def test_process_that_died_is_started_with_the_model(self, spared):
        """Serve starts it anew with its settings; where the application is gone we do."""
        async with spared.opened() as scheduler:
            demands = Demands(spared, scheduler)
            await pool(scheduler, minimum=0, maximum=1)
            await demands(2)
            await demands(2, cold={"tiny-qwen": 1})
            (replica,) = scheduler._core.state.replicas.values()
            spared.cluster.apps.clear()
            await demands(2, tiny_qwen=1)
            assert spared.cluster.apps[replica.app_name].replica_id == replica.replica_id
            assert len((await scheduler.routes()).ready) == 1

    async def test_restarted_scheduler_keeps_who_has_a_model_and_makes_spares_anew(self, spared):
        async with spared.opened() as scheduler:
            demands = Demands(spared, scheduler)
            await pool(scheduler, minimum=0, maximum=2)
            await demands(2)
            await demands(3, cold={"tiny-qwen": 1})
            (replica,) = scheduler._core.state.replicas.values()
            before = set(spared.cluster.apps)
            assert len(before) == 2
        async with spared.opened() as scheduler:
            await Demands(spared, scheduler)(4, tiny_qwen=1)
            after = set(spared.cluster.apps)
            assert before & after == {replica.app_name}
            assert len(after) == 2
            homes = {app.removeprefix("model-") for app in after}
            assert spared.cluster.processes["farm"] == homes

    async def test_one_that_cannot_start_is_not_tried_again_and_nobody_waits_for_it(self, spared):
        async with spared.opened() as scheduler:
            spared.cluster.instant = False
            demands = Demands(spared, scheduler)
            await pool(scheduler, minimum=0, maximum=1)
            await demands(2)
            (spare,) = spared.cluster.apps
            failed = AppStatus(None, True, "no module named torch")
            spared.cluster.apps[spare] = failed
            await demands(3)
            assert spared.cluster.apps == {}
            spared.cluster.instant = True
            await demands(3, cold={"tiny-qwen": 1})
            assert len((await scheduler.routes()).ready) == 1

    async def test_models_that_take_turns_on_a_full_gpu_start_in_spare_processes(self, spared):
        spared.offers = [replace(FARM, gpus=(Gpu(0, "a10", 1500),))]
        async with spared.opened() as scheduler:
            demands = Demands(spared, scheduler)
            for model in ("tiny-qwen", "tiny-embed"):
                await pool(scheduler, model, minimum=0, maximum=1)
            await demands(3)
            for asked in ("tiny-qwen", "tiny-embed") * 4:
                await demands(14, cold={asked: 1})
                assert [r.model for r in (await scheduler.routes()).ready] == [asked]
            begun = {name.rpartition("/")[2] for name in scheduler._core.state.starts}
            assert begun == {"spare"}

    async def test_late_one_is_given_up_and_a_process_of_its_own_started(self, spared):
        async with spared.opened() as scheduler:
            demands, spare = await waiting(spared, scheduler, maximum=1)
            spared.cluster.apps[spare] = AppStatus(None, False, "out of memory")  # again and again
            await demands(10, cold={"tiny-qwen": 1})
            assert list(spared.cluster.apps) == [spare]
            await demands(200, cold={"tiny-qwen": 1})
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-qwen"]
            assert spare not in spared.cluster.apps

    async def test_goes_where_no_replica_would_go_any_more(self, spared):
        other = replace(FARM, offer_id="other", node_id="other", ask_pico=2 * FARM.ask_pico)
        spared.offers, spared.cluster.nodes = [FARM, other], {"farm", "other"}
        async with spared.opened() as scheduler:
            leased = [await lease(scheduler, n, provider_id="local") for n in (1, 2)]
            demands = Demands(spared, scheduler)
            await pool(scheduler, minimum=0, maximum=1)
            await demands(3)
            assert [s.node_id for s in scheduler._core.spares.values()] == ["other"]
            for booked in leased:
                await scheduler.release(booked.lease_id)
            await demands(20)
            assert {s.node_id for s in scheduler._core.spares.values()} == {"farm", "other"}
            await demands(310)
            assert [s.node_id for s in scheduler._core.spares.values()] == ["farm"]

    async def test_lease_that_begins_next_week_keeps_none_away(self, spared):
        async with spared.opened() as scheduler:
            start = spared.clock.now() + timedelta(days=7)
            await lease(scheduler, 1, gpu_milli=500, start=start)
            await waiting(spared, scheduler, maximum=1)

    async def test_only_where_pools_may_grow(self, spared):
        async with spared.opened() as scheduler:
            demands = Demands(spared, scheduler)
            await pool(scheduler)
            await lease(scheduler, 1)
            await demands(3)
            assert len(spared.cluster.apps) == 2
            await pool(scheduler, minimum=1, maximum=2)
            await demands(3)
            assert len(spared.cluster.apps) == 3
            await scheduler.undeploy("tiny-qwen")
            await demands(5)
            assert len(spared.cluster.apps) == 1  # the lease's


class TestSleep:
    @pytest.fixture
    async def bed(self, tmp_path):
        """One GPU for one model at a time, of an engine that can sleep."""
        small = replace(FARM, gpus=(Gpu(0, "a10", 1500),), memory_mib=16_000)
        made = Box(tmp_path, [small])
        made.cluster.sleepers = {"transformers"}
        await made.fill()
        return made

    async def asleep(self, bed, scheduler):
        """A pool that was asked once and then no more for a while."""
        demands = Demands(bed, scheduler)
        await pool(scheduler, minimum=0, maximum=1, keep_alive_s=5)
        await demands(3, cold={"tiny-qwen": 1})
        await demands(15)
        return demands

    async def test_idle_replica_sleeps_and_wakes_in_the_same_process(self, bed):
        async with bed.opened() as scheduler:
            demands = Demands(bed, scheduler)
            await pool(scheduler, minimum=0, maximum=1, keep_alive_s=5)
            await demands(3, cold={"tiny-qwen": 1})
            (replica,) = scheduler._core.state.replicas.values()
            await demands(15)
            assert await states(scheduler) == [DeploymentState.ASLEEP]
            assert bed.cluster.apps[replica.app_name].asleep
            table = await scheduler.routes()
            assert table.starting[0].wakes
            assert table.standby == (replica.app_name,)
            bed.cluster.instant = False
            await demands(1, cold={"tiny-qwen": 1})
            table = await scheduler.routes()
            assert [route.app_name for route in table.early] == [replica.app_name]
            bed.cluster.ready()
            bed.cluster.instant = True
            await demands(2, cold={"tiny-qwen": 1})
            assert await states(scheduler) == [DeploymentState.READY]
            assert not bed.cluster.apps[replica.app_name].asleep
            assert list(scheduler._core.state.replicas) == [replica.replica_id]
            await demands(1, tiny_qwen=1)
            kinds = {name.rpartition("/")[2] for name in scheduler._core.state.starts}
            assert kinds == {"cold", "asleep"}

    async def test_gpu_of_one_that_sleeps_is_free_and_is_taken_again_before_it_wakes(self, bed):
        """Two models take turns on one GPU; both keep their processes."""
        async with bed.opened() as scheduler:
            demands = Demands(bed, scheduler)
            for name in ("tiny-qwen", "tiny-embed"):
                await pool(scheduler, name, minimum=0, maximum=1)
            for asked in ["tiny-qwen", "tiny-embed"] * 3:
                await demands(14, cold={asked: 1})
                assert [r.model for r in (await scheduler.routes()).ready] == [asked]
                awake = [app for app in bed.cluster.apps.values() if not app.asleep]
                assert len(awake) == 1
            assert len(bed.cluster.started) > 4
            assert len(scheduler._core.state.replicas) == 2
            assert len(bed.cluster.apps) == 2

    async def test_lease_gets_the_gpu_of_one_that_sleeps_and_it_cannot_wake_there(self, bed):
        async with bed.opened() as scheduler:
            demands = await self.asleep(bed, scheduler)
            booked = await lease(scheduler, 1)
            await demands(10, cold={"tiny-qwen": 1})
            assert (await scheduler.lease(booked.lease_id)).state is LeaseState.ACTIVE
            assert DeploymentState.ASLEEP in await states(scheduler)

    async def test_sleeper_survives_the_schedulers_restart_and_not_its_own_death(self, bed):
        async with bed.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=1, keep_alive_s=5)
            demands = Demands(bed, scheduler)
            await demands(3, cold={"tiny-qwen": 1})
            await demands(15)
        async with bed.opened() as scheduler:
            demands = Demands(bed, scheduler)
            await demands(3)
            assert await states(scheduler) == [DeploymentState.ASLEEP]
            bed.cluster.apps.clear()
            bed.cluster.processes.clear()
            await demands(4)
            assert await states(scheduler) == [DeploymentState.COLD]
            await demands(3, cold={"tiny-qwen": 1})
            assert await states(scheduler) == [DeploymentState.READY]

    async def test_sleeps_no_longer_than_it_is_worth(self, bed):
        async with bed.opened() as scheduler:
            demands = await self.asleep(bed, scheduler)
            assert await states(scheduler) == [DeploymentState.ASLEEP]
            bed.clock.advance(86_400)
            await demands(3)
            assert await states(scheduler) == [DeploymentState.COLD]
            assert bed.cluster.apps == {}

    async def test_without_memory_for_it_nothing_sleeps(self, bed):
        bed.offers = [replace(bed.offers[0], memory_mib=1)]
        async with bed.opened() as scheduler:
            await self.asleep(bed, scheduler)
            assert await states(scheduler) == [DeploymentState.COLD]

    async def test_drained_node_is_left_by_those_that_sleep_on_it(self, bed):
        async with bed.opened() as scheduler:
            demands = await self.asleep(bed, scheduler)
            await scheduler.drain("farm")
            await demands(4)
            assert bed.cluster.apps == {}
            assert scheduler._core.state.replicas == {}

    async def test_undeployed_while_asleep_it_is_gone(self, bed):
        async with bed.opened() as scheduler:
            demands = await self.asleep(bed, scheduler)
            await scheduler.undeploy("tiny-qwen")
            await demands(4)
            assert bed.cluster.apps == {}
            assert await scheduler.deployments() == []


class TestResale:
    """A lease whose holder let idle time be sold serves its model's pool."""

    async def lent(self, farm, scheduler, **bounds):
        booked = await lease(scheduler, 1, resale=True)
        await pool(scheduler, **{"minimum": 0, "maximum": 1} | bounds)
        await Demands(farm, scheduler)(3)
        return booked

    async def test_its_replica_is_one_of_the_pool_with_its_holder_named(self, farm):
        async with farm.opened() as scheduler:
            booked = await self.lent(farm, scheduler)
            table = await scheduler.routes()
            (own,), (lent,) = table.ready, table.lent
            assert lent.app_name == own.app_name
            assert (lent.tenant_id, lent.lease_id, lent.lane) == (None, None, Lane.TOKENS)
            assert lent.loan == Loan(booked.lease_id, "acme")

    async def test_not_without_the_holders_consent_nor_without_a_pool(self, farm):
        async with farm.opened() as scheduler:
            await lease(scheduler, 1)
            await lease(scheduler, 2, resale=True, model="smollm2-135m")
            await Demands(farm, scheduler)(3)
            assert (await scheduler.routes()).lent == ()
            await pool(scheduler, "smollm2-135m", minimum=0, maximum=1)
            with pytest.raises(NoCapacity):
                await pool(scheduler, minimum=0, maximum=1)
            assert [r.model for r in (await scheduler.routes()).lent] == ["smollm2-135m"]

    async def test_what_runs_on_it_makes_the_pool_start_nothing(self, farm):
        async with farm.opened() as scheduler:
            await self.lent(farm, scheduler)
            (lent,) = (await scheduler.routes()).lent
            demands = Demands(farm, scheduler)
            await demands(5, borrowed={lent.app_name: 4}, tiny_qwen=4)
            assert DeploymentState.COLD in await states(scheduler)
            await demands(2, borrowed={lent.app_name: 4}, tiny_qwen=5)  # one is not on it
            assert DeploymentState.COLD not in await states(scheduler)

    async def test_its_places_are_the_pools_only_while_its_holder_is_idle(self, farm):
        async with farm.opened() as scheduler:
            booked = await self.lent(farm, scheduler)

            async def places(own):
                reports = {
                    name: PoolReport(running, 0, {}, {}, frozenset(), {})
                    for name, running in (("tiny-qwen", 1), (booked.lease_id, own))
                }
                report = GatewayReport("gw0", 1, reports, frozenset())
                share = (await scheduler.sync(report)).pools["tiny-qwen"]
                return share.places, share.lent

            assert await places(own=0) == (0, farm.config.sequences)
            assert await places(own=1) == (None, 0)

    async def test_no_longer_when_the_lease_is_over(self, farm):
        async with farm.opened() as scheduler:
            booked = await self.lent(farm, scheduler)
            await scheduler.release(booked.lease_id)
            assert (await scheduler.routes()).lent == ()


class TestForecast:
    async def test_pool_is_there_when_it_is_usually_asked_and_goes_if_nobody_comes(self, farm):
        """It was asked at the same time for three days, by the ledger's own rows."""
        async with farm.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=2, keep_alive_s=5)
            demands = Demands(farm, scheduler)
            await demands(2)
            assert await states(scheduler) == [DeploymentState.COLD]
            soon = int(farm.clock.now().timestamp() + 60) // BUCKET_S + 1
            days = range(1, 4)
            farm.ledger.asked = [("tiny-qwen", soon - day * DAY, 60, 900.0) for day in days]
            await scheduler._forecasts.refresh()
            begins_s = soon * BUCKET_S - farm.clock.now().timestamp()
            await demands(int(begins_s) - 20)
            assert await states(scheduler) == [DeploymentState.COLD]
            await demands(17)
            assert await states(scheduler) == [DeploymentState.READY]
            (reason,) = (await scheduler.scaling()).values()
            assert reason == "usual at this time of day"
            await demands(200)
            assert await states(scheduler) == [DeploymentState.COLD]

    async def test_whoever_asks_comes_before_whoever_is_expected(self, farm):
        """One GPU for one of two models: the one that is only usual makes room, and stays away."""
        farm.offers = [replace(FARM, gpus=(Gpu(0, "a10", 1500),))]
        async with farm.opened() as scheduler:
            demands = Demands(farm, scheduler)
            for name in ("tiny-qwen", "tiny-embed"):
                await pool(scheduler, name, minimum=0, maximum=1)
            now = int(farm.clock.now().timestamp()) // BUCKET_S
            farm.ledger.asked = [("tiny-qwen", now - day * DAY, 600, 900.0) for day in range(1, 4)]
            await scheduler._forecasts.refresh()
            await demands(3)
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-qwen"]
            await demands(20, cold={"tiny-embed": 1})
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-embed"]
            await demands(30, tiny_embed=1)
            assert [r.model for r in (await scheduler.routes()).ready] == ["tiny-embed"]

    async def test_weights_of_what_is_likely_are_read_into_memory(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=1)
            farm.cluster.pull(catalog.find("tiny-qwen"), FARM, pin=False, evict=False)
            await scheduler._disks.stored()
            await scheduler._disks.read_ahead()
            assert farm.cluster.disks["farm"]["tiny-qwen"].cached == 0
            now = int(farm.clock.now().timestamp()) // BUCKET_S + 1
            farm.ledger.asked = [("tiny-qwen", now - day * DAY, 1, 1.0) for day in range(1, 4)]
            await scheduler._forecasts.refresh()
            await scheduler._disks.read_ahead()
            await scheduler._disks.stored()
            assert scheduler._core.in_memory == {"farm": {"tiny-qwen"}}

    async def test_without_a_ledger_that_answers_nothing_is_forecast(self, farm):
        async with farm.opened() as scheduler:
            await pool(scheduler, minimum=0, maximum=2)
            await Demands(farm, scheduler)(3)
            assert await states(scheduler) == [DeploymentState.COLD]
