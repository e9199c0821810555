"""OpenAI's wire format: requests as pydantic models, answers as plain dictionaries."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from market import pricing
from market.errors import InvalidRequest
from market.types import FinishReason, Sampling, UsageRecord

COMPLETION_MAX_TOKENS = 16
STOP_MAX = 16
LOGIT_BIAS_MAX = 300
MESSAGES_MAX = 4096
PARTS_MAX = 256

Body = TypeVar("Body", bound="GenerationBody")


class StreamOptions(BaseModel):
    """``stream_options`` of a request."""

    include_usage: bool = False


class GenerationBody(BaseModel):
    """What chat and completion requests share. Unknown fields are tolerated."""

    model_config = ConfigDict(extra="allow", strict=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=STOP_MAX)] | None = None
    logit_bias: (
        Annotated[
            dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=LOGIT_BIAS_MAX)
        ]
        | None
    ) = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: int | None = None
    logprobs: bool | int | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> "GenerationBody":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None, vocabulary: int) -> Sampling:
        """The request's parameters with OpenAI's defaults.

        Raises InvalidRequest for a logit bias on a token that does not exist.
        """
        bias = self.logit_bias or {}
        unknown = [token_id for token_id in bias if not 0 <= token_id < vocabulary]
        if unknown:
            raise InvalidRequest(
                f"logit_bias names token {unknown[0]}, but the vocabulary has {vocabulary}",
                param="logit_bias",
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            seed=self.seed,
            stop=tuple(text for text in stop if text),
            logit_bias=tuple(sorted(bias.items())),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
        )


class ContentPart(BaseModel):
    """A part of a message; only text can be served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=PARTS_MAX)] | None
    tool_calls: None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | list[int]

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_prompt(cls, prompt: object) -> object:
        """A text or its token ids, bare or as the only one of a list.

        Checked by hand: trying every branch of a union on a long list costs seconds.
        """
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt)
        ):
            return prompt
        raise ValueError("must be one text or one list of token ids (several are not supported)")


_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "stop_token_ids": (None, []),
    "chat_template_kwargs": (None, {}),
}


def parse(kind: type[Body], raw: bytes) -> Body:
    """The request body. Raises InvalidRequest that names the wrong field.

    Parameters that would change the answer but are not served yet are refused, not ignored.
    """
    try:
        body = kind.model_validate(_object(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_type_name(part))
        raise InvalidRequest(f"{where or 'body'}: {first['msg']}", param=where or None) from None
    given = body.model_dump(include=set(_NOT_SERVED)) | (body.model_extra or {})
    for name, neutral in _NOT_SERVED.items():
        if given.get(name) not in neutral:
            raise InvalidRequest(
                f"{name} is not supported by this server yet",
                code="unsupported_parameter",
                param=name,
            )
    return body


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():  # escapes may hide half a character, which is no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


def _is_type_name(part: int | str) -> bool:
    """pydantic names the branch of a union in an error's place; users do not know those."""
    return isinstance(part, str) and (part in ("str", "int", "bool") or part.startswith("list["))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


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


class ChatFormat:
    """Shapes of chat answers."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """The choice of a complete answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the chunk before the text."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        """The choice of a streamed piece."""
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


class CompletionFormat:
    """Shapes of completion answers."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """The choice of a complete answer or a streamed piece."""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        """Completions have no chunk before the text."""
        return []

    delta = choice


Format = ChatFormat | CompletionFormat
