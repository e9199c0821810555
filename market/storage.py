"""SQL for a single writer: one connection, one transaction per group of commands, exact money."""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil
from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Numeric,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import DataError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool
from sqlalchemy.types import TypeDecorator, TypeEngine

from market import crash
from market.errors import InvalidRequest, MarketFault

LOCK_POLL_S = 0.05
POSTGRESQL_DISK_FULL = "53100"
MIGRATIONS = Path(__file__).parent / "migrations"
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "beegfs"}
    | {"sshfs", "s3fs", "gcsfuse", "blobfuse", "blobfuse2", "goofys", "rclone", "davfs"}
)

Command = Callable[[Connection], Any]


def connect(url: str, migrations: str) -> Engine:
    """An engine with exactly one connection and the tables as ``migrations`` makes them.

    ``migrations`` is the name of a folder of market/migrations. Raises MarketFault if the database
    cannot be opened, e.g. because another process has it, or if its tables are newer than this
    program. SQLite runs in WAL mode with full sync and an exclusive lock: versions before 3.51.3
    corrupt the file when two connections checkpoint at once, and money must survive a power cut.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            folder = Path(parsed.database).parent
            folder.mkdir(parents=True, exist_ok=True)
            refuse_network_file_system(folder)
        engine = create_engine(
            parsed, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 10}
        )
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    else:
        engine = create_engine(parsed, pool_size=1, max_overflow=0)
    try:
        migrate(engine, migrations)
    except OperationalError as error:
        engine.dispose()
        raise MarketFault(f"cannot open {parsed.render_as_string()}: {error.orig}") from None
    except MarketFault:
        engine.dispose()
        raise
    return engine


def migrate(engine: Engine, migrations: str) -> None:
    """Bring the tables to the newest revision of ``market/migrations/<migrations>``."""
    from alembic import command
    from alembic.config import Config
    from alembic.script.revision import ResolutionError
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS / migrations))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        config.attributes["version_table"] = f"{migrations}_version"
        try:
            command.upgrade(config, "head")
        except (CommandError, ResolutionError) as error:
            raise MarketFault(
                f"cannot migrate the {migrations} tables: {error}; did a newer version make them?"
            ) from error


def refuse_network_file_system(folder: Path) -> None:
    """Raises MarketFault if ``folder`` is on NFS or the like: locks and WAL do not hold there."""
    mounts = psutil.disk_partitions(all=True)
    resolved = folder.resolve()
    holding = [m for m in mounts if resolved.is_relative_to(m.mountpoint)]
    mount = max(holding, key=lambda m: len(m.mountpoint), default=None)
    if mount is not None and mount.fstype.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS:
        raise MarketFault(
            f"{folder} is on {mount.fstype}, where the ledger's locks and syncs do not hold; set "
            "MARKET_HOME to a local disk, or MARKET_DATABASE_URL to a PostgreSQL server"
        )


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


class Unit(Protocol):
    """State in memory that goes with a transaction."""

    def begin(self, connection: Connection) -> None:
        """Before the first command."""
        ...

    def end(self, connection: Connection) -> None:
        """After the last command, before the commit."""
        ...

    def forget(self) -> None:
        """The transaction failed: what memory says may be wrong."""
        ...


class Stateless:
    """A Unit with nothing in memory."""

    def begin(self, connection: Connection) -> None:
        """Nothing to do."""

    def end(self, connection: Connection) -> None:
        """Nothing to do."""

    def forget(self) -> None:
        """Nothing to do."""


class StorageFull(Exception):
    """The disk has no room; the transaction was undone as a whole."""


def run_group(engine: Engine, unit: Unit, commands: Sequence[Command]) -> list[Any]:
    """Run commands in one transaction; results in order, an exception in place of a refusal.

    A command that raises is undone alone: one bad request must not take the others down. So is one
    with a value that no column takes (too large, a NUL), as InvalidRequest. What else SQL raises is
    not caught: after a failed write or commit the process has to end. The one exception is a full
    disk, noticed before the commit: StorageFull, nothing is done.
    """
    results: list[Any] = []
    try:
        with engine.begin() as connection:
            unit.begin(connection)
            for command in commands:
                connection.exec_driver_sql("SAVEPOINT command")
                try:
                    results.append(command(connection))
                except Exception as error:  # handed to the one who asked
                    if isinstance(error, SQLAlchemyError) and not isinstance(error, DataError):
                        raise
                    connection.exec_driver_sql("ROLLBACK TO SAVEPOINT command")
                    results.append(_refusal(error))
                connection.exec_driver_sql("RELEASE SAVEPOINT command")
            unit.end(connection)
            crash.reach("before-commit")
        crash.reach("committed")
    except BaseException as error:
        unit.forget()
        if _is_full(error):
            raise StorageFull(str(error)) from error
        raise
    return results


def _refusal(error: Exception) -> Exception:
    # SQLite's driver has a word of its own for an integer beyond 64 bits.
    if isinstance(error, DataError | OverflowError):
        return InvalidRequest(f"the database cannot keep this: {getattr(error, 'orig', error)}")
    return error


def _is_full(error: BaseException) -> bool:
    cause = getattr(error, "orig", None)
    return (
        getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        or getattr(cause, "sqlstate", None) == POSTGRESQL_DISK_FULL
    )


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


def upsert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows or overwrite those with the same primary key."""
    connection.execute(_upsert_into(table, connection.dialect.name), rows)


@cache
def _upsert_into(table: Table, dialect: str) -> Any:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    overwritten = {c.name: statement.excluded[c.name] for c in table.c if c.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=overwritten)


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
