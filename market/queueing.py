"""Requests wait for a place at a pool, in fair order, in bounded queues, never in vain for long."""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from market import fairness
from market.errors import Overloaded, SlowDown
from market.fairness import FairQueue, PoolReport, PoolShare
from market.ports import Clock
from market.routing import Load

WAITING_MAX = 1024
WAITING_MAX_PER_TENANT = 256
# A request that would wait longer than this is refused at once, with the time after which to come
# again: a queue longer than anybody's patience serves only those who have left.
WAIT_MAX_S = 20.0
RATE_TAU_S = 10.0
# Weight of the newest time to a first token.
NEWEST = 0.2
# Less often than this is never.
RATE_MIN = 0.001
IDLE_POOL_S = 300.0


class Rate:
    """Events a second, each forgotten over ``RATE_TAU_S``; right from the first second on."""

    def __init__(self, now_s: float) -> None:
        self._began_s = self._last_s = now_s
        self._decayed = 0.0

    def add(self, now_s: float) -> None:
        """It happened."""
        self._decayed = self._decayed * self._kept(now_s - self._last_s) + 1
        self._last_s = now_s

    def get(self, now_s: float) -> float:
        """How often it happens."""
        observed_s = RATE_TAU_S * (1 - self._kept(max(1.0, now_s - self._began_s)))
        return self._decayed * self._kept(now_s - self._last_s) / observed_s

    def _kept(self, passed_s: float) -> float:
        return math.exp(-passed_s / RATE_TAU_S)


class Lately:
    """A moving mean that fades while nothing new comes.

    Who is passed over for a slow first token is tried again then, and what a first one after a
    while says counts for more than what was before.
    """

    def __init__(self) -> None:
        self._mean = self._at_s = 0.0

    def add(self, value: float, now_s: float) -> None:
        """It was so much this time."""
        old = (1 - NEWEST) * self._kept(now_s) if self._mean else 0.0
        self._mean, self._at_s = value + (self._mean - value) * old, now_s

    def get(self, now_s: float) -> float:
        """How much is to be expected."""
        return self._mean * self._kept(now_s)

    def _kept(self, now_s: float) -> float:
        return math.exp(-(now_s - self._at_s) / RATE_TAU_S)


@dataclass(slots=True)
class _Turns:
    """What one tenant had of a pool lately."""

    weight: int
    rate: Rate


@dataclass(slots=True)
class _Pool:
    queue: FairQueue
    waiters: dict[str, tuple[str, "asyncio.Future[None]"]] = field(default_factory=dict)
    finished: Rate | None = None
    turns: dict[str, _Turns] = field(default_factory=dict)
    ttft_s: Lately = field(default_factory=Lately)
    used_s: float = 0.0


class Queues:
    """One FairQueue per pool, with whoever waits in it.

    A pool is named by its model, a lease's replicas by the lease.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pools: dict[str, _Pool] = {}

    def check(self, pool_name: str, tenant: str) -> None:
        """Raises SlowDown if a request of this tenant would be refused; costs nothing."""
        pool = self._pools.get(pool_name)
        if pool is None:
            return
        wait_s = self._expected_wait_s(pool, tenant)
        if pool.queue.is_full(tenant) or wait_s > WAIT_MAX_S:
            own = pool.queue.waiting_of(tenant)
            raise SlowDown(
                f"{own} of your requests wait for {pool_name}; expected wait {wait_s:.0f} s",
                retry_after_s=max(1.0, wait_s - WAIT_MAX_S / 2),
            )

    async def enter(  # who, where, how much
        self,
        pool_name: str,
        request_id: str,
        tenant: str,
        weight: int,
        work: float,
        places: int,
        *,
        stays: bool = False,
    ) -> None:
        """Wait for a place. Raises SlowDown or Overloaded if the queue is full or too slow.

        ``places`` is the pool's size as far as is known, until the scheduler has said it. One that
        ``stays`` cannot use what is lent to the pool.
        """
        pool = self._pools.get(pool_name)
        if pool is None:
            queue = FairQueue(places, WAITING_MAX, WAITING_MAX_PER_TENANT)
            pool = self._pools[pool_name] = _Pool(queue)
        self.check(pool_name, tenant)
        pool.used_s = self._clock.monotonic()
        pool.turns.setdefault(tenant, _Turns(weight, Rate(pool.used_s))).weight = weight
        pool.queue.add(request_id, tenant, weight, work, stays=stays)
        future = asyncio.get_running_loop().create_future()
        pool.waiters[request_id] = (tenant, future)
        self._serve(pool)
        try:
            if not future.done():
                async with asyncio.timeout(2 * WAIT_MAX_S):
                    await future
        except TimeoutError:
            self._give_up(pool, request_id, tenant)
            raise Overloaded(
                f"no place at {pool_name} within {2 * WAIT_MAX_S:.0f} s", retry_after_s=WAIT_MAX_S
            ) from None
        except asyncio.CancelledError:
            self._give_up(pool, request_id, tenant)
            raise

    def begin(self, pool_name: str, ttft_s: float) -> None:
        """A request got its first token so long after it left the queue."""
        pool = self._pools.get(pool_name)
        if pool is not None:
            pool.ttft_s.add(ttft_s, self._clock.monotonic())

    def serve(self, pool_name: str, request_id: str, output_tokens: int) -> None:
        """A request was given output tokens."""
        pool = self._pools.get(pool_name)
        if pool is not None:
            pool.queue.serve(request_id, output_tokens)

    def leave(self, pool_name: str, request_id: str) -> None:
        """A request has ended: its place is free."""
        pool = self._pools.get(pool_name)
        if pool is None:
            return
        pool.used_s = self._clock.monotonic()
        pool.finished = pool.finished or Rate(pool.used_s)
        pool.finished.add(pool.used_s)
        pool.queue.finish(request_id)
        self._serve(pool)

    def reports(self) -> dict[str, PoolReport]:
        """What the scheduler must know of each pool; forgets pools that nobody uses."""
        now_s = self._clock.monotonic()
        for name, pool in list(self._pools.items()):
            gone = [t for t, turns in pool.turns.items() if turns.rate.get(now_s) < RATE_MIN]
            for tenant in set(gone) - pool.queue.weights().keys():
                del pool.turns[tenant]
            idle = not pool.queue.running and not pool.queue.waiting
            if idle and now_s - pool.used_s > IDLE_POOL_S:
                del self._pools[name]
            pool.queue.forget_gone()
        return {
            name: PoolReport(
                running=pool.queue.running,
                waiting=pool.queue.waiting,
                service=dict(pool.queue.service),
                weights=pool.queue.weights(),
                backlogged=pool.queue.counters.active,
                counters=pool.queue.counters.snapshot(),
                finished_per_s=0.0 if pool.finished is None else pool.finished.get(now_s),
            )
            for name, pool in self._pools.items()
        }

    def take_shares(self, shares: Iterable[tuple[str, PoolShare]]) -> None:
        """What the scheduler says of pools."""
        for name, share in shares:
            pool = self._pools.get(name)
            if pool is not None:
                fairness.merge(pool.queue, share)
                self._serve(pool)

    def load(self, pool_name: str, places: int) -> Load:
        """What a pool has to do; ``places`` as in ``enter``."""
        pool = self._pools.get(pool_name)
        if pool is None:
            return Load(0, 0, places)
        now_s, finished, queue = self._clock.monotonic(), pool.finished, pool.queue
        rate = 0.0 if finished is None else finished.get(now_s)
        places, ttft_s = queue.places + queue.lent, pool.ttft_s.get(now_s)
        return Load(queue.running, queue.waiting, places, rate, ttft_s)

    def waiting(self) -> dict[str, tuple[int, int]]:
        """(running, waiting) by pool."""
        return {name: (p.queue.running, p.queue.waiting) for name, p in self._pools.items()}

    def _serve(self, pool: _Pool) -> None:
        while True:
            request_id = pool.queue.take()
            if request_id is None:
                return
            tenant, future = pool.waiters.pop(request_id)
            now_s = self._clock.monotonic()
            pool.turns[tenant].rate.add(now_s)
            if not future.done():
                future.set_result(None)

    def _give_up(self, pool: _Pool, request_id: str, tenant: str) -> None:
        if pool.waiters.pop(request_id, None) is not None:
            pool.queue.cancel(request_id, tenant)
        else:  # it was its turn in this very moment
            pool.queue.finish(request_id)
            self._serve(pool)

    def _expected_wait_s(self, pool: _Pool, tenant: str) -> float:
        """How long a request that comes now waits, if all goes on as it does.

        It waits for the tenant's own queue: at the rate at which its requests had their turns
        lately, or at its share of the pool's rate by weight, which is what it gets at least.
        """
        own = pool.queue.waiting_of(tenant)
        if own == 0 or pool.finished is None:
            return 0.0
        now_s = self._clock.monotonic()
        turns = pool.turns[tenant]
        share = turns.weight / sum(other.weight for other in pool.turns.values())
        rate = max(turns.rate.get(now_s), share * pool.finished.get(now_s), RATE_MIN)
        return (own + 1) / rate
