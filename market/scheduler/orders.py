"""Demand: orders become leases; renewals, moves, releases."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from market import crash, leases, matching, placement, pricing
from market.calendar import Oversubscribed
from market.errors import Conflict, InvalidRequest, MarketError, NoCapacity, NotFound
from market.leases import Event, Sight
from market.matching import Match, Misfit, micros
from market.placement import Classes, ShareRequest
from market.scheduler.core import Core
from market.types import (
    TERM_MAX_S,
    Bounds,
    Deployment,
    Lease,
    LeaseState,
    Mode,
    Order,
    OrderState,
    Replica,
    ReplicaState,
)

TERM_MIN_S = 10
CLASS_WINDOW = timedelta(days=7)
CLASSES_UNTIL = 200


@dataclass(frozen=True, slots=True)
class Quote:
    """What an order would get: a match, or why not; money in pico units."""

    match: Match | None
    reason: str
    earliest: datetime | None
    gpu_hour_pico: int = 0
    hour_pico: int = 0
    total_pico: int = 0
    held_pico: int = 0


class Orders:
    """Everything that grants GPUs to tenants or takes them back."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def place(self, order: Order, queue: bool) -> Order:
        """Match an order now; ``queue``: let it wait if nothing fits.

        Raises NoCapacity with the reason and the earliest start, InsufficientBalance,
        InvalidRequest, Conflict for an id that was used for another order.
        """
        await self._check(order)
        async with self._core.lock:
            await self._core.register()
            known = self._core.state.orders.get(order.order_id)
            if known is not None:
                if known.content != order.content:
                    raise Conflict(f"order id {order.order_id} was used for another order")
                if known.state in (OrderState.MATCHED, OrderState.WAITING):
                    return known
            quote = self._quote(order)
            if quote.match is not None:
                return await self._grant(order, quote.match)
            state = OrderState.WAITING if queue else OrderState.REFUSED
            order = replace(order, state=state, reason=quote.reason)
            await self._core.store.save([order])
            if queue:
                return order
        earliest = quote.earliest and quote.earliest.isoformat()
        raise NoCapacity(quote.reason, code="no_capacity", metadata={"earliest_start": earliest})

    async def quote(self, order: Order) -> Quote:
        """What the order would get right now; changes nothing."""
        await self._check(order)
        return self._quote(order)

    async def retry(self, now: datetime) -> None:
        """Try what waits again, oldest first. Under the lock."""
        waiting = [o for o in self._core.state.orders.values() if o.state is OrderState.WAITING]
        for order in sorted(waiting, key=lambda o: (o.created_at, o.order_id)):
            quote = self._quote(order)
            reason = quote.reason
            if quote.match is not None:
                try:
                    await self._grant(order, quote.match)
                    continue
                except MarketError as error:
                    reason = error.message
            if reason != order.reason:
                await self._core.store.save([replace(order, reason=reason)])

    async def cancel(self, order_id: str, tenant_id: str | None) -> Order:
        """Take a waiting order back. Raises NotFound, Conflict if it was matched."""
        async with self._core.lock:
            order = self._core.state.orders.get(order_id)
            if order is None or tenant_id not in (None, order.tenant_id):
                raise NotFound(f"no order {order_id!r}", code="order_not_found")
            if order.state is OrderState.MATCHED:
                raise Conflict(f"order {order_id} is lease {order.lease_id}; release that")
            cancelled = replace(order, state=OrderState.CANCELLED, reason="cancelled")
            await self._core.store.save([cancelled])
            return cancelled

    async def renew(self, lease_id: str, term: timedelta) -> Lease:
        """Let a lease last longer, at its price.

        Raises Conflict outside the window, or if another booking follows on its GPU.
        """
        core = self._core
        async with core.lock:
            lease = self._lease(lease_id)
            now = core.clock.now()
            end = leases.renewed_end(lease, term, now)
            offer = core.state.offers[lease.offer_id]
            if (end - lease.start).total_seconds() > offer.term_max_s:
                raise Conflict(f"{offer.offer_id} takes terms of at most {offer.term_max_s} s")
            if offer.available_until is not None and end > offer.available_until:
                raise Conflict(f"{offer.offer_id} is available until {offer.available_until}")
            try:
                core.calendar.extend(lease_id, micros(end))
            except Oversubscribed as error:
                raise Conflict(
                    f"lease {lease_id} cannot be renewed so long: {error}; try a shorter term"
                ) from error
            renewed = leases.step(replace(lease, end=end), Event.RENEW, now, f"renewed until {end}")
            await core.store.save([replace(renewed, noticed_at=None)])
            crash.reach("lease-renewed")
            return core.state.leases[lease_id]

    async def change(self, lease_id: str, resale: bool | None, policy: Mapping[str, Any]) -> Lease:
        """Sell a lease's idle time or not, and change these fields of a hybrid's policy.

        Raises NotFound, Conflict if it is over, InvalidRequest for the policy of what is no hybrid.
        """
        core = self._core
        async with core.lock:
            lease = self._lease(lease_id)
            if lease.state is LeaseState.CLOSED:
                raise Conflict(f"lease {lease_id} is over")
            changed: list[Lease | Deployment] = []
            if policy:
                deployment = core.state.deployments.get(lease_id)
                if deployment is None:
                    raise Conflict(f"lease {lease_id} is about to end")
                if deployment.policy is None:
                    raise InvalidRequest(
                        f"lease {lease_id} is no hybrid: it has no spill budget and no ttft"
                    )
                changed.append(replace(deployment, policy=replace(deployment.policy, **policy)))
            if resale is not None:
                changed.append(replace(lease, resale=resale))
            await core.store.save(changed)
            return core.state.leases[lease_id]

    async def close(self, lease_id: str, event: Event, sight: Sight, reason: str) -> Lease:
        """End a lease now; again is harmless. Raises NotFound."""
        async with self._core.lock:
            await self.close_locked(lease_id, event, sight, reason)
            return self._lease(lease_id)

    async def close_locked(self, lease_id: str, event: Event, sight: Sight, reason: str) -> None:
        """Like ``close``, for those who have the lock."""
        now = self._core.clock.now()
        self._lease(lease_id)
        await self._core.leasing.close(lease_id, event, now, sight, reason)
        self._core.unbook(lease_id, now)

    async def bind(self, lease: Lease) -> Lease:
        """Decide which GPU a floating lease gets: its start has come. Under the lock."""
        position = self._core.calendar.bind(lease.lease_id)
        offer = self._core.state.offers[lease.offer_id]
        bound = replace(lease, gpu_indices=matching.indices(offer, [position]))
        await self._core.store.save([bound, self._replica(bound, "booked")])
        crash.reach("lease-bound")
        return bound

    async def move(self, lease: Lease, reason: str) -> Lease | None:
        """Give a lease whose node is lost another place at no higher price, if there is one.

        Under the lock. The time until it serves there is credited.
        """
        core, now = self._core, self._core.clock.now()
        rest_s = int((lease.end - now).total_seconds())
        if rest_s < TERM_MIN_S or now < lease.start:
            return None
        order = replace(
            core.state.orders[lease.order_id],
            start=None,
            term_s=rest_s,
            max_price_pico=lease.gpu_hour_pico,
        )
        found = self._match(order)
        if isinstance(found, Misfit):
            return None
        old = core.replicas_of(lease.lease_id)
        moved = replace(
            lease,
            offer_id=found.offer.offer_id,
            provider_id=found.offer.provider_id,
            node_id=found.offer.node_id,
            gpu_type=found.offer.gpu_type,
            gpu_indices=found.place.gpu_indices,
            floating=False,
            reason=reason,
        )
        core.unbook(lease.lease_id, min(now, lease.start))
        start, end = micros(now), micros(lease.end)
        places = matching.positions(found.offer, moved.gpu_indices)
        core.calendar.book(lease.lease_id, moved.node_id, places, moved.gpu_milli, start, end)
        number = 1 + max((int(r.replica_id.rpartition("-")[2]) for r in old), default=-1)
        fresh = self._replica(moved, reason, number)
        gone = [replace(r, state=ReplicaState.STOPPING, reason=reason) for r in old]
        await core.store.save([moved, fresh, *gone])
        crash.reach("lease-moved")
        return moved

    def _lease(self, lease_id: str) -> Lease:
        lease = self._core.state.leases.get(lease_id)
        if lease is None:
            raise NotFound(f"no lease {lease_id!r} (market leases ls)", code="lease_not_found")
        return lease

    async def _check(self, order: Order) -> None:
        """Raises InvalidRequest or NotFound for an order that makes no sense."""
        model = self._core.find(order.model)
        if not (order.gpu_milli == 1000 and 1 <= order.gpu_count <= 64) and not (
            order.gpu_count == 1 and 1 <= order.gpu_milli < 1000
        ):
            raise InvalidRequest("gpus: a whole number from 1 to 64, or a share such as 0.5")
        if not TERM_MIN_S <= order.term_s <= TERM_MAX_S:
            raise InvalidRequest(
                f"term: from {TERM_MIN_S} s to {TERM_MAX_S // 86_400} days, e.g. 30d", param="term"
            )
        if order.start is not None:
            ahead = order.start - self._core.clock.now()
            if not timedelta(seconds=-60) <= ahead <= timedelta(seconds=TERM_MAX_S):
                raise InvalidRequest("start: from now to 182 days ahead", param="start")
        if await self._core.ledger.rate_card(model.name) is None:
            raise InvalidRequest(f"model {model.name} has no price, so it cannot be served")
        if order.policy is not None:
            self._check_hybrid(order)
        await asyncio.to_thread(self._core.cluster.check, model, order.engine)

    def _check_hybrid(self, order: Order) -> None:
        """Raises NoCapacity without a pool to spill to, Conflict if the tenant has a rule."""
        known = self._core.state.deployments.values()
        same = [d for d in known if d.model == order.model and not d.stopping]
        if not any(d.mode is Mode.TOKENS for d in same):
            raise NoCapacity(
                f"no pool of {order.model} that a hybrid could spill to; use --mode lease, or have "
                f"the operator open one (market deploy {order.model} --mode tokens)"
            )
        for other in same:
            own = other.tenant_id == order.tenant_id and other.policy is not None
            lease = self._core.state.leases.get(other.lease_id or "")
            if own and (lease is None or lease.order_id != order.order_id):
                raise Conflict(
                    f"{order.model} is deployed as {other.mode} by {other.deployment_id} already; "
                    "undeploy that first, or use --mode lease for more GPUs"
                )

    def _match(self, order: Order) -> Match | Misfit:
        core = self._core
        now, model = core.clock.now(), core.find(order.model)
        classes, on_disk = self._classes(now), core.on_disk
        return matching.match(order, model, core.offers, core.calendar, now, classes, on_disk)

    def _quote(self, order: Order) -> Quote:
        found = self._match(order)
        if isinstance(found, Misfit):
            return Quote(None, found.reason, found.earliest)
        lease = self._make(found, "quote")
        plan = leases.next_hold(lease, self._core.clock.now())
        assert plan is not None, lease
        return Quote(
            match=found,
            reason="",
            earliest=found.start,
            gpu_hour_pico=lease.gpu_hour_pico,
            hour_pico=lease.gpu_hour_pico * lease.total_milli // 1000,
            total_pico=leases.total_ceiling(lease),
            held_pico=plan.wanted_pico,
        )

    async def _grant(self, order: Order, match: Match) -> Order:
        """Hold the first hour, then store lease, deployment and replica together."""
        core, now = self._core, self._core.clock.now()
        if order.policy is not None:
            self._check_hybrid(order)  # it may have waited since it was checked
        lease = core.book_lease(self._make(match, self._fresh_id(now)))
        try:
            lease = await core.leasing.hold_first(lease, now)
            matched = await self._keep(order, lease, now)
        except BaseException:  # a hold without a lease is given back later
            core.unbook(lease.lease_id, lease.start)
            raise
        crash.reach("order-granted")
        return matched

    async def _keep(self, order: Order, lease: Lease, now: datetime) -> Order:
        matched = replace(order, state=OrderState.MATCHED, reason="", lease_id=lease.lease_id)
        deployment = Deployment(
            deployment_id=lease.lease_id,
            model=lease.model,
            mode=Mode.LEASE if order.policy is None else Mode.HYBRID,
            engine=lease.engine,
            bounds=Bounds(),
            created_at=now,
            tenant_id=lease.tenant_id,
            lease_id=lease.lease_id,
            policy=order.policy,
        )
        replicas = [self._replica(lease, "ordered")] if lease.gpu_indices else []
        await self._core.store.save([matched, lease, deployment, *replicas])
        return matched

    def _fresh_id(self, now: datetime) -> str:
        # The number tells leases of one second apart; the second, one whose crash left only a hold.
        return f"lease-{now:%y%m%d%H%M%S}-{len(self._core.state.leases) + 1}"

    def _make(self, match: Match, lease_id: str) -> Lease:
        order, offer = match.order, match.offer
        card = pricing.gpu_rate_card(offer.offer_id, offer.ask_pico, offer.priced_at)
        return Lease(
            lease_id=lease_id,
            order_id=order.order_id,
            tenant_id=order.tenant_id,
            api_key_id=order.api_key_id,
            model=order.model,
            engine=order.engine,
            offer_id=offer.offer_id,
            provider_id=offer.provider_id,
            node_id=offer.node_id,
            gpu_type=offer.gpu_type,
            gpu_indices=match.place.gpu_indices,
            gpu_count=order.gpu_count,
            gpu_milli=order.gpu_milli,
            price_id=card.price_id,
            gpu_hour_pico=offer.ask_pico,
            currency=offer.currency,
            start=match.start,
            end=match.end,
            created_at=self._core.clock.now(),
            metered_until=match.start,
            hold_from=match.start,
            covered_until=match.start,
            floating=not match.place.gpu_indices,
            resale=order.resale,
            reason="booked",
        )

    def _replica(self, lease: Lease, reason: str, number: int = 0) -> Replica:
        return Replica(
            replica_id=f"{lease.lease_id}-{number}",
            deployment_id=lease.lease_id,
            place=lease.place,
            state=ReplicaState.WAITING,
            reason=reason,
            created_at=self._core.clock.now(),
        )

    def _classes(self, now: datetime) -> Classes:
        """What is asked for here, from the last week's leases: FGD's workload distribution."""
        recent = [
            ShareRequest(lease.gpu_count, lease.gpu_milli, 0)
            for lease in self._core.state.leases.values()
            if lease.created_at > now - CLASS_WINDOW
        ]
        return placement.classes_of(recent[-CLASSES_UNTIL:])
