"""Answers to requests with an ``Idempotency-Key``, kept for ten minutes, for all gateways.

A service of its own beside the ledger, because what it keeps is tenants' text: it lives in a file
that only its user can read, is deleted after ten minutes, and is never published. What was billed
must be replayable, so what is full refuses new keys and forgets nothing early.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    select,
    update,
)
from sqlalchemy.pool import StaticPool

from market.config import Config
from market.errors import Conflict, MarketError, Overloaded
from market.ports import Clock
from market.storage import Moment

KEPT = timedelta(minutes=10)
# A request still running after so long has lost its gateway in a way that nobody noticed.
RUNNING_MAX = timedelta(hours=1)
TIDY_S = 30.0
ANSWER_MAX_BYTES = 4 * 2**20
TENANT_MAX_BYTES = 64 * 2**20
TOTAL_MAX_BYTES = 2**30
TENANT_MAX_KEYS = 20_000

metadata = MetaData()
answers = Table(
    "answers",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("body_digest", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", String, nullable=False),
    Column("began_at", Moment, nullable=False),
    Column("ended_at", Moment),
    Column("headers", Text),
    Column("content", LargeBinary),
    Column("size", Integer, nullable=False, default=0),
    Index("answers_by_time", "ended_at"),
)

Result = TypeVar("Result")


class DifferentBody(MarketError):
    """The key was used for another request."""

    http_status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer as it was given: headers as JSON, body compressed."""

    headers: str
    content: bytes


class Answers:
    """Start it with ``open``; every other public coroutine is one command."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._path = config.state_dir / "answers-1.db"
        self._clock = clock
        self._lock = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the file; what is in it survives the death of this process."""
        self._engine = await asyncio.to_thread(self._connect)
        self._tidying = asyncio.create_task(self._tidy_forever())

    async def close(self) -> None:
        """Let go of the file."""
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
        self._engine.dispose()

    async def begin(
        self, tenant_id: str, key: str, body_digest: str, owner: tuple[str, int], attempt: str
    ) -> StoredAnswer | None:
        """The answer that the key already has, or None: it is the caller's to give now.

        ``attempt`` names this call, which may be done twice. Raises Conflict while another request
        with the key is running, DifferentBody if the key was used for another body, Overloaded if
        no more can be kept.
        """
        wanted = (body_digest, attempt)
        return await self._run(lambda c: self._begin(c, tenant_id, key, wanted, owner))

    async def finish(
        self, tenant_id: str, key: str, owner: tuple[str, int], answer: StoredAnswer
    ) -> None:
        """Keep an answer; one that is too large is not, and its key cannot be used again."""
        fits = len(answer.content) <= ANSWER_MAX_BYTES
        values = {
            "ended_at": self._clock.now(),
            "headers": answer.headers,
            "content": answer.content if fits else None,
            "size": len(answer.content) if fits else 0,
        }
        own = _own(tenant_id, key, owner)
        await self._run(lambda c: c.execute(update(answers).where(*own).values(**values)))

    async def drop(self, tenant_id: str, key: str, owner: tuple[str, int]) -> None:
        """The request failed, nothing was billed: the key may be used again."""
        own = (*_own(tenant_id, key, owner), answers.c.ended_at.is_(None))
        await self._run(lambda c: c.execute(delete(answers).where(*own)))

    async def release(self, producer: str, epoch: int) -> None:
        """A gateway began anew: what its predecessors were answering will not be answered."""
        gone = (
            answers.c.owner == producer,
            answers.c.epoch < epoch,
            answers.c.ended_at.is_(None),
        )
        await self._run(lambda c: c.execute(delete(answers).where(*gone)))

    # -- how it works ------------------------------------------------------------------------

    def _begin(
        self,
        connection: Connection,
        tenant_id: str,
        key: str,
        wanted: tuple[str, str],
        owner: tuple[str, int],
    ) -> StoredAnswer | None:
        now, (body_digest, attempt) = self._clock.now(), wanted
        self._forget(connection, now)
        query = select(answers).where(answers.c.tenant_id == tenant_id, answers.c.key == key)
        row = connection.execute(query).one_or_none()
        if row is None:
            self._require_room(connection, tenant_id)
            values = {
                "tenant_id": tenant_id,
                "key": key,
                "body_digest": body_digest,
                "owner": owner[0],
                "epoch": owner[1],
                "attempt": attempt,
                "began_at": now,
            }
            connection.execute(answers.insert().values(**values))
            return None
        if row.body_digest != body_digest:
            raise DifferentBody("this Idempotency-Key was used for another request")
        if row.ended_at is None and row.attempt == attempt:
            return None
        if row.ended_at is None:
            raise Conflict(
                "a request with this Idempotency-Key is still running",
                code="idempotency_key_in_use",
                retry_after_s=1,
            )
        if row.content is None:
            raise Conflict(
                "this request was answered, but the answer was too large to be kept",
                code="idempotency_answer_too_large",
            )
        return StoredAnswer(row.headers, row.content)

    def _require_room(self, connection: Connection, tenant_id: str) -> None:
        sums = select(func.count(), func.coalesce(func.sum(answers.c.size), 0))
        keys, own = connection.execute(sums.where(answers.c.tenant_id == tenant_id)).one()
        _, total = connection.execute(sums).one()
        if keys >= TENANT_MAX_KEYS or own >= TENANT_MAX_BYTES or total >= TOTAL_MAX_BYTES:
            raise Overloaded(
                "too many answers are kept for their Idempotency-Key; they are for ten minutes",
                code="idempotency_store_full",
                retry_after_s=60,
            )

    def _forget(self, connection: Connection, now: datetime) -> None:
        connection.execute(delete(answers).where(answers.c.ended_at < now - KEPT))
        lost = (answers.c.ended_at.is_(None), answers.c.began_at < now - RUNNING_MAX)
        connection.execute(delete(answers).where(*lost))

    def _connect(self) -> Engine:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        engine = create_engine(
            f"sqlite:///{self._path}",
            poolclass=StaticPool,
            connect_args={"check_same_thread": False},
        )
        event.listen(engine, "connect", _configure)
        metadata.create_all(engine)
        return engine

    async def _run(self, command: Callable[[Connection], Result]) -> Result:
        def run() -> Result:
            with self._engine.begin() as connection:
                return command(connection)

        async with self._lock:
            return await asyncio.to_thread(run)

    async def _tidy_forever(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            with contextlib.suppress(Exception):
                await self._run(lambda c: self._forget(c, self._clock.now()))


def _own(tenant_id: str, key: str, owner: tuple[str, int]) -> tuple[ColumnElement[bool], ...]:
    return (
        answers.c.tenant_id == tenant_id,
        answers.c.key == key,
        answers.c.owner == owner[0],
        answers.c.epoch == owner[1],
    )


def _configure(connection: object, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")  # type: ignore[attr-defined]
