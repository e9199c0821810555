"""How a gateway comes by money: reserve from slices, ask for more ahead of need, give back.

The way of a request leads through here once at its start and once at its end, without a call, as
long as the slice has enough. One task per purse asks for grants; who must wait, waits in line.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from market import pricing, slices
from market.accounts import HoldResult, HoldStatus
from market.errors import (
    InsufficientBalance,
    InvalidRequest,
    MarketError,
    MarketFault,
    SpillsSpent,
)
from market.ports import Clock, Grants, Returns, UsageSink
from market.slices import IDLE_S, MAX_AGE_S, Need, Purse, PurseKey, Reservation, Slice
from market.types import HoldChange, HoldRequest, Lane, PackLeft, RateCard, SliceAsk

logger = logging.getLogger(__name__)

# How long a request waits for money that other gateways hold and are asked to give back.
RECALL_PATIENCE_S = 2.0
RECALL_POLL_S = 0.1
HOUSE_S = 1.0
# Where there is no money to hold ahead, it is asked for again only after this.
DRY_S = 1.0


@dataclass(slots=True)
class _Waiter:
    """A request that waits for its reservation, or for the next block of its answer."""

    need: Need
    card: RateCard
    weight: int
    deadline_s: float
    reservation: Reservation | None = None
    extended_tokens: int = 0
    done: "asyncio.Future[Reservation]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def target(self, purse: Purse) -> tuple[Slice | None, PackLeft | None]:
        """The slice that must grow, or the pack (None: the balance) to open one on."""
        if self.reservation is not None:
            return self.reservation.slice, None
        offer = purse.payer(self.need)
        if offer is None:
            return purse.current, None
        return purse.packs.get(offer.pack.pack_id), offer

    def pico(self, offer: PackLeft | None) -> int:
        """What it needs at least."""
        if self.reservation is not None:
            return self.reservation.card.output_pico  # one token more is better than none
        return self.need.first(self.card) if offer is None else self.need.most(offer.card)

    def wanted(self, offer: PackLeft | None) -> int:
        """What it would like."""
        if self.reservation is not None:
            return self.need.block_tokens * self.reservation.card.output_pico
        return self.pico(offer)

    def attempt(self, purse: Purse, now_s: float) -> bool:
        """Whether it has what it needs now."""
        if self.reservation is None:
            found = purse.reserve(self.need, self.card, now_s)
            if found is None:
                return False
            self.done.set_result(found)
            return True
        price = self.reservation.card.output_pico
        fits = min(self.need.block_tokens, max(0, self.reservation.slice.free_pico // price))
        if fits < 1 or not slices.extend(self.reservation, fits):
            return False
        self.extended_tokens = fits
        self.done.set_result(self.reservation)
        return True


class Slices:
    """All purses of a gateway."""

    def __init__(self, clock: Clock, grants: Grants, returns: Returns, sink: UsageSink) -> None:
        self._clock = clock
        self._grants = grants
        self._returns = returns
        self._sink = sink
        self._purses: dict[PurseKey, Purse] = {}
        self._waiting: dict[PurseKey, deque[_Waiter]] = {}
        self._renewing: dict[PurseKey, asyncio.Task[None]] = {}
        self._locks: dict[PurseKey, asyncio.Lock] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._last = 0
        self._grants_asked = 0

    async def reserve(
        self, key: PurseKey, need: Need, card: RateCard, weight: int = 1
    ) -> Reservation:
        """Money for a request. Raises InsufficientBalance that says what would fit."""
        purse = self._purses.setdefault(key, Purse(key))
        now_s = self._clock.monotonic()
        found = purse.reserve(need, card, now_s) if not self._waiting.get(key) else None
        if found is None:
            waiter = _Waiter(need, card, weight, now_s + RECALL_PATIENCE_S)
            found = await self._wait(key, waiter)
        self._renew_if_short(key, found, weight)
        return found

    def extend(self, key: PurseKey, reservation: Reservation, tokens: int) -> bool:
        """Another block for an answer, if the slice has it."""
        done = slices.extend(reservation, tokens)
        self._renew_if_short(key, reservation, weight=1)
        return done

    async def extend_or_wait(
        self, key: PurseKey, reservation: Reservation, tokens: int, weight: int = 1
    ) -> int:
        """Another block for an answer, or what can be had of it; returns the tokens, perhaps 0.

        Raises MarketError if it could not be asked for.
        """
        if self.extend(key, reservation, tokens):
            return tokens
        deadline_s = self._clock.monotonic() + RECALL_PATIENCE_S
        need = Need(0, tokens, tokens)
        waiter = _Waiter(need, reservation.card, weight, deadline_s, reservation)
        try:
            await self._wait(key, waiter)
        except MarketError as error:
            if error.http_status != InsufficientBalance.http_status:
                raise
            logger.info("an answer of %s ends for want of money: %s", key.tenant_id, error)
        return waiter.extended_tokens

    def settle(self, reservation: Reservation, charge_pico: int) -> None:
        """The request has ended; call it just before its record is given to the sink."""
        slices.settle(reservation, charge_pico, self._clock.monotonic())

    def release(self, reservation: Reservation) -> None:
        """The request's record is safe, or there is none."""
        part = reservation.slice
        part.requests -= 1
        part.last_seq = max(part.last_seq, self._sink.next_seq - 1)

    def recall(self, tenants: Iterable[str]) -> None:
        """Other gateways need these tenants' money: give back what is free."""
        wanted = set(tenants)
        for key in [key for key in self._purses if key.tenant_id in wanted]:
            self._spawn(self._shrink(key, leave_ahead=False))

    def take_grants_asked(self) -> int:
        """How many grants were asked for since the last call."""
        asked, self._grants_asked = self._grants_asked, 0
        return asked

    async def keep_house_forever(self) -> None:
        """End what is idle or old, give back what is more than needed."""
        while True:
            await asyncio.sleep(HOUSE_S)
            for key in list(self._purses):
                try:
                    await self._tidy(key)
                except MarketError as error:
                    logger.warning("slices of %s: %s", key.tenant_id, error)

    async def close(self) -> None:
        """Give everything back; all records must be booked."""
        tasks = [*self._renewing.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for key, purse in list(self._purses.items()):
            for part in list(purse.slices()):
                if not part.closing:
                    purse.drop(part)
            await self._end_closed(key)

    # -- asking --------------------------------------------------------------------------------

    async def _wait(self, key: PurseKey, waiter: _Waiter) -> Reservation:
        line = self._waiting.setdefault(key, deque())
        line.append(waiter)
        self._renew(key, waiter.card, waiter.weight)
        try:
            return await waiter.done
        except asyncio.CancelledError:
            if waiter.reservation is None and _granted(waiter.done):
                # In this very moment: nobody will use it.
                self.settle(waiter.done.result(), 0)
                self.release(waiter.done.result())
            raise
        finally:
            if waiter in line:
                line.remove(waiter)

    def _renew_if_short(self, key: PurseKey, reservation: Reservation, weight: int) -> None:
        part = reservation.slice
        dry = self._clock.monotonic() < part.dry_until_s
        if part.is_short and part.pack is None and not part.closing and not dry:
            self._renew(key, reservation.card, weight)

    def _renew(self, key: PurseKey, card: RateCard, weight: int) -> None:
        if key not in self._renewing:
            task = asyncio.get_running_loop().create_task(self._renew_now(key, card, weight))
            self._renewing[key] = task

    async def _renew_now(self, key: PurseKey, card: RateCard, weight: int) -> None:
        """Ask until nobody waits and there is enough ahead."""
        try:
            await self._ask_until_enough(key, card, weight)
        finally:
            # In the same step as the last look at who waits: whoever comes now starts another.
            del self._renewing[key]

    async def _ask_until_enough(self, key: PurseKey, card: RateCard, weight: int) -> None:
        line = self._waiting.setdefault(key, deque())
        asked_ahead = False
        async with self._lock(key):
            while True:
                purse = self._purses.setdefault(key, Purse(key))
                first = next((w for w in line if not w.done.done()), None)
                part = purse.current
                if first is None and (asked_ahead or part is None or not part.is_short):
                    return
                if first is not None and first.attempt(purse, self._clock.monotonic()):
                    continue
                try:
                    result, is_refused = await self._ask(purse, line, first, card, weight)
                except MarketError as error:
                    self._fail(line, error)
                    return
                except Exception as error:
                    logger.exception("asking for a slice failed")
                    self._fail(line, MarketFault(f"no slice: {type(error).__name__}"))
                    raise
                now_s = self._clock.monotonic()
                for waiter in list(line):
                    if not waiter.done.done() and not waiter.attempt(purse, now_s):
                        break
                if first is None:
                    asked_ahead = True  # whoever has come meanwhile is looked at once more
                    if part is not None and part.is_short:
                        part.dry_until_s = now_s + DRY_S
                elif not first.done.done() and is_refused:
                    # What others give back helps the balance, not a budget that is spent.
                    spent = result.status is HoldStatus.EXCEEDS_BUDGET
                    elsewhere = not spent and (
                        result.elsewhere_pico > 0 or await self._give_back_others(key)
                    )
                    if not elsewhere or now_s >= first.deadline_s:
                        first.done.set_exception(refusal(result, key, first.need, first.card))
                    else:
                        await asyncio.sleep(RECALL_POLL_S)

    async def _ask(
        self,
        purse: Purse,
        line: Iterable[_Waiter],
        first: _Waiter | None,
        card: RateCard,
        weight: int,
    ) -> tuple[HoldResult, bool]:
        """One question to the scheduler; the answer, and whether it was no."""
        part, offer = (purse.current, None) if first is None else first.target(purse)
        part = part or self._new_slice(purse, offer)
        if first is not None:
            card, weight = first.card, first.weight
        least_pico, wanted_pico = 0, 0
        for waiter in line:
            if not waiter.done.done() and waiter.target(purse) == (part, offer):
                wanted_pico += waiter.wanted(offer)
                least_pico = least_pico or waiter.pico(offer)
        if not part.closing:
            wanted_pico += max(part.ahead_pico, 2 * wanted_pico)
        ask = self._ask_for(purse.key, part, (least_pico, wanted_pico), card, weight)
        self._grants_asked += 1
        part.is_asked = True
        result = await self._grants.grant(ask)
        purse.offers = result.packs
        if result.hold is not None:
            part.is_open = True
            part.granted_pico = max(part.granted_pico, result.hold.amount_pico)
        elif not part.is_open:
            purse.drop(part)
            purse.closing.remove(part)  # there is nothing to give back
        return result, result.hold is None

    def _ask_for(
        self, key: PurseKey, part: Slice, amounts: tuple[int, int], card: RateCard, weight: int
    ) -> SliceAsk:
        producer, epoch = self._sink.identity()
        least_pico, wanted_pico = (part.bound_pico + amount for amount in amounts)
        opens = changes = None
        if part.is_open:
            part.version += 1
            wanted_pico = max(wanted_pico, part.granted_pico)
            least_pico = min(max(least_pico, 0), wanted_pico)
            changes = HoldChange(part.slice_id, part.version, wanted_pico, least_pico)
        else:
            opens = HoldRequest(
                hold_id=part.slice_id,
                producer=producer,
                epoch=epoch,
                tenant_id=key.tenant_id,
                wanted_pico=wanted_pico,
                minimum_pico=least_pico,
                model=key.model,
                lane=Lane.TOKENS if key.cap is None else Lane.SPILL,
                currency=card.currency,
                started_at=self._clock.now(),
                api_key_id=key.api_key_id,
                pack_id=None if part.pack is None else part.pack.pack.pack_id,
                cap=key.cap,
            )
        return SliceAsk(
            producer=producer,
            epoch=epoch,
            tenant_id=key.tenant_id,
            model=key.model,
            weight=weight,
            output_pico=card.output_pico,
            has_pico=part.granted_pico,
            opens=opens,
            changes=changes,
        )

    def _new_slice(self, purse: Purse, offer: PackLeft | None) -> Slice:
        producer, epoch = self._sink.identity()
        self._last += 1
        now_s = self._clock.monotonic()
        part = Slice(f"slice-{producer}-{epoch}-{self._last}", now_s, offer, used_s=now_s)
        part.rated_s = now_s
        if offer is None:
            purse.current = part
        else:
            purse.packs[offer.pack.pack_id] = part
        return part

    def _fail(self, line: "deque[_Waiter]", error: MarketError) -> None:
        for waiter in list(line):
            if not waiter.done.done():
                waiter.done.set_exception(error)

    # -- giving back ---------------------------------------------------------------------------

    async def _give_back_others(self, key: PurseKey) -> bool:
        """Give back what is free in other purses of the tenant here; whether there was any."""
        others = [
            other for other in self._purses if other.tenant_id == key.tenant_id and other != key
        ]
        gave = False
        for other in others:
            if self._lock(other).locked():
                continue
            try:
                gave = await self._shrink(other, leave_ahead=False) or gave
            except MarketError as error:  # what could not be given back is not there for others
                logger.warning("a slice of %s did not shrink: %s", other.tenant_id, error)
        return gave

    async def _shrink(self, key: PurseKey, leave_ahead: bool) -> bool:
        purse = self._purses.get(key)
        if purse is None:
            return False
        gave = False
        async with self._lock(key):
            for part in list(purse.slices()):
                keep_pico = part.ahead_pico if leave_ahead else 0
                if part.is_open and part.free_pico > keep_pico:
                    part.granted_pico = part.bound_pico + keep_pico
                    part.version += 1
                    wanted_pico = part.granted_pico
                    change = HoldChange(part.slice_id, part.version, wanted_pico, wanted_pico)
                    await self._returns.resize_hold(*self._sink.identity(), change)
                    gave = True
        return gave

    async def _tidy(self, key: PurseKey) -> None:
        if not self._lock(key).locked():  # else it is being asked for: not idle at all
            purse, now_s = self._purses[key], self._clock.monotonic()
            for part in list(purse.slices()):
                idle = part.requests == 0 and now_s - part.used_s > IDLE_S
                if not part.closing and (idle or now_s - part.born_s > MAX_AGE_S):
                    purse.drop(part)
            if any(not p.closing and p.free_pico > 4 * p.ahead_pico for p in purse.slices()):
                await self._shrink(key, leave_ahead=True)
        await self._end_closed(key)

    async def _end_closed(self, key: PurseKey) -> None:
        """End the slices that are used no more and whose records are booked."""
        purse = self._purses[key]
        for part in list(purse.closing):
            if part.requests == 0 and self._sink.booked > part.last_seq:
                if part.is_asked:
                    # Where the answer was lost it may never have been opened.
                    with contextlib.suppress(InvalidRequest):
                        await self._returns.end_hold(*self._sink.identity(), part.slice_id)
                purse.closing.remove(part)
        if not any(purse.slices()) and not self._waiting.get(key) and key not in self._renewing:
            del self._purses[key]
            self._waiting.pop(key, None)
            self._locks.pop(key, None)

    def _lock(self, key: PurseKey) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _granted(done: "asyncio.Future[Reservation]") -> bool:
    return done.done() and not done.cancelled() and done.exception() is None


def refusal(result: HoldResult, key: PurseKey, need: Need, card: RateCard) -> MarketError:
    """Why there is no money, with what would fit."""
    first_pico = need.first(card)
    fits = pricing.affordable_output(result.available_pico, need.input_tokens, card)
    metadata: dict[str, Any] = {
        "needed": pricing.format_money(first_pico),
        "available": pricing.format_money(result.available_pico),
        "currency": card.currency,
        "affordable_max_tokens": None if fits is None else fits // need.answers,
    }
    kind = SpillsSpent if _is_capped(result, key) else InsufficientBalance
    if result.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END:
        return kind(
            "requests in flight hold the rest of the balance; try again when they end",
            code="in_flight_budget_exhausted",
            metadata=metadata,
            retry_after_s=1,
        )
    if result.status is HoldStatus.ACCOUNT_NOT_FOUND:
        return MarketFault(f"tenant {key.tenant_id} has no account")
    hint = f"; max_tokens={fits // need.answers} would fit" if fits else ""
    short = f"{metadata['available']} {card.currency} does not cover {metadata['needed']} "
    rest = f"{card.currency} for the prompt and a first block of the answer{hint}"
    if result.status is HoldStatus.EXCEEDS_BUDGET and result.allowance is not None:
        resets_at = result.allowance.resets_at
        metadata["resets_at"] = None if resets_at is None else resets_at.isoformat()
        metadata["period"] = str(result.allowance.period)
        when = "it never resets" if resets_at is None else f"it resets at {resets_at:%F %T} UTC"
        return kind(
            f"the budget per {result.allowance.period} leaves {short}{rest}; {when}",
            code="budget_exceeded",
            metadata=metadata,
        )
    return InsufficientBalance(
        f"the balance of {short}{rest}; deposit more "
        f"(market tenants deposit {key.tenant_id} AMOUNT)",
        metadata=metadata,
    )


def _is_capped(result: HoldResult, key: PurseKey) -> bool:
    """Whether it is the purse's own cap that is tightest, not a key's budget or the balance."""
    bound, cap = result.allowance, key.cap
    if bound is None or cap is None:
        return False
    return (bound.subject, bound.now_pico) == (cap.subject, result.available_pico)
