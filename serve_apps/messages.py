"""Messages and tools of OpenAI's chat requests, and how chat templates take them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PARTS_MAX = 256
TOOLS_MAX = 128


class ContentPart(BaseModel):
    """A part of a message; only text can be served."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class CalledFunction(BaseModel):
    """The function of a tool call that the model made before."""

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A tool call that the model made before."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=PARTS_MAX)] | None
    ) = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS_MAX)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text or part.refusal for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        for name in ("tool_call_id", "name"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message


class FunctionTool(BaseModel):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One of ``tools``."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(BaseModel):
    """The function of a ``tool_choice``."""

    name: str


class NamedTool(BaseModel):
    """``tool_choice`` that names a function."""

    type: Literal["function"]
    function: NamedFunction


def _arguments(text: str) -> Any:
    """Arguments as templates want them: the object, or the text if it is none."""
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return text
