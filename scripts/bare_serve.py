"""A bare Ray Serve application around an engine of the market: no keys, no metering, no gateway.

What Ray Serve itself costs, for scripts/bench_gateway.py: ``bare_serve.py PORT ENGINE MODEL``.
"""

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.config import HTTPOptions

from market.types import EngineRequest, Sampling
from serve_apps.engines.base import EngineSettings, start_engine
from serve_apps.tokenization import load_prompter
from serve_apps.wire import ChatBody, parse

app = FastAPI()
CONTEXT = 2048
SEQUENCES = 128


# Above the class: the decorator takes along what is there when it runs.
def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@serve.deployment(max_ongoing_requests=1000, health_check_timeout_s=60)
@serve.ingress(app)
class Bare:
    """Engine and HTTP in one replica behind Ray Serve's proxy."""

    async def __init__(self, engine: str, folder: str) -> None:  # type: ignore[misc]
        settings = EngineSettings(Path(folder), CONTEXT, 0.0, sequences_max=SEQUENCES)
        self._engine = await start_engine(engine, settings)
        self._prompter = load_prompter(folder)
        self._numbers = itertools.count()

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        """It answers."""
        return {}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """One answer."""
        body = parse(ChatBody, await request.body())
        prompt = await self._prompter.chat(body, 0)
        sampling = Sampling(body.max_tokens or 16, ignore_eos=body.ignore_eos)
        asked = EngineRequest(f"req-{next(self._numbers)}", prompt, sampling, "nobody")
        head = {"id": asked.request_id, "created": 1, "model": body.model}
        if body.stream:
            events = self._events(asked, head)
            return StreamingResponse(events, media_type="text/event-stream")
        text, produced = "", 0
        async for chunk in self._engine.generate(asked):
            text += chunk.text
            produced = chunk.counts.output_tokens
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        usage = _usage(len(prompt), produced)
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def _events(
        self, asked: EngineRequest, head: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        head = {**head, "object": "chat.completion.chunk"}
        delta: dict[str, str] = {"role": "assistant", "content": ""}
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        produced = 0
        async for chunk in self._engine.generate(asked):
            produced = chunk.counts.output_tokens
            choice = {
                "index": 0,
                "delta": {"content": chunk.text},
                "finish_reason": chunk.finish_reason,
            }
            yield _event({**head, "choices": [choice]})
        usage = _usage(len(asked.prompt_token_ids), produced)
        yield _event({**head, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def main() -> None:
    """Serve until SIGTERM."""
    port, engine, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, address="local")
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(Bare.bind(engine, folder))
    stop = asyncio.Event()

    async def wait() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()

    asyncio.run(wait())
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
