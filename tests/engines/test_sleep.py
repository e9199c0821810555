"""vLLM's sleep mode: what we ask of it, and that it is there to be asked. It needs a GPU to run."""

import inspect

from serve_apps.engines.base import SleepingEngine
from serve_apps.engines.vllm import VllmEngine


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
