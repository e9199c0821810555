"""OpenAI's Responses API on top of chat: text in, text out, whole or streamed.

Nothing is stored, so ``previous_response_id`` is refused; tools are those of chat completions.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from market import pricing
from market.errors import InvalidRequest
from market.metering import Admission
from market.types import EngineChunk, FinishReason, UsageRecord
from serve_apps.messages import PARTS_MAX
from serve_apps.shapes import encode
from serve_apps.wire import MESSAGES_MAX, ChatBody, service_tier


class InputPart(BaseModel):
    """A part of a message; only text can be served."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    """A message of ``input``."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=PARTS_MAX)]

    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """``text``."""

    format: TextFormat = TextFormat.model_validate({})


class ResponsesBody(BaseModel):
    """``POST /v1/responses``."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MESSAGES_MAX)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextOptions = TextOptions()
    metadata: dict[str, str] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    service_tier: str | None = None
    user: str | None = None

    def as_chat(self) -> ChatBody:
        """The same as a chat request."""
        messages = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [{"role": item.role, "content": item.text()} for item in self.input]
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "ignore_eos": bool((self.model_extra or {}).get("ignore_eos")),
        }
        form = self.text.format
        if form.type != "text":
            asked["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            schema = {"name": form.name, "schema": form.schema_ or {}}
            asked["response_format"]["json_schema"] = schema
        try:
            return ChatBody.model_validate(asked)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidRequest(f"{first['loc'][0]}: {first['msg']}") from None


def responses_object(
    body: ResponsesBody, admission: Admission, choice: dict[str, Any], record: UsageRecord
) -> dict[str, Any]:
    """The whole answer."""
    text = choice["message"]["content"] or ""
    return _object(body, admission, [_message(admission, text, "completed")], record)


class ResponsesEvents:
    """An answer as the Responses API's server-sent events."""

    def __init__(self, body: ResponsesBody, admission: Admission) -> None:
        self._body = body
        self._admission = admission
        self._number = -1
        self._texts: list[str] = []
        self._place = {
            "item_id": _message_id(admission),
            "output_index": 0,
            "content_index": 0,
        }

    def opening(self) -> bytes:
        """What comes before any text."""
        begun = _object(self._body, self._admission, [], None)
        item = {**_message(self._admission, None, "in_progress")}
        part = {"type": "output_text", "text": "", "annotations": []}
        return b"".join(
            [
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=part),
            ]
        )

    def chunk(self, chunk: EngineChunk) -> bytes:
        """What a chunk adds; perhaps nothing."""
        if not chunk.text:
            return b""
        self._texts.append(chunk.text)
        return self._event(
            "response.output_text.delta", **self._place, delta=chunk.text, logprobs=[]
        )

    def ending(self, record: UsageRecord) -> bytes:
        """What comes when the record is safe."""
        text = "".join(self._texts)
        item = _message(self._admission, text, "completed")
        whole = _object(self._body, self._admission, [item], record)
        part = item["content"][0]
        return b"".join(
            [
                self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{whole['status']}", response=whole),
            ]
        )

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        body = {"type": kind, "sequence_number": self._number, **content}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(body))


def _object(
    body: ResponsesBody,
    admission: Admission,
    output: list[dict[str, Any]],
    record: UsageRecord | None,
) -> dict[str, Any]:
    status, details, usage = "in_progress", None, None
    if record is not None:
        cut = record.finish_reason in (FinishReason.LENGTH, FinishReason.BUDGET)
        status = "incomplete" if cut else "completed"
        details = {"reason": "max_output_tokens"} if cut else None
        usage = {
            "input_tokens": record.input_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_input_tokens},
            "output_tokens": record.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.input_tokens + record.output_tokens,
            "cost": pricing.format_money(record.charge_pico),
        }
    return {
        "id": f"resp-{admission.request_id}",
        "object": "response",
        "created_at": int(admission.started_at.timestamp()),
        "status": status,
        "error": None,
        "incomplete_details": details,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": admission.route.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": service_tier(admission.route.lane),
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": usage,
        "user": body.user,
    }


def _message(admission: Admission, text: str | None, status: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    return {
        "id": _message_id(admission),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [part],
    }


def _message_id(admission: Admission) -> str:
    return f"msg-{admission.request_id}"
