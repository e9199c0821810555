"""``market chat``: talk to a model as a tenant would."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from market.cli.output import Output, OutputOption, note

if TYPE_CHECKING:
    import httpx

    from market.config import Config

TIMEOUT_S = 600.0


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(epilog='Example: market chat tiny-qwen "What is a dictionary in Python?"')(chat)


def chat(
    model: Annotated[str, typer.Argument(help="A deployed model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is deterministic.", min=0, max=2)] = 0.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask a model and see the answer stream, with its tokens and cost."""
    from market.cli.api import tenant_key
    from market.config import Config

    config = Config.from_env()
    key = tenant_key(config)
    messages: list[dict[str, str]] = []
    for question in [prompt] if prompt is not None else _questions():
        messages.append({"role": "user", "content": question})
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        messages.append({"role": "assistant", "content": _ask(config, key, body, output)})


def _questions() -> Iterator[str]:
    """Lines from the terminal until an empty one or the end of input."""
    note("an empty line ends the conversation")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _ask(config: "Config", key: str, body: dict[str, Any], output: Output) -> str:
    import httpx

    from market.cli.api import raise_for_error, unreachable
    from market.errors import MarketFault

    parts: list[str] = []
    usage: dict[str, Any] | None = None
    headers = {"authorization": f"Bearer {key}"}
    url = f"{config.url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT_S) as answer:
            if not answer.is_success:
                answer.read()
            raise_for_error(answer)
            for chunk in _chunks(answer):
                for choice in chunk["choices"]:
                    parts.append(choice["delta"].get("content") or "")
                    if output is Output.TABLE:
                        print(parts[-1], end="", flush=True)
                usage = chunk.get("usage") or usage
    except httpx.TransportError as error:
        raise unreachable(config, error) from None
    if usage is None:
        raise MarketFault("the answer broke off; you are not billed for it")
    if output is Output.JSON:
        print(json.dumps({"content": "".join(parts), "usage": usage}, indent=2))
    else:
        print()
        note(
            f"[{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out, "
            f"cost {usage['cost']}]"
        )
    return "".join(parts)


def _chunks(answer: "httpx.Response") -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event. Raises MarketFault for an error inside the stream."""
    from market.errors import MarketFault

    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise MarketFault(chunk["error"]["message"])
        yield chunk
