"""``/v1``: the addresses OpenAI clients call."""

import base64
import logging
import struct
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from market import pricing
from market.accounts import MARKET_PROVIDER
from market.errors import (
    ContextTooLong,
    EngineFailed,
    InsufficientBalance,
    InvalidRequest,
    MarketError,
    MarketFault,
    NoCapacity,
    Overloaded,
    RateLimited,
    SlowDown,
    SpillsSpent,
)
from market.metering import Admission, Ask
from market.routing import Choice, Query
from market.types import EngineChunk, Principal, Route, Sampling, UsageRecord
from serve_apps.auth import require_model
from serve_apps.http import Caller, Services, With, principal_of, services_of
from serve_apps.observed import Seen, seen_of
from serve_apps.responses import ResponsesBody, ResponsesEvents, responses_object
from serve_apps.shapes import (
    ChatShape,
    CompletionShape,
    Echo,
    Events,
    Shape,
    encode,
    event,
    usage_object,
)
from serve_apps.streams import EventStream, unless_gone
from serve_apps.tokenization import Prompter
from serve_apps.wire import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    parse,
    service_tier,
)

logger = logging.getLogger(__name__)

# Log probabilities that are kept until a whole answer is complete, each about 400 bytes.
LOGPROBS_MAX = 2**18
router = APIRouter(prefix="/v1")

Stream = AsyncGenerator[EngineChunk | UsageRecord, None]
# A choice that was made before, because another was made in vain.
Given = Choice | None
# What makes a request go elsewhere, if its choice names a place.
ELSEWHERE = (ContextTooLong, EngineFailed, InsufficientBalance, NoCapacity, Overloaded, SlowDown)
REFUSED = (ContextTooLong, InsufficientBalance, RateLimited)
Writer = Events | ResponsesEvents


class _Patience(msgspec.Struct):
    """All that is read of a body whose answer takes long."""

    model: str = ""
    stream: bool | None = None


@dataclass(slots=True)
class Call:
    """A request on its way: who asks, what, and how the answer is to be written."""

    services: Services
    caller: Principal
    choice: Choice
    ask: Ask
    operation: str
    stream: bool
    whole: Callable[[Admission, UsageRecord], dict[str, Any]]
    events: Callable[[Admission], Writer]
    keep: Callable[[EngineChunk], None]


@router.get("/models")
async def list_models(services: With, caller: Caller) -> dict[str, Any]:
    """Models that can be asked right now, those that a request would start among them."""
    ready = services.routes.ready(caller)
    models = [_model_object(r.model, r.max_context_tokens, r.provider_id) for r in ready]
    models += [_cold_model_object(model, services) for model in services.routes.waking(caller)]
    models += [_model_object(name, 0, caller.subject_id) for name in services.lanes.names(caller)]
    return {"object": "list", "data": sorted(models, key=lambda model: str(model["id"]))}


@router.get("/models/{model}")
async def get_model(model: str, services: With, caller: Caller) -> dict[str, Any]:
    """One model."""
    require_model(caller, model)
    if model in services.routes.waking(caller):
        return _cold_model_object(model, services)  # looking must not start it
    if model in services.lanes.names(caller):
        return _model_object(model, 0, caller.subject_id)
    route = await services.routes.route(model, caller)
    return _model_object(model, route.max_context_tokens, route.provider_id)


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _answer(request, _chat)


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continue a text."""
    return await _answer(request, _completion)


@router.post("/responses")
async def responses(request: Request) -> Response:
    """Answer a conversation, in the shapes of OpenAI's Responses API."""
    return await _answer(request, _responses)


@router.post("/embeddings")
async def embeddings(request: Request) -> Response:
    """Vectors of texts."""
    return await _answer(request, _embeddings)


# -- from bodies to calls ----------------------------------------------------------------------


async def _chat(services: Services, caller: Principal, raw: bytes, given: Given) -> Call:
    body = parse(ChatBody, raw)
    choice, prompter = await _model(services, caller, body.model, body.query, given)
    ask = await _chat_ask(body, choice.route, prompter, len(raw))
    return _generation(services, caller, choice, (ask, body, ChatShape(ask.count)))


async def _chat_ask(body: ChatBody, route: Route, prompter: Prompter, size: int) -> Ask:
    parsing = body.parsing(bool(route.reasoning_parser))
    return Ask(
        stream=bool(body.stream),
        prompts=(await prompter.chat(body, size),),
        sampling=body.sampling(body.limit, prompter.vocabulary, body.wanted_logprobs),
        answers=body.answers,
        # Where the parsers work they constrain the answer, too.
        grammar=None if parsing is not None else body.constraint(),
        chat=parsing,
    )


async def _completion(services: Services, caller: Principal, raw: bytes, given: Given) -> Call:
    body = parse(CompletionBody, raw)
    choice, prompter = await _model(services, caller, body.model, body.query, given)
    prompts = tuple([await prompter.text(prompt, len(raw)) for prompt in body.prompt])
    repeated = body.logprobs if body.echo else None
    ask = Ask(
        stream=bool(body.stream),
        prompts=prompts,
        sampling=body.sampling(body.limit, prompter.vocabulary, body.logprobs, repeated),
        answers=body.answers,
        grammar=body.constraint(),
    )
    echoes: Sequence[Echo] = ()
    if body.echo:
        echoes = [
            Echo(
                text=given if isinstance(given, str) else prompter.decode(ids),
                first_token=prompter.decode(ids[:1]),
                only=body.max_tokens == 0,
            )
            for given, ids in zip(body.prompt, prompts, strict=True)
        ]
    shape = CompletionShape(ask.count, ask.answers, echoes)
    return _generation(services, caller, choice, (ask, body, shape))


async def _responses(services: Services, caller: Principal, raw: bytes, given: Given) -> Call:
    body = parse(ResponsesBody, raw)
    chat = body.as_chat()
    choice, prompter = await _model(services, caller, body.model, chat.query, given)
    ask = await _chat_ask(chat, choice.route, prompter, len(raw))
    shape = ChatShape(1)
    return Call(
        services,
        caller,
        choice,
        ask,
        "chat",
        stream=bool(body.stream),
        whole=lambda a, record: responses_object(body, a, shape.choices()[0], record),
        events=lambda a: ResponsesEvents(body, a),
        keep=shape.add,
    )


async def _embeddings(services: Services, caller: Principal, raw: bytes, given: Given) -> Call:
    body = parse(EmbeddingBody, raw)
    choice, prompter = await _model(services, caller, body.model, body.query, given, embeds=True)
    if body.dimensions is not None:
        raise InvalidRequest(
            f"{body.model} has vectors of one length; leave dimensions out", param="dimensions"
        )
    prompts = tuple([await prompter.text(given, len(raw), "input") for given in body.input])
    vectors: dict[int, bytes] = {}

    def whole(admission: Admission, record: UsageRecord) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": n, "embedding": _vector(vectors[n], body)}
            for n in range(len(prompts))
        ]
        usage = usage_object(record)
        return {"object": "list", "data": data, "model": admission.route.model, "usage": usage}

    def keep(chunk: EngineChunk) -> None:
        if chunk.embedding is not None:
            vectors[chunk.index] = chunk.embedding

    ask = Ask(prompts, Sampling(1), embeds=True, stream=False)
    return Call(services, caller, choice, ask, "embeddings", False, whole, _no_events, keep)


def _generation(
    services: Services,
    caller: Principal,
    choice: Choice,
    asked: tuple[Ask, GenerationBody, Shape],
) -> Call:
    ask, body, shape = asked

    def envelope(admission: Admission, kind: str) -> dict[str, Any]:
        found = {
            "id": f"{shape.prefix}-{admission.request_id}",
            "object": kind,
            "created": int(admission.started_at.timestamp()),
            "model": admission.route.model,
        }
        if body.service_tier is not None:
            found["service_tier"] = service_tier(admission.route.lane)
        return found

    return Call(
        services,
        caller,
        choice,
        ask,
        shape.operation,
        stream=bool(body.stream),
        whole=lambda a, record: {
            **envelope(a, shape.whole),
            "choices": shape.choices(),
            "usage": usage_object(record),
        },
        events=lambda a: Events(shape, envelope(a, shape.piece), body.include_usage),
        keep=shape.add,
    )


async def _model(  # who asks for what, how
    services: Services,
    caller: Principal,
    model: str,
    query: Callable[[], Query],
    given: Given,
    *,
    embeds: bool = False,
) -> tuple[Choice, Prompter]:
    """Where the request goes (``given``, if that is decided), and that model's tokenizer."""
    for name in services.lanes.models(model, caller):
        require_model(caller, name)
    choice = given or await services.lanes.choose(model, caller, query)
    route = choice.route
    if embeds != route.embeds:
        does = "makes embeddings only" if route.embeds else "makes no embeddings; it answers chats"
        raise InvalidRequest(f"{model} {does}", param="model")
    return choice, await services.routes.prompter(route)


# -- from calls to answers ---------------------------------------------------------------------


async def _answer(
    request: Request, read: Callable[[Services, Principal, bytes, Given], Awaitable[Call]]
) -> Response:
    """Authenticate, read, admit, generate, answer; once per Idempotency-Key."""
    services = services_of(request)
    caller = await principal_of(request)
    raw = await request.body()

    async def make() -> Response:
        began_s, now_s = time.perf_counter(), services.clock.monotonic()
        seen = seen_of(request.scope)
        try:
            services.limits.check(caller.api_key_id, caller.policy, now_s)
            call = await read(services, caller, raw, None)
            with _Turn(call) as turn:
                return await _tried(call, partial(read, services, caller, raw), began_s, seen, turn)
        except RateLimited:
            seen.rate_limits = services.limits.headers(caller.api_key_id, caller.policy, now_s)
            raise

    if "idempotency-key" in request.headers:
        return await services.idempotency.answer(request, caller, make)
    return await unless_gone(request, make(), partial(_is_patient, services, raw))


def _is_patient(services: Services, raw: bytes) -> bool:
    """Whether a body asks for a stream of a model that is starting.

    Who waits in a queue is not kept alive: a refusal there must be an HTTP status, which clients
    know to try again.
    """
    try:
        asked = msgspec.json.decode(raw, type=_Patience)
    except msgspec.DecodeError:
        return False
    return bool(asked.stream) and services.lanes.is_starting(asked.model)


class _Turn:
    """A request's part of its key's limits, from its admission to its record, over all tries."""

    def __init__(self, call: Call) -> None:
        services, caller, ask = call.services, call.caller, call.ask
        self._limits, self._clock = services.limits, services.clock
        limit = ask.sampling.max_tokens or pricing.FIRST_BLOCK_TOKENS
        expected = ask.input_tokens + limit * ask.count
        now_s = self._clock.monotonic()
        self._let = self._limits.enter(caller.api_key_id, caller.policy, expected, now_s)
        self._admission: Admission | None = None
        self._is_over = False

    def __enter__(self) -> "_Turn":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._admission is None:
            self._leave(0)

    def admit(self, admission: Admission) -> None:
        """This try is the one that counts: its record ends the turn."""
        self._admission = admission

        def on_record(record: UsageRecord) -> None:
            if self._admission is admission:
                self._leave(record.input_tokens + record.output_tokens)

        admission.on_record = on_record

    def again(self) -> None:
        """The last try was in vain; call it in the very step in which that is known."""
        self._admission = None

    def _leave(self, tokens: int) -> None:
        if not self._is_over:
            self._is_over = True
            self._limits.leave(self._let, tokens, self._clock.monotonic())


async def _tried(
    call: Call, read: Callable[[Given], Awaitable[Call]], began_s: float, seen: Seen, turn: _Turn
) -> Response:
    """An answer from where the choice says, or else from elsewhere.

    If it cannot be had there for want of money or turns, the first place has the last word.
    """
    choice = call.choice
    try:
        return await _generate(call, began_s, seen, turn)
    except ELSEWHERE as error:
        if choice.otherwise is None:
            if isinstance(error, SpillsSpent):
                raise NoCapacity(
                    f"the lease of {choice.route.model} does not serve yet, and its spills have "
                    "cost what they may today",
                    code="model_loading",
                    retry_after_s=5,
                ) from error
            raise
        turn.again()
        first = error
    try:
        return await _generate(await read(choice.otherwise), began_s, seen, turn)
    except REFUSED:
        if isinstance(first, InsufficientBalance):
            raise
        turn.again()
        if not isinstance(first, EngineFailed):
            raise first from None
    call = await read(replace(choice, otherwise=None))  # its replicas have a second try
    return await _generate(call, began_s, seen, turn)


async def _generate(call: Call, began_s: float, seen: Seen, turn: _Turn) -> Response:
    services, caller = call.services, call.caller
    seen.operation, seen.model, seen.stream = call.operation, call.choice.route.model, call.stream
    seen.sampling, seen.answers = call.ask.sampling, call.ask.answers
    _check_logprobs(call)
    try:
        admission = await services.inference.admit(caller, call.choice, call.ask)
    except SpillsSpent as error:
        if call.choice.cap is not None and error.retry_after_s is None:
            services.lanes.spent(call.choice.cap)
        raise
    turn.admit(admission)
    seen.request_id, seen.admission = admission.request_id, admission
    services.metrics.admitted(time.perf_counter() - began_s)
    stream = services.inference.stream(admission)
    if call.stream:
        # The first chunk decides whether this is an answer or an HTTP error.
        first = await anext(stream)
        headers = _headers(call, admission)
        return EventStream(_events(first, stream, call.events(admission), seen), headers)
    seen.record = record = await _collect(stream, call, admission)
    headers = _headers(call, admission)
    headers["x-market-cost"] = pricing.format_money(record.charge_pico)
    body = encode(call.whole(admission, record))
    return Response(body, media_type="application/json", headers=headers)


def _check_logprobs(call: Call) -> None:
    """Raises InvalidRequest for a whole answer with more log probabilities than can be kept."""
    sampling = call.ask.sampling
    if call.stream or sampling.logprobs is None:
        return
    limit = sampling.max_tokens or call.choice.route.max_context_tokens
    if call.ask.count * limit * (sampling.logprobs + 1) > LOGPROBS_MAX:
        raise InvalidRequest(
            f"log probabilities of {call.ask.count} x {limit} tokens are too many for one answer; "
            "lower max_tokens, n or top_logprobs, or set stream",
            param="logprobs",
        )


async def _collect(stream: Stream, call: Call, admission: Admission) -> UsageRecord:
    """Keep all chunks; returns the safe record."""
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, UsageRecord):
                return item
            try:
                call.keep(item)
            except Exception:
                admission.is_broken = True
                raise
    raise MarketFault("the answer ended without a usage record")


async def _events(
    first: EngineChunk | UsageRecord, stream: Stream, writer: Writer, seen: Seen
) -> AsyncGenerator[bytes, None]:
    """Chunks as server-sent events; the end comes only after the record is safe."""
    item = first
    async with aclosing(stream):
        written = writer.opening()
        try:
            while not isinstance(item, UsageRecord):
                written += writer.chunk(item)
                if written:
                    yield written
                written = b""
                item = await anext(stream)
        except MarketError as error:
            seen.error_code = error.code
            yield event(error.body())
            return
        except Exception:
            logger.exception("a stream broke")
            seen.break_off()
            fault = MarketFault("internal error; you are not billed")
            seen.error_code = fault.code
            yield event(fault.body())
            return
        seen.record = item
        yield written + writer.ending(item)


def _headers(call: Call, admission: Admission) -> dict[str, str]:
    services, caller, route = call.services, call.caller, admission.route
    headers = {
        "x-request-id": admission.request_id,
        "x-market-lane": call.choice.route.lane,
        "x-market-provider": route.provider_id,
        "x-market-price-id": admission.card.price_id,
    }
    if call.choice.reason is not None:
        headers["x-market-lane-reason"] = call.choice.reason
    if route.lease_id is not None:
        headers["x-market-lease-id"] = route.lease_id
    now_s = services.clock.monotonic()
    return headers | services.limits.headers(caller.api_key_id, caller.policy, now_s)


def _vector(raw: bytes, body: EmbeddingBody) -> str | list[float]:
    """A vector of 32-bit floats as the client wants it."""
    if body.encoding_format == "base64":
        return base64.b64encode(raw).decode()
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def _no_events(_admission: Admission) -> Writer:
    raise InvalidRequest("embeddings are not streamed", param="stream")


def _model_object(model: str, context_tokens: int, owner: str) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": 0,
        "owned_by": owner,
        "max_model_len": context_tokens,
    }


def _cold_model_object(model: str, services: Services) -> dict[str, Any]:
    """One that runs nowhere yet belongs to the market."""
    context_tokens = services.routes.model(model).served_context_tokens
    return _model_object(model, context_tokens, MARKET_PROVIDER)
