"""A token request from admission to its usage record: the story, top to bottom, over ports.

Whatever happens to an admitted request, exactly one usage record ends its hold.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from market import pricing
from market.accounts import Hold, HoldResult, HoldStatus
from market.errors import (
    ContextTooLong,
    EngineFailed,
    InsufficientBalance,
    MarketError,
    MarketFault,
    Overloaded,
    PermissionDenied,
)
from market.ports import Clock, Holds, Routes, UsageSink
from market.types import (
    EngineChunk,
    EngineRequest,
    FinishReason,
    HoldRequest,
    Lane,
    Principal,
    RateCard,
    Role,
    Route,
    Sampling,
    TokenCounts,
    UsageRecord,
)

DISPATCHES_MAX = 2
CLAIM_MAX = 2**62

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may be served: its place, its price and the money set aside for it."""

    request_id: str
    principal: Principal
    route: Route
    card: RateCard
    hold: Hold
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    limited_by_budget: bool
    started_at: datetime
    arrived_s: float

    @property
    def output_limit(self) -> int:
        """Most output tokens the engine may generate."""
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens


class Meter:
    """Counts what the gateway received from the engine: the basis of the bill."""

    def __init__(self, route: Route, input_tokens: int, arrived_s: float) -> None:
        self.route = route
        self._input_tokens = input_tokens
        self._arrived_s = arrived_s
        self._cached_input_tokens = 0
        self._output_tokens = 0
        self.claimed_output_tokens: int | None = None
        self._replica: str | None = None
        self._served_tokens: int | None = None
        self.dispatched_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def counts(self) -> TokenCounts:
        """Token counts so far; cached ones are the replica's word, capped at the input."""
        return TokenCounts(self._input_tokens, self._cached_input_tokens, self._output_tokens)

    def add(self, chunk: EngineChunk, now_s: float) -> None:
        """Count one chunk."""
        if chunk.token_ids and self.first_token_s is None:
            self.first_token_s = now_s
        self._output_tokens += len(chunk.token_ids)
        self._cached_input_tokens = _within(chunk.counts.cached_input_tokens, self._input_tokens)
        self.claimed_output_tokens = _within(chunk.counts.output_tokens, CLAIM_MAX)
        if chunk.replica is not None:
            self._replica = chunk.replica
        if chunk.served_tokens is not None:
            self._served_tokens = chunk.served_tokens

    def evidence(self) -> tuple[tuple[str, str], ...]:
        """Which replica answered, and its own total: the ledger compares it with its rows."""
        if self._replica is None:
            return ()
        if self._served_tokens is None:
            return (("replica", self._replica),)
        return ("replica", self._replica), ("served_tokens", str(self._served_tokens))

    def elapsed_ms(self, until_s: float | None) -> int | None:
        """Milliseconds from the request's arrival; None if it never came so far."""
        return None if until_s is None else round((until_s - self._arrived_s) * 1000)


class Inference:
    """Serves token requests over its ports; holds no state but the records on their way."""

    def __init__(self, clock: Clock, holds: Holds, sink: UsageSink, routes: Routes) -> None:
        self._clock = clock
        self._holds = holds
        self._sink = sink
        self._routes = routes
        self._background: set[asyncio.Task[Any]] = set()

    async def admit(
        self,
        principal: Principal,
        route: Route,
        prompt_token_ids: tuple[int, ...],
        sampling: Sampling,
    ) -> Admission:
        """Price the request and set the money aside. Nothing is recorded if this raises.

        Raises PermissionDenied, ContextTooLong, InsufficientBalance or NotFound (no price).
        """
        arrived_s, started_at = self._clock.monotonic(), self._clock.now()
        if principal.role is not Role.TENANT:
            raise PermissionDenied(
                f"a key of role {principal.role} cannot buy tokens; use a tenant's key "
                "(market keys create --tenant NAME)"
            )
        input_tokens = len(prompt_token_ids)
        limit = output_limit(route, input_tokens, sampling.max_tokens)
        card = await self._routes.rate_card(route.model)
        producer, epoch = self._sink.identity()
        least = min(limit, pricing.FIRST_BLOCK_TOKENS)
        paid_by_the_hour = route.lane is Lane.LEASE
        request = HoldRequest(
            hold_id=self._sink.next_request_id(),
            producer=producer,
            epoch=epoch,
            tenant_id=principal.subject_id,
            api_key_id=principal.api_key_id,
            wanted_pico=0 if paid_by_the_hour else pricing.ceiling(input_tokens, limit, card),
            minimum_pico=0 if paid_by_the_hour else pricing.ceiling(input_tokens, least, card),
            model=route.model,
            lane=route.lane,
            deployment_id=route.deployment_id,
            provider_id=route.provider_id,
            node_id=route.node_id,
            gpu_type=route.gpu_type,
            gpu_milli=route.gpu_milli,
            price_id=card.price_id,
            currency=card.currency,
            started_at=started_at,
        )
        hold = granted(await self._open_hold(request), request, input_tokens, card)
        affordable = None
        if not paid_by_the_hour:
            affordable = pricing.affordable_output(hold.amount_pico, input_tokens, card)
        limited_by_budget = affordable is not None and affordable < limit
        if limited_by_budget:
            assert affordable is not None
            limit = affordable
        return Admission(
            request_id=request.hold_id,
            principal=principal,
            route=route,
            card=card,
            hold=hold,
            prompt_token_ids=prompt_token_ids,
            sampling=replace(
                sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit)
            ),
            limited_by_budget=limited_by_budget,
            started_at=started_at,
            arrived_s=arrived_s,
        )

    async def stream(self, admission: Admission) -> AsyncGenerator[EngineChunk | UsageRecord, None]:
        """Yield the answer's chunks, then its committed usage record.

        Closing or cancelling it means the client hung up: the engine is aborted and what was
        generated is recorded in the background. Raises EngineFailed or MarketFault, not billed.
        """
        meter = Meter(admission.route, len(admission.prompt_token_ids), admission.arrived_s)
        outcome = FinishReason.CLIENT_DISCONNECT
        try:
            async with aclosing(self._dispatch(admission, meter)) as chunks:
                async for chunk in chunks:
                    meter.add(chunk, self._clock.monotonic())
                    if meter.counts.output_tokens > admission.output_limit:
                        raise MarketFault("the engine generated more tokens than it was asked for")
                    if chunk.finish_reason is not None:
                        outcome = final_reason(admission, chunk.finish_reason)
                    yield chunk
        except EngineFailed:
            outcome = FinishReason.PROVIDER_ERROR
            raise
        except Exception:
            outcome = FinishReason.MARKET_FAULT
            raise
        finally:
            # Its own task: a cancelled or closed stream must not take its record with it.
            recording = self._record(admission, meter, outcome)
        yield await asyncio.shield(recording)

    async def drain(self) -> None:
        """Wait until every finished request is recorded."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def _open_hold(self, request: HoldRequest) -> HoldResult:
        """Ask for the hold; if the asker is gone before the answer, the hold is ended again."""
        asking = self._spawn(self._holds.open_hold(request))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._spawn(self._end_unused(request, asking, FinishReason.CLIENT_DISCONNECT))
            raise
        except MarketError:
            self._spawn(self._end_unused(request, asking, FinishReason.MARKET_FAULT))
            raise

    async def _end_unused(
        self, request: HoldRequest, asking: asyncio.Task[HoldResult], why: FinishReason
    ) -> None:
        """Find out whether the hold was granted after all, and end it with an empty record."""
        await asyncio.wait({asking})
        while True:
            try:
                result = await self._holds.open_hold(request)
                break
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s or 1)
        if result.hold is not None:
            await self._sink.record(
                UsageRecord.for_hold(
                    request,
                    counts=TokenCounts(0, 0, 0),
                    finished_at=self._clock.now(),
                    charge_pico=0,
                    finish_reason=why,
                )
            )

    async def _dispatch(
        self, admission: Admission, meter: Meter
    ) -> AsyncGenerator[EngineChunk, None]:
        """The engine's chunks; one transparent retry if it fails before the first token."""
        request = EngineRequest(
            request_id=admission.request_id,
            prompt_token_ids=admission.prompt_token_ids,
            sampling=admission.sampling,
            cache_salt=admission.principal.subject_id,
        )
        for attempt in range(1, DISPATCHES_MAX + 1):
            meter.dispatched_s = self._clock.monotonic()
            if attempt > 1:
                meter.route = self._routes.another(meter.route)
            # Another id on the second try: a half-dead replica may still know the first.
            tried = replace(request, request_id=f"{request.request_id}-{attempt}")
            try:
                engine = self._routes.engine(meter.route)
                async with aclosing(engine.generate(tried)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        if chunk.finish_reason is not None:
                            return  # complete: what happens to the replica now is not our matter
                raise EngineFailed("the replica ended its stream without finishing")
            except EngineFailed:
                if meter.first_token_s is not None or attempt == DISPATCHES_MAX:
                    raise

    def _record(
        self, admission: Admission, meter: Meter, outcome: FinishReason
    ) -> asyncio.Task[UsageRecord]:
        finished_s = self._clock.monotonic()
        record = make_record(admission, meter, outcome, self._clock.now(), finished_s)
        return self._spawn(self._sink.record(record))

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _within(claimed: int, most: int) -> int:
    """A replica's word, made fit for the books."""
    return max(0, min(claimed, most))


def output_limit(route: Route, input_tokens: int, max_tokens: int | None) -> int:
    """Output tokens that fit the context. Raises ContextTooLong if the request cannot fit."""
    context = route.max_context_tokens
    room = context - input_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        answer = "" if max_tokens is None else f" and {max_tokens} for the answer"
        raise ContextTooLong(
            f"{route.model} has a context of {context} tokens, but the request needs "
            f"{input_tokens} for the prompt{answer}; shorten the prompt or lower max_tokens",
            param="messages" if room < 1 else "max_tokens",
        )
    return room if max_tokens is None else max_tokens


def granted(result: HoldResult, request: HoldRequest, input_tokens: int, card: RateCard) -> Hold:
    """The hold, or InsufficientBalance that names what would fit."""
    if result.hold is not None:
        return result.hold
    fits = pricing.affordable_output(result.available_pico, input_tokens, card)
    metadata = {
        "needed": pricing.format_money(request.minimum_pico),
        "available": pricing.format_money(result.available_pico),
        "currency": card.currency,
        "affordable_max_tokens": fits,
    }
    if result.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END:
        raise InsufficientBalance(
            "requests in flight hold the rest of the balance; try again when they end",
            code="in_flight_budget_exhausted",
            metadata=metadata,
            retry_after_s=1,
        )
    if result.status is HoldStatus.ACCOUNT_NOT_FOUND:
        raise MarketFault(f"tenant {request.tenant_id} has no account")
    hint = f"; max_tokens={fits} would fit" if fits else ""
    raise InsufficientBalance(
        f"the balance of {metadata['available']} {card.currency} does not cover "
        f"{metadata['needed']} {card.currency} for the prompt and a first block of the "
        f"answer{hint}; deposit more (market tenants deposit {request.tenant_id} AMOUNT)",
        metadata=metadata,
    )


def final_reason(admission: Admission, reported: FinishReason) -> FinishReason:
    """``length`` caused by the balance is ``budget`` in the ledger."""
    if reported is FinishReason.LENGTH and admission.limited_by_budget:
        return FinishReason.BUDGET
    return reported


def make_record(
    admission: Admission,
    meter: Meter,
    outcome: FinishReason,
    finished_at: datetime,
    finished_s: float,
) -> UsageRecord:
    """The usage record of a request that has ended."""
    request, counts = admission.hold.request, meter.counts
    record = UsageRecord.for_hold(
        request,
        counts=counts,
        finished_at=finished_at,
        charge_pico=pricing.charge(counts, admission.card, outcome, request.lane),
        finish_reason=outcome,
        claimed_output_tokens=meter.claimed_output_tokens,
        queue_ms=meter.elapsed_ms(meter.dispatched_s),
        ttft_ms=meter.elapsed_ms(meter.first_token_s),
        duration_ms=meter.elapsed_ms(finished_s),
        lease_id=meter.route.lease_id,
        attrs=meter.evidence(),
    )
    if meter.route is admission.route:
        return record
    # Whoever served is paid, not who was asked first.
    served = meter.route
    return msgspec.structs.replace(
        record,
        provider_id=served.provider_id,
        node_id=served.node_id,
        gpu_type=served.gpu_type,
        gpu_milli=served.gpu_milli,
    )
