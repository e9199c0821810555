"""Waiting for a place: fair, bounded, and given up without a trace."""

import asyncio

import pytest

from market import queueing
from market.errors import Overloaded, SlowDown
from market.fairness import PoolShare
from market.fakes import FakeClock
from market.queueing import IDLE_POOL_S, RATE_TAU_S, WAITING_MAX_PER_TENANT, Lately, Queues


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def queues(clock):
    return Queues(clock)


async def enter(queues, request_id, tenant="acme", weight=1, work=1.0, places=1):
    await queues.enter("pool", request_id, tenant, weight, work, places)
    return request_id


def waiting(queues, *names, **options):
    return [asyncio.create_task(enter(queues, name, **options)) for name in names]


async def test_who_must_stay_waits_for_an_own_place_and_is_not_overtaken(queues):
    """Two own places and two that are lent: only who can leave again goes onto those."""
    queues.take_shares([("pool", PoolShare(2, {}, {}, False, lent=2))])
    await enter(queues, "r1", places=2)
    queues.take_shares([("pool", PoolShare(2, {}, {}, False, lent=2))])
    await enter(queues, "r2")
    await enter(queues, "r3")
    stays = asyncio.create_task(queues.enter("pool", "s", "acme", 1, 1.0, 2, stays=True))
    await settle()
    (moves,) = waiting(queues, "r4")
    await settle()
    assert queues.waiting() == {"pool": (3, 2)}
    queues.leave("pool", "r1")
    await settle()
    assert not stays.done()  # two are left, perhaps on the pool's own
    queues.leave("pool", "r2")
    await stays
    await moves
    assert queues.waiting() == {"pool": (3, 0)}


async def test_where_all_places_are_lent_who_must_stay_goes_on_to_start_the_pool(queues):
    await enter(queues, "r1")
    queues.take_shares([("pool", PoolShare(0, {}, {}, False, lent=2))])
    await queues.enter("pool", "s", "acme", 1, 1.0, 1, stays=True)
    assert queues.waiting() == {"pool": (2, 0)}


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_free_place_is_given_at_once(queues):
    assert await enter(queues, "r1") == "r1"
    assert queues.waiting() == {"pool": (1, 0)}


async def test_who_waits_goes_on_when_a_place_is_free(queues):
    await enter(queues, "r1")
    (second,) = waiting(queues, "r2")
    await settle()
    assert not second.done()
    queues.leave("pool", "r1")
    assert await second == "r2"


async def test_the_order_is_fair_between_tenants_not_that_of_arrival(queues):
    await enter(queues, "busy", tenant="flood")
    floods = waiting(queues, *(f"f{n}" for n in range(5)), tenant="flood", work=10.0)
    await settle()
    (quiet,) = waiting(queues, "q", tenant="quiet", work=10.0)
    await settle()
    queues.leave("pool", "busy")
    await settle()
    queues.leave("pool", "f0" if floods[0].done() else "q")
    await settle()
    assert quiet.done()
    for task in floods:
        task.cancel()


async def test_a_tenant_that_floods_is_refused_and_told_when_to_come_again(queues, clock):
    await enter(queues, "first")
    tasks = waiting(queues, *(f"r{n}" for n in range(WAITING_MAX_PER_TENANT)))
    await settle()
    with pytest.raises(SlowDown) as caught:
        await enter(queues, "more")
    assert caught.value.http_status == 429
    assert caught.value.retry_after_s >= 1
    await enter(queues, "o", tenant="other")  # is not refused, nor does it wait
    for task in tasks:
        task.cancel()


async def test_a_wait_longer_than_anybodys_patience_is_refused_at_once(queues, clock):
    await enter(queues, "r0")
    tasks = waiting(queues, *(f"r{n}" for n in range(1, 60)))
    await settle()  # nothing is known yet of how fast the pool is
    for n in range(30):  # one a second
        clock.advance(1)
        queues.leave("pool", f"r{n}")
        await settle()
    with pytest.raises(SlowDown, match="expected wait 28 s"):
        await enter(queues, "late")
    for task in tasks:
        task.cancel()


async def test_who_gives_up_leaves_no_place_taken(queues):
    await enter(queues, "r1")
    gone, stays = waiting(queues, "r2", "r3")
    await settle()
    gone.cancel()
    await settle()
    queues.leave("pool", "r1")
    assert await stays == "r3"
    assert queues.waiting() == {"pool": (1, 0)}


async def test_who_gives_up_when_its_turn_comes_passes_it_on(queues):
    await enter(queues, "r1")
    gone, stays = waiting(queues, "r2", "r3")
    await settle()
    queues.leave("pool", "r1")  # r2 has the place, but its task has not run yet
    gone.cancel()
    assert await stays == "r3"


async def test_no_place_in_time_is_503(queues, monkeypatch):
    monkeypatch.setattr(queueing, "WAIT_MAX_S", 0.01)
    await enter(queues, "r1")
    with pytest.raises(Overloaded) as caught:
        await enter(queues, "r2")
    assert caught.value.http_status == 503
    assert queues.waiting() == {"pool": (1, 0)}


async def test_places_follow_the_scheduler(queues):
    await enter(queues, "r1")
    (second,) = waiting(queues, "r2")
    await settle()
    queues.take_shares(
        [("pool", PoolShare(2, {}, {}, False)), ("other", PoolShare(1, {}, {}, False))]
    )
    assert await second == "r2"
    # Nobody knows the places while no replica is ready: what was known stays.
    queues.take_shares([("pool", PoolShare(None, {}, {}, False))])
    queues.leave("pool", "r1")
    assert await enter(queues, "r3") == "r3"


async def test_reports_count_what_was_given_and_idle_pools_are_forgotten(queues, clock):
    await enter(queues, "r1", weight=3, work=5.0)
    queues.serve("pool", "r1", 10)
    report = queues.reports()["pool"]
    assert (report.running, report.waiting) == (1, 0)
    assert report.service == {"acme": 25.0}
    assert report.weights == {"acme": 3}
    assert report.counters["acme"] == pytest.approx(25 / 3)
    queues.leave("pool", "r1")
    clock.advance(IDLE_POOL_S + 1)
    assert queues.reports() == {}


async def test_a_flood_that_gets_little_beside_others_is_told_by_what_it_gets(queues, clock):
    """Others whose queues are empty right now will be back: they count."""
    for n in range(200):  # ten turns a second, nine of them of others, who hardly wait
        tenant = "flood" if n % 10 == 0 else "other"
        await enter(queues, f"r{n}", tenant=tenant, weight=1 if tenant == "flood" else 9)
        clock.advance(0.1)
        queues.leave("pool", f"r{n}")
    await enter(queues, "last", tenant="flood")
    tasks = waiting(queues, *(f"f{n}" for n in range(30)), tenant="flood")
    await settle()
    refused = [t for t in tasks if t.done() and isinstance(t.exception(), SlowDown)]
    assert len(refused) in range(5, 13)  # about 20 get a turn in 20 s
    for task in tasks:
        task.cancel()


async def test_slow_first_token_is_forgotten_also_while_others_are_served(queues, clock):
    """Else a lease that is passed over for it would be so until its last answer has ended."""
    for n in range(10):
        await enter(queues, f"r{n}", places=16)
    queues.begin("pool", 30.0)
    for n in range(10):
        clock.advance(3)
        queues.leave("pool", f"r{n}")
    assert queues.load("pool", 16).first_token_s < 2


def test_what_comes_after_a_while_counts_for_more_than_what_was_before():
    seldom, often = Lately(), Lately()
    for mean, every_s in ((seldom, 3 * RATE_TAU_S), (often, 0.1)):
        mean.add(30.0, 0.0)
        mean.add(1.0, every_s)
    assert seldom.get(3 * RATE_TAU_S) < 3
    assert often.get(0.1) > 20


@pytest.mark.parametrize("every_s", [0.1, 5.0, 60.0])
def test_what_is_always_the_same_is_expected_however_often_it_comes(every_s):
    mean = Lately()
    for n in range(20):
        mean.add(3.0, n * every_s)
    assert mean.get(19 * every_s) == pytest.approx(3.0)
