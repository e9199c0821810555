"""A token request from admission to its usage record: the story, top to bottom, over ports.

Whatever happens to an admitted request, exactly one usage record is made of it and what it had
reserved returns.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from market import pricing
from market.credit import Credit
from market.errors import (
    ContextTooLong,
    EngineFailed,
    MarketError,
    MarketFault,
    NoCapacity,
    Overloaded,
    PermissionDenied,
)
from market.fairness import input_work
from market.metering import TELLING, Admission, Ask, Meter, final_reason, make_record
from market.ports import Clock, Routes, UsageSink
from market.queueing import Queues
from market.routing import Choice
from market.slices import Need, PurseKey, Reservation
from market.slicing import Slices
from market.types import (
    EngineChunk,
    EngineRequest,
    FinishReason,
    Lane,
    Principal,
    RateCard,
    RecordKind,
    Role,
    Route,
    UsageQuality,
    UsageRecord,
)

DISPATCHES_MAX = 2
# An answer that had to leave a replica has so long to find another, from its last token on.
MOVE_WAIT_S = 600.0
# The next block is asked for when so many tokens of the last are left.
EXTEND_AHEAD_TOKENS = 64
# Answers of one request that are generated at a time: it has one place in the queue, not a pool.
PARALLEL_MAX = 32

Result = TypeVar("Result")


@dataclass(slots=True)
class _Running:
    """What a request under way has open besides its stream."""

    credits: dict[int, Credit] = field(default_factory=dict)
    extending: set[int] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    failure: MarketError | None = None


class Inference:
    """Serves token requests over its ports; holds no state but the records on their way."""

    def __init__(
        self, clock: Clock, slices: Slices, queues: Queues, sink: UsageSink, routes: Routes
    ) -> None:
        self._clock = clock
        self._slices = slices
        self._queues = queues
        self._sink = sink
        self._routes = routes
        self._background: set[asyncio.Task[Any]] = set()

    async def admit(self, principal: Principal, choice: Choice, ask: Ask) -> Admission:
        """Price the request and reserve the money. Nothing is recorded if this raises.

        Raises PermissionDenied, ContextTooLong, InsufficientBalance, NotFound (no price) or
        Overloaded.
        """
        arrived_s, started_at = self._clock.monotonic(), self._clock.now()
        route = choice.route
        if principal.role is not Role.TENANT:
            raise PermissionDenied(
                f"a key of role {principal.role} cannot buy tokens; use a tenant's key "
                "(market keys create --tenant NAME)"
            )
        # A vector is no output token, but its prompt needs a place in the context all the same.
        wanted = 0 if ask.embeds else ask.sampling.max_tokens
        limit = min(output_limit(route, len(prompt), wanted) for prompt in ask.prompts)
        card = await self._routes.rate_card(route.model)
        self._queues.check(pool_of(route), principal.subject_id)
        key = PurseKey(
            principal.subject_id,
            route.model,
            principal.api_key_id if principal.budgeted else None,
            choice.cap,
        )
        reservation = None
        if route.lane is not Lane.LEASE:
            need = Need(ask.input_tokens, first_block(limit, card), limit, ask.count)
            reservation = await self._slices.reserve(key, need, card, principal.weight)
            card = reservation.card
        try:
            draft = self._draft(principal, choice, ask, card, reservation, started_at)
            self._sink.begin(draft)
        except BaseException:
            if reservation is not None:
                self._slices.settle(reservation, 0)
                self._slices.release(reservation)
            raise
        assert draft.request_id is not None
        return Admission(
            request_id=draft.request_id,
            principal=principal,
            choice=choice,
            route=route,
            card=card,
            ask=ask,
            draft=draft,
            output_limit=limit,
            key=key,
            reservation=reservation,
            started_at=started_at,
            arrived_s=arrived_s,
        )

    async def stream(self, admission: Admission) -> AsyncGenerator[EngineChunk | UsageRecord, None]:
        """Yield the answers' chunks, then the safe usage record.

        Closing or cancelling it means the client hung up: the engine is aborted and what was
        generated is recorded in the background. Raises EngineFailed, Overloaded or MarketFault, not
        billed.
        """
        meter, running = Meter(admission), _Running()
        pool, request_id = pool_of(admission.route), admission.request_id
        outcome = FinishReason.CLIENT_DISCONNECT
        reasons: list[FinishReason] = []
        entered = False
        try:
            await self._enter(admission)
            entered = True
            async with aclosing(self._answers(admission, meter, running)) as chunks:
                async for chunk in chunks:
                    if meter.add(chunk, self._clock.monotonic()):
                        self._queues.begin(pool, meter.ttft_s)
                    self._queues.serve(pool, request_id, len(chunk.token_ids))
                    self._require_paid(admission, meter, running, chunk.index)
                    if running.failure is not None and chunk.finish_reason is FinishReason.LENGTH:
                        raise running.failure
                    if chunk.finish_reason is not None:
                        reasons.append(final_reason(admission, chunk.finish_reason))
                        if len(reasons) == admission.ask.count:
                            outcome = max(reasons, key=TELLING.index)
                    else:
                        self._extend(admission, meter, running, chunk)
                    if chunk.wants is None or chunk.token_ids:
                        yield chunk
        except EngineFailed:
            outcome = FinishReason.PROVIDER_ERROR
            raise
        except Exception:
            outcome = FinishReason.MARKET_FAULT
            raise
        finally:
            if entered:
                self._queues.leave(pool, request_id)
            for task in running.tasks:
                task.cancel()
            if admission.is_broken and outcome is FinishReason.CLIENT_DISCONNECT:
                outcome = FinishReason.MARKET_FAULT
            # Its own task: a cancelled or closed stream must not take its record with it.
            recording = self._record(admission, meter, outcome, running)
        yield await asyncio.shield(recording)

    async def drain(self) -> None:
        """Wait until every finished request is recorded."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    # -- from admission to dispatch -------------------------------------------------------------

    def _draft(
        self,
        principal: Principal,
        choice: Choice,
        ask: Ask,
        card: RateCard,
        reservation: Reservation | None,
        started_at: datetime,
    ) -> UsageRecord:
        """The record of a request whose gateway dies before it is finished: charge 0."""
        route = choice.route
        self._sink.identity()
        return UsageRecord(
            kind=RecordKind.TOKENS,
            request_id=self._sink.next_request_id(),
            tenant_id=principal.subject_id,
            api_key_id=principal.api_key_id,
            model=route.model,
            lane=route.lane,
            deployment_id=route.deployment_id,
            provider_id=route.provider_id,
            node_id=route.node_id,
            gpu_type=route.gpu_type,
            gpu_milli=route.gpu_milli,
            started_at=started_at,
            finished_at=started_at,
            input_tokens=0,
            cached_input_tokens=0,
            output_tokens=0,
            price_id=card.price_id,
            charge_pico=0,
            currency=card.currency,
            finish_reason=FinishReason.MARKET_FAULT,
            usage_quality=UsageQuality.RECOVERED,
            lease_id=route.lease_id,
            slice_id=None if reservation is None else reservation.slice.slice_id,
            attrs=choice.noted,
        )

    async def _enter(self, admission: Admission) -> None:
        """Wait for a place at the pool, in fair order."""
        await self._queues.enter(
            pool_of(admission.route),
            admission.request_id,
            admission.principal.subject_id,
            admission.principal.weight,
            input_work(admission.ask.input_tokens),
            admission.route.places,
            stays=not admission.ask.can_move,
        )

    async def _answers(
        self, admission: Admission, meter: Meter, running: _Running
    ) -> AsyncGenerator[EngineChunk, None]:
        """The chunks of all answers, each with its index, as they come."""
        if admission.ask.count == 1:
            async with aclosing(self._dispatch(admission, meter, running, 0)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        arrived: asyncio.Queue[EngineChunk | Exception | None] = asyncio.Queue()
        few = asyncio.Semaphore(PARALLEL_MAX)

        async def read(index: int) -> None:
            try:
                async with (
                    few,
                    aclosing(self._dispatch(admission, meter, running, index)) as chunks,
                ):
                    async for chunk in chunks:
                        arrived.put_nowait(msgspec.structs.replace(chunk, index=index))
                arrived.put_nowait(None)
            except Exception as error:  # noqa: BLE001  # raised where the chunks are read
                arrived.put_nowait(error)

        readers = [asyncio.create_task(read(index)) for index in range(admission.ask.count)]
        try:
            left = len(readers)
            while left:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _dispatch(
        self, admission: Admission, meter: Meter, running: _Running, index: int
    ) -> AsyncGenerator[EngineChunk, None]:
        """One answer's chunks; one transparent retry if the engine fails before the first token.

        On a lease that was lent it goes on elsewhere, from the token that it had reached, when the
        lease's holder asks for something itself.
        """
        ask, principal, request = (
            admission.ask,
            admission.principal,
            engine_request(admission, index),
        )
        credit = running.credits[index] = _first_credit(admission)
        # Who can be served elsewhere at once does not wait for a replica to come back.
        tries = DISPATCHES_MAX if admission.choice.otherwise is None else 1
        given: list[int] = []
        # By when it must have found another replica, by the token from which on it looks for one.
        until_s: dict[int, float] = {}
        # What is paid by the hour stays where it is paid.
        borrows = ask.can_move and admission.route.lane is not Lane.LEASE
        borrower = principal.subject_id if borrows else None
        route = self._routes.least_busy(admission.route, borrower)
        for number in itertools.count(1):
            if route.loan is not None and not ask.can_move:
                route = await self._routes.elsewhere(route, principal, borrows=False)
            admission.route = route
            if not given:
                meter.dispatched_s = self._clock.monotonic()
            prompt = request.prompt_token_ids
            tried = msgspec.structs.replace(
                request,
                # Another id each time: a half-dead replica may still know the last.
                request_id=f"{request.request_id}-{index}-{number}",
                prompt_token_ids=(*prompt, *given) if given else prompt,
                resumed=len(given),
                borrowed=route.loan is not None,
            )
            try:
                engine = self._routes.engine(route)
                async with aclosing(engine.generate(tried, credit)) as chunks:
                    async for chunk in chunks:
                        given += chunk.token_ids
                        yield chunk
                        if chunk.finish_reason is not None:
                            return  # complete: what happens to the replica now is not our matter
                raise EngineFailed("the replica ended its stream without finishing")
            except (EngineFailed, Overloaded) as error:
                lent = route.loan is not None
                if borrows and (lent or (given and isinstance(error, Overloaded))):
                    now_s = self._clock.monotonic()
                    if now_s >= until_s.setdefault(len(given), now_s + MOVE_WAIT_S):
                        raise NoCapacity(
                            f"no replica of {route.model} had room for the rest", retry_after_s=10
                        ) from error
                    route = await self._routes.elsewhere(route, principal, borrows=True)
                    continue
                tries -= 1
                if given or not tries:
                    raise
                route = await self._routes.another(route)

    # -- money while it is generated -------------------------------------------------------------

    def _require_paid(
        self, admission: Admission, meter: Meter, running: _Running, index: int
    ) -> None:
        credit = running.credits[index]
        if meter.output[index] > min(credit.tokens, admission.output_limit):
            raise MarketFault("the engine generated more tokens than it was asked for")

    def _extend(
        self, admission: Admission, meter: Meter, running: _Running, chunk: EngineChunk
    ) -> None:
        """Reserve the next block before the last is used up; end the answer if there is none."""
        index = chunk.index
        credit, paid = running.credits[index], admission.reservation
        if paid is None or credit.final or index in running.extending:
            return
        wanted = chunk.wants or 0
        left = credit.tokens - meter.output[index]
        if left > EXTEND_AHEAD_TOKENS and wanted <= credit.tokens:
            return
        limit = admission.output_limit
        more = max(pricing.FIRST_BLOCK_TOKENS, wanted - credit.tokens)
        more = min(more, limit - credit.tokens)
        if self._slices.extend(admission.key, paid, more):
            credit.extend(credit.tokens + more, final=credit.tokens + more >= limit)
            return
        running.extending.add(index)

        async def wait() -> None:
            weight = admission.principal.weight
            try:
                got = await self._slices.extend_or_wait(admission.key, paid, more, weight)
            except MarketError as error:
                got, running.failure = 0, error  # raised when the answer stops for want of credit
            if got == 0:
                admission.limited_by_money = True
            final = got == 0 or credit.tokens + got >= limit
            credit.extend(credit.tokens + got, final)
            running.extending.discard(index)

        task = asyncio.get_running_loop().create_task(wait())
        running.tasks.add(task)
        task.add_done_callback(running.tasks.discard)

    # -- the record ------------------------------------------------------------------------------

    def _record(
        self, admission: Admission, meter: Meter, outcome: FinishReason, running: _Running
    ) -> asyncio.Task[UsageRecord]:
        return self._spawn(self._record_now(admission, meter, outcome, set(running.tasks)))

    async def _record_now(
        self,
        admission: Admission,
        meter: Meter,
        outcome: FinishReason,
        extending: set[asyncio.Task[None]],
    ) -> UsageRecord:
        if extending:  # they may hold a part of the reservation until they have ended
            await asyncio.gather(*extending, return_exceptions=True)
        record = make_record(admission, meter, outcome, self._clock.now(), self._clock.monotonic())
        if admission.on_record is not None:
            admission.on_record(record)
        paid = admission.reservation
        if paid is None:
            return await self._sink.record(record)
        self._slices.settle(paid, record.charge_pico)
        try:
            return await self._sink.record(record)
        finally:
            self._slices.release(paid)

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def pool_of(route: Route) -> str:
    """The queue in which requests for a route wait: that of its model, or of its lease."""
    return route.lease_id or route.model


def engine_request(admission: Admission, index: int) -> EngineRequest:
    """What an engine is asked for answer number ``index``."""
    ask, limit = admission.ask, admission.output_limit
    sampling = ask.sampling
    seed = None if sampling.seed is None else sampling.seed + index % ask.answers
    sampling = msgspec.structs.replace(
        sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit), seed=seed
    )
    return EngineRequest(
        request_id=admission.request_id,
        prompt_token_ids=ask.prompts[index // ask.answers],
        sampling=sampling,
        cache_salt=admission.principal.subject_id,
        grammar=ask.grammar,
        chat=ask.chat,
        embeds=ask.embeds,
        stream=ask.stream,
    )


def _first_credit(admission: Admission) -> Credit:
    """What of an answer is paid for when it begins: all of it on a lease."""
    limit, paid = admission.output_limit, admission.reservation
    tokens = limit if paid is None else paid.block_tokens
    return Credit(min(tokens, limit), final=tokens >= limit)


def first_block(limit: int, card: RateCard) -> int:
    """Output tokens to pay for before dispatch; all of them where they cost nothing."""
    return limit if card.output_pico == 0 else min(limit, pricing.FIRST_BLOCK_TOKENS)


def output_limit(route: Route, input_tokens: int, max_tokens: int | None) -> int:
    """Output tokens that fit the context. Raises ContextTooLong if the request cannot fit."""
    context = route.max_context_tokens
    room = context - input_tokens
    if room < (1 if max_tokens is None else max_tokens):
        answer = "" if max_tokens is None else f" and {max_tokens} for the answer"
        raise ContextTooLong(
            f"{route.model} has a context of {context} tokens, but the request needs "
            f"{input_tokens} for the prompt{answer}; shorten the prompt or lower max_tokens",
            param="messages" if room < 1 else "max_tokens",
        )
    return room if max_tokens is None else max_tokens
