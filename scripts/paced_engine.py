"""A scripted engine for benchmarks: every 20 ms one token for each answer under way.

Paced like an engine on a GPU, it leaves the CPU to what stands in front of it. As an engine of the
market it is installed by an entry point that ``installed`` writes; as ``python paced_engine.py
PORT`` it is a bare uvicorn application that speaks the OpenAI protocol: the shortest way there is.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

STEP_S = 0.02
TEXTS = (
    " the",
    " of",
    " and",
    " a",
    " to",
    " in",
    " is",
    " list",
    " tuple",
    " for",
    " that",
    " it",
)


class Pacer:
    """One clock for all streams: at each tick every stream gets its next token."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self._step_s = step_s
        self._waiting: list[asyncio.Future[None]] = []
        self._running: asyncio.Task[None] | None = None

    async def step(self) -> None:
        """Wait for the next tick."""
        if self._running is None:
            self._running = asyncio.create_task(self._tick())
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s = max(due_s + self._step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)


async def start(_settings: object) -> "PacedEngine":
    """The engine as the market starts it."""
    return PacedEngine()


class PacedEngine:
    """LoadedEngine of the market."""

    kv_tokens = 0

    def __init__(self) -> None:
        self._pacer = Pacer()

    async def generate(self, request):  # type: ignore[no-untyped-def]
        """As many tokens as asked for."""
        from market.types import EngineChunk, FinishReason, TokenCounts

        input_tokens, limit = len(request.prompt_token_ids), request.sampling.max_tokens
        for produced in range(1, limit + 1):
            await self._pacer.step()
            text = TEXTS[produced % len(TEXTS)]
            reason = FinishReason.LENGTH if produced == limit else None
            counts = TokenCounts(input_tokens, 0, produced)
            yield EngineChunk(text, (produced % 100,), counts, reason)

    async def check_health(self) -> None:
        """It cannot break."""

    async def close(self) -> None:
        """Nothing to end."""


def installed(folder: Path) -> None:
    """Make ``folder``, once on PYTHONPATH, an installation of this engine under the name paced."""
    (folder / "paced_engine.py").write_text(Path(__file__).read_text())
    info = folder / "paced_engine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paced-engine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[market.engines]\npaced = paced_engine:start\n")


async def answer(pacer: Pacer, body: dict[str, object]) -> AsyncGenerator[bytes, None]:
    """Server-sent events of one chat answer."""
    limit = int(str(body["max_tokens"]))
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}

    def event(choices: list[object], **more: object) -> bytes:
        return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"

    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    yield event([first])
    for produced in range(1, limit + 1):
        await pacer.step()
        reason = "length" if produced == limit else None
        delta = {"content": TEXTS[produced % len(TEXTS)]}
        yield event([{"index": 0, "delta": delta, "finish_reason": reason}])
    usage = {"prompt_tokens": 1, "completion_tokens": limit, "total_tokens": limit + 1}
    yield event([], usage=usage)
    yield b"data: [DONE]\n\n"


def application():  # type: ignore[no-untyped-def]
    """The bare application."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    pacer = Pacer()

    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(answer(pacer, body), media_type="text/event-stream")
        limit = body["max_tokens"]
        for _ in range(limit):
            await pacer.step()
        text = "".join(TEXTS[n % len(TEXTS)] for n in range(1, limit + 1))
        message = {"role": "assistant", "content": text}
        return JSONResponse(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "tiny",
                "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": limit, "total_tokens": limit},
            }
        )

    async def health(_request: Request) -> Response:
        return JSONResponse({})

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/health", health),
    ]
    return Starlette(routes=routes)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(application(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
