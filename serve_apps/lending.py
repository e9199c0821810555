"""Whose turn it is on a lease's replica: its holder's at once, others' while the holder is idle.

The replica is where the requests of all gateways meet, so it decides: an answer that was borrowed a
place ends in the very step in which a request of the holder comes, and the gateway goes on with it
elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from market.errors import Revoked


class Lending:
    """The answers under way on one replica."""

    def __init__(self) -> None:
        self._own = 0
        self._borrowed: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def turn(self, *, borrowed: bool) -> AsyncIterator[None]:
        """Have a place for as long as the block lasts.

        Raises Revoked, also into the block, when the place is needed by the holder.
        """
        if not borrowed:
            self._own += 1
            try:
                self._revoke()
                yield
            finally:
                self._own -= 1
            return
        if self._own:
            raise Revoked("the lease's holder uses it")
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._borrowed.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise Revoked("the lease's holder needs it") from None
        finally:
            self._borrowed.discard(scope)

    def close(self) -> None:
        """Nobody may borrow any more."""
        self._own += 1
        self._revoke()

    def _revoke(self) -> None:
        while self._borrowed:  # one that expires cannot be told twice
            self._borrowed.pop().reschedule(0)  # long past: before anything else is awaited
