"""OpenAI's requests as pydantic models, and what engines are asked because of them.

Unknown fields are tolerated; fields that would change the answer and cannot be honoured are refused
by name, never ignored.
"""

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

from market.errors import InvalidRequest
from market.routing import Query
from market.types import Grammar, GrammarKind, Lane, Sampling
from serve_apps.messages import TOOLS_MAX, Message, NamedTool, Tool

COMPLETION_MAX_TOKENS = 16
STOP_MAX = 16
LOGIT_BIAS_MAX = 300
MESSAGES_MAX = 4096
ANSWERS_MAX = 128
TOP_LOGPROBS_MAX = 20
SCHEMA_MAX_BYTES = 128 * 1024
# Of text, about; for what is decided before it is tokenized.
CHARACTERS_PER_TOKEN = 4

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """``stream_options`` of a request."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(BaseModel):
    """vLLM's own way to constrain an answer; one of them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def constraint(self) -> Grammar | None:
        """As engines take it. Raises InvalidRequest unless it is exactly one."""
        found = []
        if self.schema_ is not None:
            text = self.schema_ if isinstance(self.schema_, str) else json.dumps(self.schema_)
            found.append(Grammar(GrammarKind.JSON_SCHEMA, text))
        if self.json_object:
            found.append(Grammar(GrammarKind.JSON_OBJECT))
        if self.regex is not None:
            found.append(Grammar(GrammarKind.REGEX, self.regex))
        if self.choice is not None:
            found.append(Grammar(GrammarKind.CHOICE, json.dumps(self.choice)))
        if self.grammar is not None:
            found.append(Grammar(GrammarKind.GRAMMAR, self.grammar))
        if len(found) > 1:
            raise InvalidRequest(
                "structured_outputs: one kind of constraint, not several",
                param="structured_outputs",
            )
        return found[0] if found else None


class JsonSchema(BaseModel):
    """``response_format.json_schema``."""

    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """``response_format``: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _needs_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    def constraint(self) -> Grammar | None:
        """As engines take it."""
        if self.type == "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        if self.json_schema is not None and self.type == "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.json_schema.schema_))
        return None


class GenerationBody(BaseModel):
    """What chat and completion requests share."""

    model_config = ConfigDict(extra="allow", strict=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=STOP_MAX)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=STOP_MAX)] | None
    ) = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: (
        Annotated[
            dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=LOGIT_BIAS_MAX)
        ]
        | None
    ) = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    n: Annotated[int, Field(ge=1, le=ANSWERS_MAX)] | None = None
    service_tier: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> "GenerationBody":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def answers(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    def constraint(self) -> Grammar | None:
        """What the answer's text must follow. Raises InvalidRequest."""
        found = None
        if self.structured_outputs is not None:
            found = self.structured_outputs.constraint()
        if found is None and self.response_format is not None:
            found = self.response_format.constraint()
        if found is not None and len(found.text) > SCHEMA_MAX_BYTES:
            raise InvalidRequest(
                f"the schema is larger than {SCHEMA_MAX_BYTES} bytes", param="response_format"
            )
        return found

    def sampling(
        self,
        max_tokens: int | None,
        vocabulary: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Sampling:
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
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        choice = self.tool_choice
        if self.tools is None:
            if choice not in (None, "none", "auto"):
                raise ValueError("tool_choice needs tools")
        elif isinstance(choice, NamedTool) and all(
            tool.function.name != choice.function.name for tool in self.tools
        ):
            raise ValueError(f"tool_choice names {choice.function.name!r}, which is not in tools")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives per token, None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def query(self) -> Query:
        """What tells how hard it is: the last thing that the user says."""
        texts = [str(message.for_template()["content"]) for message in self.messages]
        asked = [t for m, t in zip(self.messages, texts, strict=True) if m.role == "user"]
        tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN + (self.limit or 0)
        return Query((asked or texts)[-1], tokens, bool(self.tools_for_template()))

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """As chat templates take them; fields as vLLM gives them, so that prompts are equal."""
        if self.tools is None or self.tool_choice == "none":
            return None
        given = [tool.function for tool in self.tools]
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description,
                    "parameters": function.parameters,
                }
                | ({} if function.strict is None else {"strict": function.strict}),
            }
            for function in given
        ]

    def parsing(self, has_reasoning: bool) -> bytes | None:
        """The request for the model's own parsers, if the answer has to go through them."""
        tools = self.tools_for_template()
        if tools is None and not has_reasoning:
            return None
        asked: dict[str, Any] = {
            "model": self.model,
            # The conversation is in the prompt's tokens; parsers need only what follows.
            "messages": [{"role": "user", "content": ""}],
            "stream": bool(self.stream),
            "include_reasoning": self.include_reasoning,
            "skip_special_tokens": self.skip_special_tokens,
        }
        if tools is not None:
            choice = self.tool_choice or "auto"
            asked["tools"] = tools
            asked["tool_choice"] = (
                choice if isinstance(choice, str) else choice.model_dump(exclude_none=True)
            )
            if self.parallel_tool_calls is not None:
                asked["parallel_tool_calls"] = self.parallel_tool_calls
        if self.response_format is not None:
            asked["response_format"] = self.response_format.model_dump(
                by_alias=True, exclude_none=True
            )
        if self.chat_template_kwargs:
            asked["chat_template_kwargs"] = self.chat_template_kwargs
        return json.dumps(asked).encode()


class CompletionBody(GenerationBody):
    """``POST /v1/completions``. ``prompt`` becomes a list of texts or lists of token ids."""

    prompt: list[str | list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False

    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, prompt: object) -> object:
        """One or several texts, one or several lists of token ids.

        Checked by hand: trying every branch of a union on a long list costs seconds.
        """
        if isinstance(prompt, str) or _is_ids(prompt):
            return [prompt]
        if (
            isinstance(prompt, list)
            and 0 < len(prompt) <= ANSWERS_MAX
            and (all(isinstance(part, str) for part in prompt) or all(map(_is_ids, prompt)))
        ):
            return prompt
        raise ValueError(
            f"must be a text, a list of token ids, or up to {ANSWERS_MAX} of either (not mixed)"
        )

    @model_validator(mode="after")
    def _check_count(self) -> "CompletionBody":
        if len(self.prompt) * self.answers > ANSWERS_MAX:
            raise ValueError(f"prompts times n must not exceed {ANSWERS_MAX}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo")
        return self

    @property
    def limit(self) -> int:
        """Most tokens of an answer; an engine generates at least one."""
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else max(1, self.max_tokens)

    def query(self) -> Query:
        """What tells how hard it is. Raises InvalidRequest for token ids: whose tokens are they?"""
        return _query_of(self.prompt, "prompt", self.limit)


class EmbeddingBody(BaseModel):
    """``POST /v1/embeddings``. ``input`` becomes a list of texts or lists of token ids."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: list[str | list[int]]

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def query(self) -> Query:
        """As of a completion's prompt."""
        return _query_of(self.input, "input", 0)

    @field_validator("input", mode="plain")
    @classmethod
    def _inputs(cls, value: object) -> object:
        return CompletionBody._prompts(value)


_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "length_penalty": (None, 1, 1.0),
    "verbosity": (None, "medium"),
}
# Known to one kind of request only; the other must not ignore them.
_CHAT_ONLY = {"echo": (None, False), "top_logprobs": (None, 0)}


def parse(kind: type[Body], raw: bytes) -> Body:
    """The request body. Raises InvalidRequest that names the wrong field."""
    try:
        body = kind.model_validate(json_object(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_type_name(part))
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{where or 'body'}: {message}", param=where or None) from None
    given = body.model_extra or {}
    for name, neutral in (_NOT_SERVED | _CHAT_ONLY).items():
        if given.get(name) not in neutral:
            raise InvalidRequest(
                f"{name} is not supported by this server",
                code="unsupported_parameter",
                param=name,
            )
    return body


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises InvalidRequest."""
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():  # escapes may hide half a character, which is no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


def _query_of(given: list[str | list[int]], param: str, answer_tokens: int) -> Query:
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise InvalidRequest(
            "token ids are those of one model; name the model, or send text", param=param
        )
    longest = max(texts, key=len, default="")
    return Query(longest, len(longest) // CHARACTERS_PER_TOKEN + answer_tokens)


def service_tier(lane: Lane) -> str:
    """OpenAI's word for how a request was served."""
    return "scale" if lane is Lane.LEASE else "default"


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _is_type_name(part: int | str) -> bool:
    """pydantic names the branch of a union in an error's place; users do not know those."""
    if not isinstance(part, str):
        return False
    known = ("str", "int", "bool", "NamedTool", "function-after")
    return part in known or part.startswith(("list[", "literal[", "function-"))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
