"""The scheduler over real SQL and a cluster that does what the test says."""

import asyncio
import contextlib

import pytest

from market.config import Config
from market.errors import Conflict, InvalidRequest, NoCapacity, NotFound
from market.fakes import FakeClock
from market.scheduler.service import Scheduler
from market.types import AppStatus, DeploymentState
from tests.samples import CARD
from tests.unit.test_placement import LAPTOP

RUNNING = AppStatus(running=True, failed=False, message="")


class FakeCluster:
    def __init__(self):
        self.apps = {}
        self.broken = set()

    def check(self, model, engine):
        if engine not in ("transformers", "vllm"):
            raise InvalidRequest(f"engine {engine} is unknown")

    def observe(self):
        return dict(self.apps)

    def start(self, deployment, offer):
        if deployment.model in self.broken:
            raise RuntimeError("cannot start this one")
        self.apps[deployment.app_name] = AppStatus(running=False, failed=False, message="")

    def remove(self, app_name):
        self.apps.pop(app_name, None)

    def ready(self):
        self.apps = dict.fromkeys(self.apps, RUNNING)


class FakePrices:
    async def rate_card(self, model):
        return None if model == "smollm2-360m" else CARD


@pytest.fixture
def box(tmp_path):
    return Config(tmp_path, "http://127.0.0.1:1"), FakeClock(), FakeCluster()


@contextlib.asynccontextmanager
async def opened(box):
    config, clock, cluster = box
    scheduler = Scheduler(config, clock, FakePrices(), cluster)
    await scheduler.open()
    await scheduler.offer(LAPTOP)
    try:
        yield scheduler
    finally:
        await scheduler.close()


async def deploy(scheduler, model="tiny-qwen", **changes):
    order = {"mode": "tokens", "engine": None, "replicas": 1, "dry_run": False} | changes
    return await scheduler.deploy(model, **order)


async def test_order_becomes_an_application_and_then_a_route(box):
    async with opened(box) as scheduler:
        ordered = await deploy(scheduler)
        assert (ordered.state, ordered.engine) == (DeploymentState.STARTING, "transformers")
        await scheduler._reconcile()
        assert (await scheduler.routes()).starting[0][0] == "tiny-qwen"
        box[2].ready()
        await scheduler._reconcile()
        (route,) = (await scheduler.routes()).ready
        assert (route.app_name, route.provider_id) == (ordered.app_name, "local")


async def test_restart_keeps_what_was_ordered_and_disturbs_nothing(box):
    async with opened(box) as scheduler:
        await deploy(scheduler)
        await scheduler._reconcile()
        box[2].ready()
        await scheduler._reconcile()
        before = await scheduler.deployments()
    async with opened(box) as scheduler:
        await scheduler._reconcile()
        assert await scheduler.deployments() == before


async def test_whole_cluster_lost_is_started_again(box):
    async with opened(box) as scheduler:
        await deploy(scheduler)
        await scheduler._reconcile()
        box[2].ready()
        await scheduler._reconcile()
        box[2].apps.clear()
        await scheduler._reconcile()
        assert (await scheduler.routes()).ready == ()
        assert len(box[2].apps) == 1


async def test_two_orders_at_once_become_one_deployment(box):
    async with opened(box) as scheduler:
        first, second = await asyncio.gather(deploy(scheduler), deploy(scheduler))
        assert first == second
        assert len(await scheduler.deployments()) == 1


async def test_one_that_cannot_start_does_not_starve_the_others(box):
    async with opened(box) as scheduler:
        box[2].broken.add("smollm2-135m")
        await deploy(scheduler, "smollm2-135m")
        ordered = await deploy(scheduler)
        await scheduler._reconcile()
        assert list(box[2].apps) == [ordered.app_name]


async def test_undeploy_removes_and_forgets(box):
    async with opened(box) as scheduler:
        await deploy(scheduler)
        await scheduler._reconcile()
        await scheduler.undeploy("tiny-qwen")
        await scheduler._reconcile()
        await scheduler._reconcile()
        assert (box[2].apps, await scheduler.deployments()) == ({}, [])
        with pytest.raises(NotFound):
            await scheduler.undeploy("tiny-qwen")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mode": "lease"}, InvalidRequest),
        ({"mode": "magic"}, InvalidRequest),
        ({"replicas": 0}, InvalidRequest),
        ({"engine": "magic"}, InvalidRequest),
        ({"model": "smollm2-360m"}, InvalidRequest),
        ({"model": "nothing-like-it"}, NotFound),
        ({"model": "qwen-7b"}, NoCapacity),
        ({"replicas": 60}, NoCapacity),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(box, changes, error):
    async with opened(box) as scheduler:
        with pytest.raises(error):
            await deploy(scheduler, **changes)
        assert await scheduler.deployments() == []


async def test_other_terms_for_a_deployed_model_conflict(box):
    async with opened(box) as scheduler:
        await deploy(scheduler)
        assert await deploy(scheduler) == (await scheduler.deployments())[0]
        for changes in ({"engine": "vllm"}, {"replicas": 2}):
            with pytest.raises(Conflict):
                await deploy(scheduler, **changes)


async def test_failed_deployment_keeps_its_reason_until_it_is_removed(box):
    async with opened(box) as scheduler:
        ordered = await deploy(scheduler)
        await scheduler._reconcile()
        box[2].apps[ordered.app_name] = AppStatus(running=False, failed=True, message="no memory")
        await scheduler._reconcile()
        (failed,) = await scheduler.deployments()
        assert (failed.state, failed.reason) == (DeploymentState.FAILED, "no memory")
        with pytest.raises(Conflict, match="no memory"):
            await deploy(scheduler)
