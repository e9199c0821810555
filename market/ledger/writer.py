"""The single writer: commands queue up and share transactions (group commit)."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from market import storage
from market.errors import MarketFault, Overloaded
from market.ledger.files import SyncFailed

logger = logging.getLogger(__name__)

GROUP_MAX = 512
QUEUE_MAX = 10_000
FULL_RETRY_S = 1.0

Waiting = tuple[storage.Command, asyncio.Future[Any]]


class Writer:
    """One thread with one connection, one for files; an error of either disk is fatal."""

    def __init__(self, url: str, unit: storage.Unit, on_fatal: Callable[[], None]) -> None:
        self._url = url
        self._unit = unit
        self._on_fatal = on_fatal
        self._commands: asyncio.Queue[Waiting] = asyncio.Queue(QUEUE_MAX)
        self._sql = ThreadPoolExecutor(1, "ledger-writer")
        self._files = ThreadPoolExecutor(1, "ledger-files")
        self._task: asyncio.Task[None] | None = None
        self._engine: Any = None

    async def open(self, first: Sequence[storage.Command]) -> None:
        """Connect, migrate, run ``first`` in one transaction and start. May be tried again."""
        loop = asyncio.get_running_loop()
        self._engine = await loop.run_in_executor(self._sql, storage.connect, self._url, "ledger")
        try:
            for result in await self.run_group(first):
                if isinstance(result, Exception):
                    raise result
        except BaseException:
            self._engine.dispose()
            self._unit.forget()
            raise
        self._task = loop.create_task(self._write_forever())

    async def close(self) -> None:
        """Let go of the database."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._sql.shutdown()
        self._files.shutdown()
        if self._engine is not None:
            self._engine.dispose()

    async def submit(self, command: storage.Command) -> Any:
        """Run a command in the next transaction.

        Raises Overloaded while the disk is full, MarketFault after the database has failed.
        """
        if self._task is None or self._task.done():
            raise MarketFault("the ledger's writer has ended")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._commands.put((command, future))
        return await future

    async def on_files(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Work on files, one at a time. A failed sync ends the process."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._files, work, *arguments)
        except SyncFailed:
            # What is on the disk is unknown, and a second fsync may claim success.
            logger.exception("the disk failed")
            self._on_fatal()
            raise

    async def run_group(self, commands: Sequence[storage.Command]) -> list[Any]:
        """Results in order, an exception in place of a refusal."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._sql, storage.run_group, self._engine, self._unit, commands
            )
        except storage.StorageFull:
            logger.error("the disk is full: %d commands were refused", len(commands))
            return [_full() for _ in commands]
        except Exception:
            # A write or commit failed: what is on disk is unknown, so recover by starting again.
            logger.exception("the ledger's database failed")
            self._on_fatal()
            raise

    async def _write_forever(self) -> None:
        while True:
            waiting = [await self._commands.get()]
            while len(waiting) < GROUP_MAX and not self._commands.empty():
                waiting.append(self._commands.get_nowait())
            try:
                results = await self.run_group([command for command, _ in waiting])
            except Exception as error:
                while not self._commands.empty():
                    waiting.append(self._commands.get_nowait())
                _answer(waiting, [error] * len(waiting))
                raise
            _answer(waiting, results)


def _answer(waiting: Sequence[Waiting], results: Sequence[Any]) -> None:
    for (_, future), result in zip(waiting, results, strict=True):
        if future.done():
            continue  # whoever asked is gone; the command was done all the same
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _full() -> Overloaded:
    return Overloaded("the ledger's disk is full", code="storage_full", retry_after_s=FULL_RETRY_S)
