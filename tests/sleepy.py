"""An engine of another package that can sleep: what vLLM does on GPUs, without them."""

from pathlib import Path

from market.errors import EngineFailed
from market.types import EngineChunk, FinishReason, TokenCounts

WORD = 40  # any token that every vocabulary has


async def start(_settings):
    """As the market starts it."""
    return SleepyEngine()


class SleepyEngine:
    """Says as many words as asked for, while it is awake."""

    kv_tokens = 1_000_000

    def __init__(self):
        self.asleep, self.sleeps = False, 0

    async def generate(self, request):
        """Fails if it sleeps: nobody may ask it then."""
        if self.asleep:
            raise EngineFailed("asked in its sleep")
        inputs, limit = len(request.prompt_token_ids), request.sampling.max_tokens
        for produced in range(1, limit + 1):
            reason = FinishReason.LENGTH if produced == limit else None
            counts = TokenCounts(inputs, 0, produced)
            yield EngineChunk(f"{self.sleeps} ", (WORD,), counts, reason)

    async def sleep(self):
        """Leave the GPU."""
        self.asleep, self.sleeps = True, self.sleeps + 1

    async def wake(self):
        """Be back."""
        self.asleep = False

    async def check_health(self):
        """It cannot break."""

    async def close(self):
        """Nothing to end."""


def installed(folder: Path) -> None:
    """Make ``folder``, once on PYTHONPATH, an installation of this engine under the name sleepy."""
    (folder / "sleepy_engine.py").write_text(Path(__file__).read_text())
    info = folder / "sleepy_engine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sleepy-engine\nVersion: 1\n")
    entry = "[market.engines]\nsleepy = sleepy_engine:start [sleeps]\n"
    (info / "entry_points.txt").write_text(entry)
