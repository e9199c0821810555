"""The engine's chunks as OpenAI's answers, whole or as server-sent events.

The common chunk, a piece of one answer's text, is put together from bytes: it is made thousands of
times a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from market import pricing
from market.types import EngineChunk, FinishReason, Position, TokenLogprob, UsageRecord

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


def finish_on_wire(reason: FinishReason | None) -> str | None:
    """OpenAI's word for the reason a response ended."""
    return "length" if reason is FinishReason.BUDGET else reason


def usage_object(record: UsageRecord) -> dict[str, Any]:
    """OpenAI's usage object, with what it cost as an exact decimal string."""
    return {
        "prompt_tokens": record.input_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": record.input_tokens + record.output_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_input_tokens},
        "cost": pricing.format_money(record.charge_pico),
    }


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


@dataclass(slots=True)
class Echo:
    """What a completion repeats of its prompt; ``only`` that, and nothing that was generated.

    The first token has no logprob, so its text is needed here.
    """

    text: str
    first_token: str = ""
    only: bool = False


@dataclass(slots=True)
class _Choice:
    """One answer so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=dict)
    parsed: bool = False
    begun: bool = False
    offset: int = 0
    reason: str | None = None


class ChatShape:
    """Shapes of chat answers."""

    operation = "chat"
    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def __init__(self, count: int) -> None:
        self._choices = [_Choice() for _ in range(count)]

    def opening(self) -> list[bytes]:
        """The choices before any text, each for an event of its own."""
        return [
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}' % index
            for index in range(len(self._choices))
        ]

    def pieces(self, chunk: EngineChunk) -> list[bytes]:
        """The choices that a chunk adds, each for an event of its own."""
        reason = finish_on_wire(chunk.finish_reason)
        if chunk.deltas is None and chunk.logprobs is None:
            if not chunk.text and reason is None:
                return []
            delta = b'{"content":%b}' % encode(chunk.text) if chunk.text else b"{}"
            return [_piece(chunk, b"delta", delta, b"null", reason)]
        if chunk.deltas is None:
            deltas = [encode({"content": chunk.text})] if chunk.text else []
        else:
            deltas = list(chunk.deltas)
        logprobs = b"null" if chunk.logprobs is None else encode(_chat_logprobs(chunk.logprobs))
        if not deltas and reason is None and chunk.logprobs is None:
            return []
        # Logprobs and the end go with the last one.
        *before, last = deltas or [b"{}"]
        return [
            *(_piece(chunk, b"delta", delta, b"null", None) for delta in before),
            _piece(chunk, b"delta", last, logprobs, reason),
        ]

    def add(self, chunk: EngineChunk) -> None:
        """Keep a chunk for the whole answer."""
        choice = self._choices[chunk.index]
        if chunk.logprobs is not None:
            choice.logprobs.append(_chat_logprobs(chunk.logprobs))
        if chunk.deltas is None:
            choice.texts.append(chunk.text)
        else:
            choice.parsed = True
            for delta in chunk.deltas:
                _merge(choice.message, decode(delta))
        if chunk.finish_reason is not None:
            choice.reason = finish_on_wire(chunk.finish_reason)

    def choices(self) -> list[dict[str, Any]]:
        """The whole answer's choices."""
        return [
            {
                "index": index,
                "message": self._message(choice),
                "logprobs": _joined(choice.logprobs),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]

    def _message(self, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        if not choice.parsed:
            return {**message, "content": "".join(choice.texts)}
        message |= {"content": None, **choice.message}
        message.pop("role", None)
        for call in message.get("tool_calls", []):
            call.pop("index", None)
        if not message.get("tool_calls") and message["content"] is None:
            message["content"] = ""
        return {"role": "assistant", **message}


class CompletionShape:
    """Shapes of completion answers."""

    operation = "text_completion"
    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def __init__(self, count: int, answers: int = 1, echoes: Sequence[Echo] = ()) -> None:
        self._choices = [_Choice() for _ in range(count)]
        self._answers = answers
        self._echoes = echoes

    def opening(self) -> list[bytes]:
        """Completions have no chunk before the text."""
        return []

    def pieces(self, chunk: EngineChunk) -> list[bytes]:
        """The choices that a chunk adds."""
        text, logprobs = self._content(chunk)
        reason = finish_on_wire(chunk.finish_reason)
        if not text and reason is None and logprobs is None:
            return []
        return [_piece(chunk, b"text", encode(text), encode(logprobs), reason)]

    def add(self, chunk: EngineChunk) -> None:
        """Keep a chunk for the whole answer."""
        choice = self._choices[chunk.index]
        text, logprobs = self._content(chunk)
        choice.texts.append(text)
        if logprobs is not None:
            choice.logprobs.append(logprobs)
        if chunk.finish_reason is not None:
            choice.reason = finish_on_wire(chunk.finish_reason)

    def choices(self) -> list[dict[str, Any]]:
        """The whole answer's choices."""
        return [
            {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": _joined(choice.logprobs),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]

    def _content(self, chunk: EngineChunk) -> tuple[str, dict[str, Any] | None]:
        """Text and logprobs, in front of them the prompt's if they are to be repeated."""
        choice = self._choices[chunk.index]
        first, choice.begun = not choice.begun, True
        echo = self._echoes[chunk.index // self._answers] if self._echoes else None
        text, places = chunk.text, list[Position | None](chunk.logprobs or ())
        if echo is not None and echo.only:
            text, places = "", []
        tokens = [place.chosen.text for place in places if place is not None]
        if echo is not None and first:
            text = echo.text + text
            if chunk.prompt_logprobs is not None:
                repeated = [p.chosen.text if p else echo.first_token for p in chunk.prompt_logprobs]
                tokens, places = repeated + tokens, [*chunk.prompt_logprobs, *places]
        if chunk.logprobs is None or not tokens:
            return text, None
        return text, self._logprobs(choice, tokens, places)

    def _logprobs(
        self, choice: _Choice, tokens: Sequence[str], places: Sequence[Position | None]
    ) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if p is None else p.chosen.logprob for p in places],
            "tokens": list(tokens),
            "top_logprobs": [None if p is None else _top(p) for p in places],
        }


Shape = ChatShape | CompletionShape


class Events:
    """Chunks as server-sent events of one request."""

    def __init__(self, shape: Shape, envelope: dict[str, Any], include_usage: bool) -> None:
        self._shape = shape
        self._envelope = envelope
        self._include_usage = include_usage
        self._head = b"data: " + encode(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def opening(self) -> bytes:
        """What comes before any text."""
        return self._join(self._shape.opening())

    def chunk(self, chunk: EngineChunk) -> bytes:
        """What a chunk adds; perhaps nothing."""
        return self._join(self._shape.pieces(chunk))

    def ending(self, record: UsageRecord) -> bytes:
        """What comes when the record is safe."""
        if not self._include_usage:
            return DONE
        return event({**self._envelope, "choices": [], "usage": usage_object(record)}) + DONE

    def _join(self, choices: list[bytes]) -> bytes:
        if len(choices) == 1:
            return self._head + choices[0] + self._tail
        return b"".join([self._head + choice + self._tail for choice in choices])


def _piece(
    chunk: EngineChunk, name: bytes, content: bytes, logprobs: bytes, reason: str | None
) -> bytes:
    stop = b""
    if reason is not None and chunk.stop_reason is not None:
        stop = b',"stop_reason":%b' % encode(chunk.stop_reason)
    ending = b"null" if reason is None else encode(reason)
    return b'{"index":%d,"%b":%b,"logprobs":%b,"finish_reason":%b%b}' % (
        chunk.index,
        name,
        content,
        logprobs,
        ending,
        stop,
    )


def _chat_logprobs(places: Sequence[Position]) -> dict[str, Any]:
    return {
        "content": [
            {**_chat_logprob(p.chosen), "top_logprobs": [_chat_logprob(t) for t in p.top]}
            for p in places
        ]
    }


def _chat_logprob(value: TokenLogprob) -> dict[str, Any]:
    return {
        "token": value.text,
        "logprob": value.logprob,
        "bytes": list(value.text.encode()),
    }


def _top(place: Position) -> dict[str, float]:
    """The likeliest tokens and the one that was chosen, as OpenAI's completions have them."""
    return {value.text: value.logprob for value in (*place.top, place.chosen)}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Logprobs of consecutive chunks as one."""
    if not parts:
        return None
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def _merge(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to a message: texts are joined, tool calls by their index."""
    for name, value in delta.items():
        if name == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for part in value:
                known = next((c for c in calls if c["index"] == part["index"]), None)
                if known is None:
                    function = {"name": "", "arguments": "", **part.get("function", {})}
                    calls.append({**part, "type": "function", "function": function})
                else:
                    more = part.get("function", {})
                    known["function"]["arguments"] += more.get("arguments") or ""
                    known["function"]["name"] += more.get("name") or ""
        elif isinstance(value, str) and isinstance(message.get(name), str):
            message[name] += value
        elif value is not None:
            message[name] = value
