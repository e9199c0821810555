"""Files that must survive a crash: synced writes, renames without overwriting, exchanges."""

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2: Callable[..., int] | None = getattr(_libc, "renameat2", None)


class SyncFailed(OSError):
    """The kernel could not write to the disk; a second try may lie, so the process has to end."""


def sync_file(path: Path) -> None:
    """Have a file's content on the disk. Raises SyncFailed."""
    _sync(path)


def sync_folders(*folders: Path) -> None:
    """Have the folders' entries on the disk. Raises SyncFailed."""
    for folder in folders:
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SyncFailed(error.errno, f"fsync of {path} failed: {error.strerror}") from error
    finally:
        os.close(descriptor)


def move_new(source: Path, target: Path) -> None:
    """Rename. Raises FileExistsError rather than overwrite."""
    try:
        _rename(source, target, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.link(source, target)  # refuses to overwrite too, in two steps
        source.unlink()


def exchange(one: Path, other: Path) -> None:
    """Swap two folders in one instant. Raises OSError where the file system cannot."""
    _rename(one, other, RENAME_EXCHANGE)


def can_exchange(folder: Path) -> bool:
    """Whether the file system of ``folder`` can swap folders."""
    one, other = folder / ".exchange-a", folder / ".exchange-b"
    one.mkdir(exist_ok=True)
    other.mkdir(exist_ok=True)
    try:
        exchange(one, other)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    finally:
        one.rmdir()
        other.rmdir()
    return True


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename(source: Path, target: Path, flags: int) -> None:
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, "the C library has no renameat2")
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    if _renameat2(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))
