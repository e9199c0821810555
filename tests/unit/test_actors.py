"""The host of a service and the proxy to it, with Ray's side played by the test."""

import asyncio
import pickle

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from market.cluster import actors
from market.cluster.actors import Answer, ServiceHost, proxy
from market.errors import InvalidRequest, MarketFault, Overloaded


class Service:
    """Opens on the ``opens_at``-th try."""

    def __init__(self, opens_at=1):
        self.tries, self.opens_at, self.calls = 0, opens_at, 0

    async def open(self):
        self.tries += 1
        if self.tries < self.opens_at:
            raise MarketFault("locked")

    async def double(self, number):
        self.calls += 1
        if number < 0:
            raise InvalidRequest("negative")
        return 2 * number

    def sync(self):
        return None


class FakeActor:
    """``actor.call.remote(...)``; ``mishaps`` are raised first."""

    def __init__(self, host, mishaps=()):
        self.mishaps, self.call, self.host = list(mishaps), self, host

    async def remote(self, method, arguments, keywords):
        if self.mishaps:
            raise self.mishaps.pop(0)
        return await self.host.call(method, arguments, keywords)


def hosted(opens_at=1):
    return ServiceHost(f"{__name__}:Service", opens_at)


@pytest.fixture
def reach(monkeypatch):
    def make(actor, retry_s=5.0):
        monkeypatch.setattr(actors, "PAUSE_S", 0.001)
        monkeypatch.setattr(actors, "RETRY_S", retry_s)
        monkeypatch.setattr(actors.ray, "get_actor", lambda name, namespace: actor)
        return proxy(Service, "service")

    return make


async def test_result_and_refusal_come_back_as_they_are(reach):
    client = reach(FakeActor(hosted()))
    assert await client.double(4) == 8
    with pytest.raises(InvalidRequest, match="negative"):
        await client.double(-1)


async def test_opens_once_for_many_calls():
    host = hosted()
    await asyncio.gather(*(host.call("double", (1,), {}) for _ in range(5)))
    assert host._service.tries == 1


async def test_service_that_cannot_open_yet_is_asked_again(reach):
    host = hosted(opens_at=3)
    assert await reach(FakeActor(host)).double(4) == 8
    assert host._service.tries == 3


async def test_service_that_never_opens_says_why(reach):
    client = reach(FakeActor(hosted(opens_at=10**9)), retry_s=0.05)
    with pytest.raises(Overloaded, match="cannot start: locked"):
        await client.double(4)


async def test_lost_answer_is_asked_for_again(reach):
    host = hosted()
    gone = ActorUnavailableError("gone", b"0" * 16)
    assert await reach(FakeActor(host, [gone, gone])).double(4) == 8


async def test_failed_command_is_final_whatever_its_cause_looks_like(reach):
    cause = RayTaskError("call", "traceback", ValueError("bug")).as_instanceof_cause()
    host = hosted()
    with pytest.raises(MarketFault) as caught:
        await reach(FakeActor(host, [cause])).double(4)
    assert "traceback" not in str(caught.value)
    assert host._service.calls == 0


async def test_actor_that_never_comes_is_overloaded(reach, monkeypatch):
    client = reach(None, retry_s=0.02)

    def nobody(name, namespace):
        raise ValueError("no such actor")

    monkeypatch.setattr(actors.ray, "get_actor", nobody)
    with pytest.raises(Overloaded):
        await client.double(1)


def test_only_coroutines_of_the_service_are_commands():
    client = proxy(Service, "service")
    for name in ("sync", "nothing", "_private"):
        with pytest.raises(AttributeError):
            getattr(client, name)
    assert pickle.loads(pickle.dumps(client)).double is not None
    assert Answer("done") is Answer.DONE
