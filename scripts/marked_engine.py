"""One of our engines that says when it has done what, for benchmarks.

An engine of the market by an entry point that ``installed`` writes; which one it is around says
MARKED_ENGINE. Its lines are ``mark``, seconds since the epoch, what was done.
"""

import importlib
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from types import ModuleType

from market.cluster.engines import engine_paths
from market.types import EngineChunk, EngineRequest
from serve_apps.engines.base import EngineSettings, LoadedEngine, start_engine, warm_engine

NAME = "marked"
INNER = "MARKED_ENGINE"


def mark(done: str) -> None:
    """Say that it is done now."""
    print(f"mark {time.time():.4f} {done}", flush=True)


def inner() -> ModuleType:
    """The engine's own module."""
    return importlib.import_module(engine_paths()[os.environ[INNER]].partition(":")[0])


def import_all() -> None:
    """Import what the engine imports in its process, and make none for its others."""
    for name in getattr(inner(), "IMPORTED", ()):
        importlib.import_module(name)
    mark("imports")


def warm() -> None:
    """As the engine's own."""
    warm_engine(os.environ[INNER], rehearses=False)
    mark("imports")


def rehearse() -> None:
    """As the engine's own, if it does."""
    getattr(inner(), "rehearse", lambda: None)()


async def start(settings: EngineSettings) -> "MarkedEngine":
    """As the engine's own."""
    mark("told to load")
    engine = await start_engine(os.environ[INNER], settings)
    mark("load")
    return MarkedEngine(engine)


class MarkedEngine:
    """The engine; its first request and that one's first text are marked."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._engine = engine
        self._marked = False
        self.kv_tokens = engine.kv_tokens

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """As the engine's own."""
        marked = self._marked or request.request_id == "warm-up"
        if not marked:
            self._marked = True
            mark("asked")
        async with aclosing(self._engine.generate(request)) as chunks:
            async for chunk in chunks:
                if chunk.text and not marked:
                    marked = True
                    mark("first token")
                yield chunk

    async def check_health(self) -> None:
        """As the engine's own."""
        await self._engine.check_health()

    async def close(self) -> None:
        """As the engine's own."""
        await self._engine.close()


def installed(folder: Path) -> None:
    """Make ``folder``, once on PYTHONPATH, an installation of this engine."""
    (folder / "marked_engine.py").write_text(Path(__file__).read_text())
    info = folder / "marked_engine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: marked-engine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[market.engines]\n{NAME} = marked_engine:start\n")
