"""vLLM on a GPU: what we ask of it, and that it is there to be asked. It needs a GPU to run."""

import inspect
import os
from dataclasses import replace

import pytest

from market.errors import EngineFailed
from serve_apps.engines.base import EngineSettings, SleepingEngine
from serve_apps.engines.vllm import VllmEngine, start


class Recorder:
    def __init__(self):
        self.asked = []

    async def sleep(self, level):
        self.asked.append(("sleep", level))

    async def wake_up(self):
        self.asked.append(("wake_up",))


async def test_weights_go_to_the_hosts_memory_and_come_back():
    engine = VllmEngine.__new__(VllmEngine)
    engine._engine = Recorder()
    assert isinstance(engine, SleepingEngine)
    await engine.sleep()
    await engine.wake()
    assert engine._engine.asked == [("sleep", 1), ("wake_up",)]


def test_vllm_has_what_we_ask_for():
    from vllm import AsyncEngineArgs
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "level" in inspect.signature(AsyncLLM.sleep).parameters
    assert inspect.iscoroutinefunction(AsyncLLM.wake_up)
    assert "enable_sleep_mode" in AsyncEngineArgs.__dataclass_fields__
    # warm() replaces it, so that vLLM's processes are forked from one with the imports behind it.
    assert "context = get_mp_context()" in inspect.getsource(utils.CoreEngineProcManager)


async def test_it_may_sleep_and_what_it_compiles_stays(monkeypatch, tiny_model, tmp_path):
    from vllm.v1.engine.async_llm import AsyncLLM

    asked = {}

    def refuse(arguments):
        asked.update(vars(arguments), cache=os.environ.get("VLLM_CACHE_ROOT"))
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(AsyncLLM, "from_engine_args", staticmethod(refuse))
    for name in ("VLLM_CACHE_ROOT", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")  # to have it back
        monkeypatch.delenv(name)
    settings = EngineSettings(tiny_model, 2048, 0.475, compiled=tmp_path)
    with pytest.raises(EngineFailed, match="no GPU here"):
        await start(settings)
    assert asked["gpu_memory_utilization"] == 0.475
    assert (asked["enable_sleep_mode"], asked["enforce_eager"]) == (True, False)
    assert asked["cache"] == str(tmp_path)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "elsewhere")  # an operator knows better
    with pytest.raises(EngineFailed):
        await start(replace(settings, max_context_tokens=1024))
    assert asked["cache"] == "elsewhere"
