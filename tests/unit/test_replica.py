"""A replica in its process: a spare until it has settings, asleep and awake, borrowed and owned."""

import asyncio
from dataclasses import replace

import msgspec
import pytest

from market.catalog import find
from market.credit import Credit
from market.errors import EngineFailed, MarketFault, Overloaded, Revoked
from market.fakes import FakeEngine
from market.types import EngineRequest, Place, Sampling, TokenCounts
from serve_apps import model
from serve_apps.frames import State
from serve_apps.model import ModelReplica, ReplicaSettings, build_spare, visible_gpus
from tests.boxes import FARM, LAPTOP
from tests.sleepy import SleepyEngine

PLACE = Place("farm", "farm", (1,), 500)
SETTINGS = ReplicaSettings("tiny-1", find("tiny-qwen"), "/nowhere", PLACE, True, 4, 5.0)
ASLEEP = replace(SETTINGS, asleep=True)
CARDS = replace(FARM, logical=False)


def request(**changes):
    made = EngineRequest("r", (1, 2, 3), Sampling(4), "acme")
    return msgspec.structs.replace(made, **changes)


async def answer(replica, **changes):
    chunks = replica.generate(request(**changes), Credit(100, final=True))
    return [chunk async for chunk in chunks]


@pytest.fixture
def engines():
    """Those that were started."""
    return []


@pytest.fixture
async def replica(monkeypatch, engines, tmp_path):
    async def start(name, settings):
        engines.append(SleepyEngine() if name == "sleepy" else FakeEngine())
        engines[-1].settings = settings
        return engines[-1]

    async def healthy():
        pass

    monkeypatch.setattr(FakeEngine, "check_health", staticmethod(healthy), raising=False)
    monkeypatch.setattr(FakeEngine, "kv_tokens", 100, raising=False)
    monkeypatch.setattr(model, "start_engine", start)
    monkeypatch.setattr(model, "warm_engine", lambda _name, rehearses: None)
    monkeypatch.setattr(model, "fetch", lambda *_, **__: tmp_path)
    monkeypatch.setenv(model.REPLICA_VARIABLE, "replica-1")
    monkeypatch.setattr(model.directory, "publish", lambda *_: None)
    monkeypatch.setattr(model.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    made = []

    async def make(engine="sleepy", settings=None):
        new = ModelReplica.__new__(ModelReplica)
        await new.__init__(engine)
        made.append(new)
        if settings is not None:
            await new.reconfigure(msgspec.to_builtins(settings))
        return new

    yield make
    for each in made:
        await each._link.stop(0)


async def test_spare_loads_when_it_is_told_what(replica, engines):
    spare = await replica()
    await spare.check_health()
    asked = asyncio.create_task(answer(spare))
    await asyncio.sleep(0)
    assert engines == []
    await spare.reconfigure(msgspec.to_builtins(SETTINGS))
    assert len(await asked) == 4  # who came too early waited
    assert spare._link._state == State(True, engines[0].kv_tokens)
    await spare.reconfigure(msgspec.to_builtins(SETTINGS))
    assert len(engines) == 1


async def test_spare_may_be_told_before_serve_does_and_never_against_it(replica, engines):
    spare = await replica()
    spare.adopt(msgspec.to_builtins(SETTINGS))  # it does not wait for the load
    await asyncio.sleep(0)
    assert spare._changing.locked()
    assert engines == []
    await spare.reconfigure(msgspec.to_builtins(SETTINGS))
    await spare.reconfigure(msgspec.to_builtins(ASLEEP))
    spare.adopt(msgspec.to_builtins(SETTINGS))
    await spare._adopting
    assert len(engines) == 1
    assert engines[0].asleep


@pytest.mark.parametrize(("offer", "rehearses"), [(LAPTOP, True), (FARM, True), (CARDS, False)])
def test_spare_touches_no_gpu_before_it_knows_its_own(offer, rehearses):
    bound = build_spare("spare-1", "transformers", offer)._bound_deployment
    assert bound.init_kwargs == {"rehearses": rehearses}


async def test_broken_engine_is_not_awake(replica, engines):
    own = await replica("fake", SETTINGS)
    await own.check_health()
    assert own._link._state.awake

    async def broken():
        raise EngineFailed("no more")

    engines[0].check_health = broken
    with pytest.raises(EngineFailed):
        await own.check_health()
    assert not own._link._state.awake


async def test_sleeps_when_the_last_answer_has_ended_and_wakes_in_place(replica, engines):
    own = await replica(settings=SETTINGS)
    await own._warming
    await own.reconfigure(msgspec.to_builtins(ASLEEP))
    assert engines[0].asleep
    assert not own._link._state.awake
    with pytest.raises(Overloaded):  # the sleep would wait for it, and it for the waking
        await answer(own)
    await own.reconfigure(msgspec.to_builtins(SETTINGS))
    assert [chunk.text for chunk in await answer(own)] == ["1 "] * 4
    assert len(engines) == 1


async def test_process_that_died_asleep_comes_back_without_its_gpu(replica, engines):
    own = await replica(settings=ASLEEP)
    assert engines == []
    await own.reconfigure(msgspec.to_builtins(SETTINGS))
    assert len(await answer(own)) == 4


async def test_engine_that_cannot_sleep_says_so(replica):
    own = await replica("fake", SETTINGS)
    with pytest.raises(MarketFault):
        await own.reconfigure(msgspec.to_builtins(ASLEEP))


async def test_what_is_left_of_an_answer_is_generated_and_the_whole_is_counted(replica):
    own = await replica(settings=SETTINGS)
    await own._warming
    chunks = await answer(own, prompt_token_ids=(1, 2, 3, 0, 1), resumed=2)
    assert [chunk.counts for chunk in chunks] == [TokenCounts(3, 0, 3), TokenCounts(3, 0, 4)]
    assert own._served_tokens == 4


async def test_holder_sends_borrowers_away_whose_tokens_are_told_by_who_finishes_them(
    replica, engines
):
    own = await replica("fake", SETTINGS)
    await own._warming
    engines[0].gate = asyncio.Semaphore(2)
    borrowed = asyncio.create_task(answer(own, request_id="b", borrowed=True))
    while len(engines[0].requests) < 2:
        await asyncio.sleep(0)
    holder = asyncio.create_task(answer(own, request_id="h"))
    with pytest.raises(Revoked):
        await borrowed
    assert own._served_tokens == 0
    with pytest.raises(Revoked):
        await answer(own, borrowed=True)
    engines[0].gate.release()
    for _ in range(8):
        engines[0].gate.release()
    assert len(await holder) == 4
    assert own._served_tokens == 4


def test_what_a_process_sees():
    assert visible_gpus(PLACE, True) == {}
    assert visible_gpus(PLACE, False) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert SETTINGS.gpu_fraction == 0
    assert replace(SETTINGS, logical=False).gpu_fraction == 0.5 * model.GPU_MEMORY_USED
    assert msgspec.convert(msgspec.to_builtins(ASLEEP), ReplicaSettings) == ASLEEP
