"""A lease from its first hold to its close: the story, over ports.

Segments are numbered into the outbox in the transaction that moves the lease's meter, so a crash
between any two lines neither loses nor repeats a charge; holds have ids derived from the lease, so
opening or ending one again changes nothing.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from market import crash, pricing
from market import leases as rules
from market.accounts import Hold, HoldResult, HoldState
from market.errors import InsufficientBalance, InvalidRequest, Overloaded
from market.leases import Event, HoldPlan, Segment, Sight
from market.types import (
    HoldRequest,
    Lane,
    Lease,
    LeaseState,
    RecordKind,
    UsageRecord,
)

PRODUCER = "scheduler"


class LeaseLedger(Protocol):
    """The part of the ledger that leases need."""

    async def open_hold(self, request: HoldRequest) -> HoldResult:
        """Reserve; doing it again with the same id returns the first result."""
        ...

    async def end_hold(self, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a hold; again is harmless."""
        ...

    async def open_holds(self) -> list[Hold]:
        """Holds that have not ended."""
        ...


class LeaseShelf(Protocol):
    """Where leases are kept."""

    @property
    def epoch(self) -> int:
        """Under which the scheduler's records are sent and its holds opened."""
        ...

    @property
    def leases(self) -> Mapping[str, Lease]:
        """All leases by id, as they are stored."""
        ...

    def unsent(self) -> Iterable[str]:
        """Leases with segments that the ledger does not have yet."""
        ...

    async def keep(self, lease: Lease, records: Sequence[UsageRecord]) -> None:
        """Store a lease and its new segments, both or neither."""
        ...


class Leasing:
    """What happens to leases; holds no state of its own."""

    def __init__(self, ledger: LeaseLedger, shelf: LeaseShelf) -> None:
        self._ledger = ledger
        self._shelf = shelf

    async def hold_first(self, lease: Lease, now: datetime) -> Lease:
        """The lease with its first hour paid for; nothing is stored yet.

        Raises InsufficientBalance that says what an hour costs.
        """
        plan = rules.next_hold(lease, now)
        assert plan is not None, lease
        held, available_pico = await self._hold(lease, plan, minimum_pico=plan.wanted_pico)
        if held is None:
            need, have = map(pricing.format_money, (plan.wanted_pico, available_pico))
            raise InsufficientBalance(
                f"the balance of {have} {lease.currency} does not cover the first hour: {need} "
                f"{lease.currency}; deposit more (market tenants deposit {lease.tenant_id} AMOUNT)",
                metadata={"needed": need, "available": have, "currency": lease.currency},
            )
        return held

    async def advance(self, lease_id: str, now: datetime, sight: Sight) -> None:
        """Meter what can be decided and do what time alone does: activate, notify, close."""
        lease = self._shelf.leases[lease_id]
        if lease.state is LeaseState.CLOSED:
            return
        event, decide = rules.due(lease, now), rules.meter
        if event is Event.RUN_DRY and await self.hold_ahead(lease_id, now):
            # The money is there: nobody asked in time, because scheduler or ledger was away. Or two
            # holds are open, and deciding all time without a replica ends the first.
            lease, event = self._shelf.leases[lease_id], None
            decide = rules.meter if sight.run is not None else rules.meter_to_end
        if event is not None:
            await self.close(lease_id, event, now, sight, _REASONS[event])
            return
        metered, segments = decide(lease, now, sight)
        if metered.state is LeaseState.PENDING and sight.run is not None and now >= lease.start:
            metered = rules.step(metered, Event.READY, now, "serving")
        if metered.noticed_at is None and now >= rules.noticed_from(metered):
            reason = f"ends at {metered.end:%Y-%m-%d %H:%M:%S} UTC unless it is renewed"
            metered = replace(metered, noticed_at=now, reason=reason)
        if metered != lease:
            await self._shelf.keep(metered, records(metered, segments))

    async def close(
        self, lease_id: str, event: Event, now: datetime, sight: Sight, reason: str
    ) -> None:
        """Meter to the end and close; closing again changes nothing."""
        lease = self._shelf.leases[lease_id]
        if lease.state is LeaseState.CLOSED:
            return
        segments: list[Segment] = []
        if lease.hold_index >= 0:
            lease, segments = rules.meter_to_end(lease, now, sight)
        closed = rules.step(lease, event, now, reason)
        await self._shelf.keep(closed, records(closed, segments))

    async def pause(self, lease_id: str, now: datetime, sight: Sight) -> None:
        """Charge what was healthy until now: nobody will look for a while."""
        lease = self._shelf.leases[lease_id]
        if lease.state is not LeaseState.CLOSED:
            metered, segments = rules.meter_to_end(lease, now, sight)
            await self._shelf.keep(
                replace(metered, run_replica=None, run_since=None), records(metered, segments)
            )

    async def hold_ahead(self, lease_id: str, now: datetime) -> bool:
        """Hold money for the next hour when it is time, or for as long as the balance lasts.

        False if the balance is out.
        """
        lease = self._shelf.leases[lease_id]
        plan = rules.next_hold(lease, now)
        if plan is None:
            return True
        held, available_pico = await self._hold(lease, plan, minimum_pico=plan.minimum_pico)
        granted = held is not None
        if held is None:
            need = pricing.format_money(plan.minimum_pico - available_pico)
            until = lease.covered_until + rules.GRACE
            held = replace(
                lease,
                reason=f"paid until {lease.covered_until:%H:%M:%S} UTC; it closes at "
                f"{until:%H:%M:%S} unless at least {need} {lease.currency} is deposited",
            )
        elif lease.reason.startswith("paid until"):
            held = replace(held, reason="serving" if held.activated_at else "booked")
        if held != lease:
            await self._shelf.keep(held, ())
        return granted

    async def end_finished(self, lease_id: str) -> None:
        """End holds that everything was charged against: what is left of them returns."""
        while True:
            lease = self._shelf.leases[lease_id]
            index = rules.finished_hold(lease)
            if index is None or lease_id in self._shelf.unsent():
                return
            # Unknown means ended long ago, and a crash kept us from noting it.
            with contextlib.suppress(InvalidRequest):
                await self._ledger.end_hold(PRODUCER, self._shelf.epoch, lease.hold_id(index))
            crash.reach("lease-hold-ended")
            await self._shelf.keep(replace(lease, ended_index=index), ())

    async def end_strangers(self) -> None:
        """Bring holds and leases together again: a crash or a lost answer came between the two.

        A hold that an open lease does not know of pays for it; one of no lease, or of a closed one,
        ends.
        """
        for hold in await self._ledger.open_holds():
            request = hold.request
            lease_id, _, number = request.hold_id.rpartition("-hold-")
            if request.producer != PRODUCER:
                continue
            lease = self._shelf.leases.get(lease_id)
            if lease is not None and int(number) <= lease.hold_index:
                continue
            if lease is None or lease.state is LeaseState.CLOSED:
                await self._ledger.end_hold(PRODUCER, self._shelf.epoch, request.hold_id)
                crash.reach("stranger-ended")
            else:
                await self._shelf.keep(_with_found(lease, int(number), hold.amount_pico), ())

    async def _hold(
        self, lease: Lease, plan: HoldPlan, minimum_pico: int
    ) -> tuple[Lease | None, int]:
        """The lease with the hold, None if it was refused; and what else is available."""
        result = await self._ledger.open_hold(
            HoldRequest(
                hold_id=lease.hold_id(plan.index),
                producer=PRODUCER,
                epoch=self._shelf.epoch,
                tenant_id=lease.tenant_id,
                api_key_id=lease.api_key_id,
                wanted_pico=plan.wanted_pico,
                minimum_pico=minimum_pico,
                model=lease.model,
                lane=Lane.LEASE,
                currency=lease.currency,
                started_at=plan.start,
            )
        )
        crash.reach("lease-held")
        hold = result.hold
        if hold is None:
            return None, result.available_pico
        if hold.state is not HoldState.PENDING or hold.request.tenant_id != lease.tenant_id:
            raise Overloaded(
                f"hold {hold.request.hold_id} is of an order that broke off in this very second; "
                "try again in the next",
                retry_after_s=1,
            )
        return rules.with_hold(lease, plan, hold.amount_pico), result.available_pico


def records(lease: Lease, segments: Sequence[Segment]) -> list[UsageRecord]:
    """Segments as rows of the usage ledger; credited time has charge 0 and says why."""
    return [
        UsageRecord(
            kind=RecordKind.GPU,
            request_id=None,
            tenant_id=lease.tenant_id,
            api_key_id=lease.api_key_id,
            model=lease.model,
            lane=Lane.LEASE,
            deployment_id=lease.lease_id,
            provider_id=lease.provider_id,
            node_id=lease.node_id,
            gpu_type=lease.gpu_type,
            gpu_milli=lease.total_milli,
            started_at=segment.start,
            finished_at=segment.end,
            input_tokens=0,
            cached_input_tokens=0,
            output_tokens=0,
            price_id=lease.price_id,
            charge_pico=segment.charge_pico,
            currency=lease.currency,
            finish_reason=None,
            lease_id=lease.lease_id,
            slice_id=lease.hold_id(segment.hold_index),
            gpu_us=segment.gpu_us,
            attrs=_credit(segment),
        )
        for segment in segments
    ]


def _with_found(lease: Lease, index: int, amount_pico: int) -> Lease:
    """The lease with a hold that was opened for it: it covers what its money pays for."""
    rest = replace(lease, start=lease.covered_until)
    whole_pico = rules.total_ceiling(rest)
    plan = HoldPlan(index, rest.start, rest.end, whole_pico, minimum_pico=0)
    return rules.with_hold(lease, plan, amount_pico)


def _credit(segment: Segment) -> tuple[tuple[str, str], ...]:
    if not segment.credited_us:
        return ()
    return (("credited_us", str(segment.credited_us)), ("credit_reason", segment.reason))


_REASONS = {
    Event.EXPIRE: "its term is over",
    Event.RUN_DRY: "the balance was out for longer than the grace period",
}
