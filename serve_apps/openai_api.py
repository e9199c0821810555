"""``/v1``: the addresses OpenAI clients call."""

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from market import pricing
from market.errors import MarketError, MarketFault
from market.inference import Admission
from market.types import EngineChunk, FinishReason, Principal, Route, Sampling, UsageRecord
from serve_apps.http import Caller, EventStream, Services, With
from serve_apps.wire import (
    COMPLETION_MAX_TOKENS,
    ChatBody,
    ChatFormat,
    CompletionBody,
    CompletionFormat,
    Format,
    finish_on_wire,
    parse,
    usage_object,
)

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1")

Events = AsyncGenerator[EngineChunk | UsageRecord, None]
DONE = b"data: [DONE]\n\n"


@router.get("/models")
async def list_models(services: With, caller: Caller) -> dict[str, Any]:
    """Models that can be asked right now."""
    models = [_model_object(route) for route in services.routes.ready(caller)]
    return {"object": "list", "data": models}


@router.get("/models/{model}")
async def get_model(model: str, services: With, caller: Caller) -> dict[str, Any]:
    """One model."""
    return _model_object(await services.routes.route(model, caller))


@router.post("/chat/completions")
async def chat_completions(request: Request, services: With, caller: Caller) -> Response:
    """Answer a conversation."""
    body = parse(ChatBody, await request.body())
    route = await services.routes.route(body.model, caller)
    prompter = await services.routes.prompter(route)
    prompt = await prompter.chat(body)
    max_tokens = body.max_completion_tokens or body.max_tokens
    sampling = body.sampling(max_tokens, prompter.vocabulary)
    return await _answer(services, (caller, route, prompt, sampling), body, ChatFormat())


@router.post("/completions")
async def completions(request: Request, services: With, caller: Caller) -> Response:
    """Continue a text."""
    body = parse(CompletionBody, await request.body())
    route = await services.routes.route(body.model, caller)
    prompter = await services.routes.prompter(route)
    prompt = await prompter.completion(body)
    sampling = body.sampling(body.max_tokens or COMPLETION_MAX_TOKENS, prompter.vocabulary)
    return await _answer(services, (caller, route, prompt, sampling), body, CompletionFormat())


async def _answer(
    services: Services,
    asked: tuple[Principal, Route, tuple[int, ...], Sampling],
    body: ChatBody | CompletionBody,
    shape: Format,
) -> Response:
    admission = await services.inference.admit(*asked)
    events = services.inference.stream(admission)
    created = int(admission.started_at.timestamp())
    headers = {
        "x-request-id": admission.request_id,
        "x-market-lane": admission.route.lane,
        "x-market-provider": admission.route.provider_id,
        "x-market-price-id": admission.card.price_id,
    }
    if admission.route.lease_id is not None:
        headers["x-market-lease-id"] = admission.route.lease_id
    if not body.stream:
        text, record = await _collect(events)
        headers["x-market-cost"] = pricing.format_money(record.charge_pico)
        envelope = _envelope(shape.whole, shape, admission, created)
        choice = shape.choice(text, finish_on_wire(record.finish_reason))
        content = {**envelope, "choices": [choice], "usage": usage_object(record)}
        return JSONResponse(content, headers=headers)
    # The first chunk decides whether this is an answer or an HTTP error.
    first = await anext(events)
    envelope = _envelope(shape.piece, shape, admission, created)
    if body.include_usage:
        envelope["usage"] = None
    return EventStream(_sse(first, events, envelope, shape), headers)


async def _collect(events: Events) -> tuple[str, UsageRecord]:
    """The whole text and the committed record."""
    parts: list[str] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, UsageRecord):
                return "".join(parts), event
            parts.append(event.text)
    raise MarketFault("the answer ended without a usage record")


async def _sse(
    first: EngineChunk | UsageRecord, events: Events, envelope: dict[str, Any], shape: Format
) -> AsyncGenerator[bytes, None]:
    """Chunks as server-sent events; the end comes only after the record is committed."""
    async with aclosing(events):
        opening = shape.opening()
        if opening:
            yield _event({**envelope, "choices": opening})
        event: EngineChunk | UsageRecord = first
        reason: FinishReason | None = None
        try:
            while not isinstance(event, UsageRecord):
                reason = event.finish_reason
                if event.text or reason is not None:
                    choice = shape.delta(event.text, finish_on_wire(reason))
                    yield _event({**envelope, "choices": [choice]})
                event = await anext(events)
        except MarketError as error:
            yield _event(error.body())
            return
        except Exception:
            logger.exception("stream %s broke", envelope["id"])
            yield _event(MarketFault("internal error; you are not billed").body())
            return
        if "usage" in envelope:
            yield _event({**envelope, "choices": [], "usage": usage_object(event)})
        yield DONE


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def _envelope(kind: str, shape: Format, admission: Admission, created: int) -> dict[str, Any]:
    return {
        "id": f"{shape.prefix}-{admission.request_id}",
        "object": kind,
        "created": created,
        "model": admission.route.model,
    }


def _model_object(route: Route) -> dict[str, Any]:
    return {
        "id": route.model,
        "object": "model",
        "created": 0,
        "owned_by": route.provider_id,
        "max_model_len": route.max_context_tokens,
    }
