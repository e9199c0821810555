"""Routes of replicas that start: used as soon as the replica itself says that it is awake."""

import asyncio
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from market.config import Config
from market.errors import NoCapacity, Overloaded
from market.types import Lane, NotReady, RouteTable
from serve_apps import live
from serve_apps.frames import State
from serve_apps.link import Address, LinkServer
from serve_apps.live import LiveRoutes
from serve_apps.tokenization import Prompters
from tests.samples import ACME, CARD, ROUTE

COLD = NotReady(ROUTE.model, ROUTE.deployment_id, None, "cold", wakes=True)
STARTING = replace(COLD, reason="starting")


class Prices:
    async def balance(self, _tenant):
        return SimpleNamespace(balance_pico=1)


@pytest.fixture
async def here(tmp_path, monkeypatch):
    """Routes over what the test says is the table, and a replica's process that listens."""

    async def nothing(_request, _credit):
        yield

    monkeypatch.setattr(Prompters, "load_ahead", lambda _self, _model: None)
    server = LinkServer(nothing)
    await server.start("127.0.0.1")

    async def exchange():
        return routes.told

    def find_entry(app):
        if app != ROUTE.app_name:
            return None
        return Address("127.0.0.1", server.port, server.secret).pack()

    config = Config(tmp_path, "http://127.0.0.1:1")
    routes = LiveRoutes(config, exchange, Prices(), lambda: {ROUTE.model: CARD}, find_entry)
    routes.server, routes.told = server, RouteTable((), (COLD,))
    await routes.refresh()
    yield routes
    for link in routes._engines.values():
        await link.close()
    await end(server)


async def end(server):
    """What a process that dies does to its connections."""
    await server.stop(0)
    for peer in server._peers:
        peer._writer.close()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def link_of(routes):
    return routes._engines.get(ROUTE.app_name) or SimpleNamespace(connected=False, awake=False)


async def told(routes, **changes):
    routes.told = replace(routes.told, **changes)
    await routes.refresh()


async def test_request_goes_as_soon_as_the_process_is_awake(here):
    await told(here, standby=(ROUTE.app_name,))
    await until(lambda: link_of(here).connected)
    asking = asyncio.create_task(here.awake(ROUTE.model, ACME))
    await told(here, starting=(STARTING,), early=(ROUTE,), standby=())
    assert not asking.done()
    here.server.tell(State(True, 0))  # and nobody refreshes any more
    assert await asyncio.wait_for(asking, 5) == ROUTE
    assert here.cold() == {}


@pytest.mark.parametrize("hangs", [True, False])
async def test_scheduler_that_is_away_holds_nobody_up_who_can_be_told(here, monkeypatch, hangs):
    """A hybrid spills by what is known; who can only wait for its lease comes again."""

    async def away():
        if hangs:
            await asyncio.Event().wait()
        raise Overloaded("the scheduler does not answer", retry_after_s=5)

    leased = NotReady(ROUTE.model, "lease-1", "acme", "starting")
    await told(here, starting=(COLD, leased))
    monkeypatch.setattr(live, "LOOK_S", 0.05)
    monkeypatch.setattr(here, "_exchange", away)
    await asyncio.wait_for(here.look(), 5)
    with pytest.raises(NoCapacity) as caught:
        await asyncio.wait_for(here.route(ROUTE.model, ACME), 5)
    assert (caught.value.code, caught.value.retry_after_s) == ("model_loading", 5)


async def test_next_table_that_does_not_know_it_yet_takes_it_not_away(here):
    here.server.tell(State(True, 0))
    await told(here, starting=(STARTING,), early=(ROUTE,))
    await until(lambda: here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE)
    await told(here)
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE
    await told(here, starting=(), early=(), ready=(ROUTE,))
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE


async def test_process_that_is_lost_before_it_is_seen_ready_gets_nothing(here):
    here.server.tell(State(True, 0))
    await told(here, starting=(STARTING,), early=(ROUTE,))
    await until(lambda: here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE)
    await end(here.server)
    await until(lambda: not link_of(here).awake)
    await told(here)
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == STARTING


async def test_one_that_was_withdrawn_must_say_again_that_it_is_awake(here):
    here.server.tell(State(True, 100))
    await told(here, starting=(), ready=(ROUTE,))
    await until(lambda: link_of(here).awake)
    await told(here, starting=(STARTING,), ready=(), early=(ROUTE,))
    await told(here)
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == STARTING
    here.server.tell(State(True, 0))
    await until(lambda: here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE)


async def test_link_stays_while_another_replica_is_seen_ready_first(here):
    here.server.tell(State(True, 0))
    await told(here, early=(ROUTE,))
    await until(lambda: here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE)
    link = here._engines[ROUTE.app_name]
    other = replace(ROUTE, app_name="model-none")
    await told(here, starting=(), ready=(other,), early=(ROUTE,))
    await told(here, ready=(other, ROUTE), early=())
    assert here._engines[ROUTE.app_name] is link


async def test_spare_process_that_is_awake_for_nobody_is_no_route(here):
    here.server.tell(State(True, 0))
    await told(here, standby=(ROUTE.app_name,))
    await until(lambda: link_of(here).awake)
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == COLD


async def test_one_whose_address_is_not_known_gets_nothing_while_another_serves(here):
    lost = replace(ROUTE, app_name="another")
    await told(here, starting=(), ready=(lost, ROUTE))
    await until(lambda: link_of(here).connected)
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == ROUTE


async def test_store_of_addresses_that_does_not_answer_holds_no_table_up(here, monkeypatch):
    answers, find_entry = threading.Event(), here._find_entry

    def slow(app):
        answers.wait(10)
        return find_entry(app)

    monkeypatch.setattr(here, "_find_entry", slow)
    for _ in range(3):
        await asyncio.wait_for(told(here, starting=(), ready=(ROUTE,)), 5)
    assert not link_of(here).connected
    answers.set()
    await until(lambda: link_of(here).connected)


async def test_application_that_is_not_there_yet_is_no_route(here):
    await told(here, starting=(STARTING,), early=(replace(ROUTE, app_name="model-none"),))
    assert here.pool(ROUTE.model, ACME, Lane.TOKENS) == STARTING


class TestColdQueue:
    """Who waits for a model to start: so many, so long, and no trace of those that left."""

    @pytest.fixture
    async def full(self, here):
        """A model that as many tenants wait for as may."""
        asking = self.ask(here, *(f"tenant-{n}" for n in range(live.COLD_MAX)))
        await until(lambda: here.cold() == {ROUTE.model: live.COLD_MAX})
        yield asking
        for task in asking:
            task.cancel()

    def ask(self, here, *tenants):
        callers = [replace(ACME, subject_id=tenant) for tenant in tenants]
        return [asyncio.create_task(here.awake(ROUTE.model, caller)) for caller in callers]

    async def test_one_more_than_a_model_has_room_for_comes_again(self, here, full):
        with pytest.raises(NoCapacity, match="256 request") as caught:
            await here.awake(ROUTE.model, ACME)
        told = caught.value.code, caught.value.retry_after_s
        assert told == ("model_loading", live.COLD_RETRY_S)
        assert not any(task.done() for task in full)

    async def test_room_is_there_again_when_somebody_hangs_up(self, here, full):
        full[0].cancel()
        await until(full[0].done)
        (late,) = self.ask(here, "late")
        await until(lambda: here.cold() == {ROUTE.model: live.COLD_MAX})
        for task in (late, *full):
            task.cancel()
        await asyncio.gather(late, *full, return_exceptions=True)
        assert here.cold() == {}

    async def test_one_tenant_leaves_room_for_others(self, here):
        many = self.ask(here, *["acme"] * (live.COLD_MAX_PER_TENANT + 1))
        await until(lambda: many[-1].done())
        assert isinstance(many[-1].exception(), NoCapacity)
        assert many[-1].exception().retry_after_s == live.COLD_RETRY_S
        assert here.cold() == {ROUTE.model: live.COLD_MAX_PER_TENANT}
        (other,) = self.ask(here, "other")
        await until(lambda: here.cold() == {ROUTE.model: live.COLD_MAX_PER_TENANT + 1})
        await told(here, starting=(), ready=(ROUTE,))
        assert await asyncio.gather(*many[:-1], other) == [ROUTE] * len(many)
        assert here.cold() == {}

    async def test_who_waited_long_enough_comes_again(self, here, monkeypatch):
        monkeypatch.setattr(live, "COLD_WAIT_S", 0.02)
        with pytest.raises(NoCapacity, match="did not start within") as caught:
            await asyncio.wait_for(here.awake(ROUTE.model, ACME), 5)
        assert caught.value.retry_after_s == live.COLD_RETRY_S
        assert here.cold() == {}
