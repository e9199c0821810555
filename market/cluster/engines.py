"""Which engines there are: ours, and those of installed packages."""

import importlib.util
from importlib.metadata import entry_points

from market.errors import InvalidRequest

ENGINES = {
    "transformers": "serve_apps.engines.transformers:start",
    "vllm": "serve_apps.engines.vllm:start",
}
GROUP = "market.engines"
# An entry point with this extra is of an engine that can sleep, as vLLM can.
SLEEPS = "sleeps"


def engine_paths() -> dict[str, str]:
    """Name -> ``module:function`` that starts it.

    A package adds an engine by an entry point of the group ``market.engines``.
    """
    found = entry_points(group=GROUP)
    return {entry.name: f"{entry.module}:{entry.attr}" for entry in found} | ENGINES


def sleeps(name: str, *, logical: bool) -> bool:
    """Whether an engine can leave its GPUs without ending (base.SleepingEngine)."""
    if name in ENGINES:
        return name == "vllm" and not logical
    return any(SLEEPS in entry.extras for entry in entry_points(group=GROUP, name=name))


def require_engine(name: str, embeds: bool) -> None:
    """Raises InvalidRequest if there is no such engine, it is not installed, or cannot embed."""
    paths = engine_paths()
    if name not in paths:
        known = " or ".join(sorted(paths))
        raise InvalidRequest(f"engine {name!r} is unknown; use {known}", param="engine")
    if name in ENGINES and importlib.util.find_spec(name) is None:
        raise InvalidRequest(
            f"engine {name} is not installed here; run: scripts/setup --engine {name}",
            param="engine",
        )
    if embeds and name == "vllm":
        raise InvalidRequest("embeddings are served by --engine transformers", param="engine")
