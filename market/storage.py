"""SQL for a single writer: one connection, one transaction per group of commands, exact money."""

import contextlib
import copy
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    MetaData,
    Numeric,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool
from sqlalchemy.types import TypeDecorator, TypeEngine

from market.errors import MarketFault

LOCK_POLL_S = 0.05

Command = Callable[[Connection], Any]


def connect(url: str, metadata: MetaData) -> Engine:
    """An engine with exactly one connection and the tables in place.

    Raises MarketFault if the database cannot be opened, e.g. because another process has it.
    SQLite runs in WAL mode with full sync and an exclusive lock: versions before 3.51.3 corrupt
    the file when two connections checkpoint at once, and money must survive a power cut.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            parsed, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 10}
        )
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    else:
        engine = create_engine(parsed, pool_size=1, max_overflow=0)
    try:
        metadata.create_all(engine)
    except OperationalError as error:
        engine.dispose()
        raise MarketFault(f"cannot open {parsed.render_as_string()}: {error.orig}") from None
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy says BEGIN itself, see below
    for pragma in (
        "locking_mode=EXCLUSIVE",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "mmap_size=0",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def run_group(engine: Engine, state: Any, commands: Sequence[Command]) -> list[Any]:
    """Run commands in one transaction; results in order, an exception in place of a refusal.

    A command that raises is undone alone, ``state`` (counters kept in memory) with it: one bad
    request must not take the others down. What SQL itself raises is not caught: after a failed
    write or commit nothing in memory can be trusted, and the process has to end.
    """
    results: list[Any] = []
    with engine.begin() as connection:
        for command in commands:
            before = copy.copy(vars(state))
            savepoint = connection.begin_nested()
            try:
                results.append(command(connection))
                savepoint.commit()
            except SQLAlchemyError:
                raise
            except Exception as error:  # noqa: BLE001  # handed to the one who asked
                savepoint.rollback()
                vars(state).update(before)
                results.append(error)
    return results


@contextlib.contextmanager
def exclusive_lock(path: Path, patience_s: float) -> Iterator[None]:
    """Hold a file lock for the life of the process.

    A killed predecessor may still be on its way out, hence the patience. Raises MarketFault if
    another process keeps it: two ledgers on one database must not be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience_s
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise MarketFault(f"another process holds {path}; is a second market running?")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def upsert(connection: Connection, table: Table, rows: list[dict[str, object]]) -> None:
    """Insert rows or overwrite those with the same primary key."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    overwritten = {c.name: statement.excluded[c.name] for c in table.c if c.name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=overwritten), rows)


class Pico(TypeDecorator[int]):
    """Integer of pico units without a 64-bit limit: NUMERIC on PostgreSQL, text on SQLite."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Column type per database."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Numeric(40, 0))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: int | None, dialect: Dialect) -> Any:
        """To the database."""
        if value is None or dialect.name == "postgresql":
            return value
        return str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        """From the database."""
        return None if value is None else int(value)


class Moment(TypeDecorator[datetime]):
    """A UTC time as integer microseconds since 1970: exact and ordered on every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else to_micros(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """From the database."""
        return None if value is None else from_micros(value)


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970."""
    delta = moment - EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(micros: int) -> datetime:
    """The UTC time so many microseconds after 1970."""
    seconds, rest = divmod(micros, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
