"""Credit: how many output tokens of an answer are paid for, growing while it is generated.

The gateway extends it block by block; whoever runs the engine lets no token beyond it out, so that
an answer whose money ends is cut at exactly the last token that was paid for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from market.types import EngineChunk, FinishReason, TokenCounts


class Credit:
    """Tokens that may be generated. A ``final`` credit grows no more.

    ``on_extend`` is called after every change: an engine far away passes it on.
    """

    def __init__(self, tokens: int, final: bool = False) -> None:
        self.tokens = tokens
        self.final = final
        self.on_extend: Callable[[], None] | None = None
        self._waiter: asyncio.Event | None = None

    def extend(self, tokens: int, final: bool = False) -> None:
        """Raise it to ``tokens`` in all; an older, smaller value changes nothing."""
        self.tokens = max(self.tokens, tokens)
        self.final = self.final or final
        if self._waiter is not None:
            self._waiter.set()
        if self.on_extend is not None:
            self.on_extend()

    async def covers(self, tokens: int) -> bool:
        """Whether ``tokens`` in all are paid for; waits for the answer if that is not decided."""
        while self.tokens < tokens and not self.final:
            self._waiter = self._waiter or asyncio.Event()
            self._waiter.clear()
            await self._waiter.wait()
        return self.tokens >= tokens


async def within(
    chunks: AsyncGenerator[EngineChunk, None], credit: Credit
) -> AsyncGenerator[EngineChunk, None]:
    """The same stream as far as ``credit`` reaches; then it ends with ``length``.

    A chunk of several tokens cannot be split: where it does not fit as a whole it is left out.
    """
    produced = 0
    counts: TokenCounts | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            wanted = produced + len(chunk.token_ids)
            if wanted > credit.tokens and not await credit.covers(wanted):
                break
            produced, counts = wanted, chunk.counts
            yield chunk
            if chunk.finish_reason is not None:
                return
            if credit.final and produced >= credit.tokens:
                break
        else:
            return  # the engine ended without a reason: whoever reads on decides what that means
    if counts is None:
        counts = TokenCounts(chunk.counts.input_tokens, chunk.counts.cached_input_tokens, 0)
    known = TokenCounts(counts.input_tokens, counts.cached_input_tokens, produced)
    yield EngineChunk("", (), known, FinishReason.LENGTH)
