"""Credit: how many output tokens of an answer are paid for, growing while it is generated.

The gateway extends it block by block; whoever runs the engine lets no token beyond it out, so that
an answer whose money ends is cut at exactly the last token that was paid for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from market.types import EngineChunk, FinishReason, TokenCounts

# Answers that nobody reads before their end travel in blocks of so many tokens.
WHOLE_BLOCK_TOKENS = 32


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

    async def grown(self, tokens: int) -> None:
        """Wait until it is more than ``tokens``, or final."""
        while self.tokens <= tokens and not self.final:
            self._waiter = self._waiter or asyncio.Event()
            self._waiter.clear()
            await self._waiter.wait()


async def within(
    chunks: AsyncGenerator[EngineChunk, None], credit: Credit, begun: int = 0
) -> AsyncGenerator[EngineChunk, None]:
    """The same stream as far as ``credit`` reaches; then it ends with ``length``.

    Of the answer, ``begun`` tokens were generated elsewhere before.

    A chunk of several tokens cannot be split: until it fits as a whole the stream stands still,
    after an empty chunk that says so (``wants``); if it never does, it is left out.
    """
    produced = begun
    counts = TokenCounts(0, 0, 0)
    async with aclosing(chunks):
        async for chunk in chunks:
            wanted = produced + len(chunk.token_ids)
            counts = chunk.counts
            while wanted > credit.tokens and not credit.final:
                tokens = credit.tokens
                yield EngineChunk("", (), _at(counts, produced), wants=wanted)
                await credit.grown(tokens)
            if wanted > credit.tokens:
                break
            produced = wanted
            yield chunk
            if chunk.finish_reason is not None:
                return
            if credit.final and produced >= credit.tokens:
                break
        else:
            return  # the engine ended without a reason: whoever reads on decides what that means
    yield EngineChunk("", (), _at(counts, produced), FinishReason.LENGTH)


def _at(counts: TokenCounts, produced: int) -> TokenCounts:
    return TokenCounts(counts.input_tokens, counts.cached_input_tokens, produced)
