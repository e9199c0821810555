"""What every engine is given and what it tells besides its chunks."""

import importlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from market.cluster.engines import engine_paths
from market.types import EngineChunk, EngineRequest, FinishReason, TokenCounts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to load a model. ``gpu_fraction`` is the share of each card's memory, 0 without a GPU.

    What an engine compiles for a GPU it keeps in ``compiled``, so that the node does it once.
    Parsers are those of vLLM, by name. A model that ``embeds`` makes vectors.
    """

    folder: Path
    max_context_tokens: int
    gpu_fraction: float
    kv_cache_mib: int = 1024
    sequences_max: int = 128
    tensor_parallel: int = 1
    tool_parser: str = ""
    reasoning_parser: str = ""
    embeds: bool = False
    compiled: Path | None = None


class LoadedEngine(Protocol):
    """The Engine port and the life of the engine behind it.

    ``kv_tokens``: how many tokens its KV cache holds; 0 if it has none.
    """

    @property
    def kv_tokens(self) -> int: ...  # noqa: D102

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer; closing the iterator aborts it."""
        ...

    async def check_health(self) -> None:
        """Raises EngineFailed if the engine can serve no more."""
        ...

    async def close(self) -> None:
        """End the engine and its processes."""
        ...


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that can leave its GPUs and come back sooner than it could start."""

    async def sleep(self) -> None:
        """Move the weights to the host's memory, drop the rest; nothing may be under way."""
        ...

    async def wake(self) -> None:
        """Be as before."""
        ...


def warm_engine(name: str, *, rehearses: bool) -> None:
    """Import all that the engine called ``name`` imports when it loads a model.

    An engine that can also loads one and asks it, if it ``rehearses``: never where there are GPUs,
    of which it does not know yet which will be its own.
    """
    module_name, _, _ = engine_paths()[name].partition(":")
    module = importlib.import_module(module_name)
    if hasattr(module, "warm"):
        module.warm()
    if rehearses and hasattr(module, "rehearse"):
        try:
            module.rehearse()
        except Exception as error:  # noqa: BLE001  # only the first answer takes longer
            logger.warning("%s could not rehearse: %s", name, error)


async def start_engine(name: str, settings: EngineSettings) -> LoadedEngine:
    """Import and load the engine called ``name``; only its own heavy packages are imported."""
    module, _, function = engine_paths()[name].partition(":")
    start = getattr(importlib.import_module(module), function)
    return cast(LoadedEngine, await start(settings))


def chunk(
    text: str, token_ids: tuple[int, ...], counts: tuple[int, int, int], reason: str | None
) -> EngineChunk:
    """A chunk from plain values; ``counts`` = (input, cached input, output)."""
    finish = None if reason is None else FinishReason(reason)
    return EngineChunk(text, token_ids, TokenCounts(*counts), finish)
