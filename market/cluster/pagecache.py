"""Which part of a file is in the host's memory (the page cache), and bringing it there.

Weights that are there load at the speed of memory, not of a disk.
"""

import ctypes
import mmap
import os
from pathlib import Path

PAGE = mmap.PAGESIZE
# Large files are sampled: so many windows of so many pages.
WINDOWS, WINDOW_PAGES = 64, 64
READ_BYTES = 16 * 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in memory, in [0, 1]; of a large one by sampling.

    mincore(2), which no package wraps. Raises OSError.
    """
    size = path.stat().st_size
    pages = -(-size // PAGE)
    if pages == 0:
        return 1.0
    windows = range(0, pages, WINDOW_PAGES)
    if len(windows) > WINDOWS:
        windows = range(0, pages, pages // WINDOWS)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    looked = found = 0
    try:
        for first in windows:
            count = min(WINDOW_PAGES, pages - first)
            seen = ctypes.create_string_buffer(count)
            if _libc.mincore(address + first * PAGE, count * PAGE, seen):
                raise OSError(ctypes.get_errno(), f"cannot look at {path}")
            looked += count
            found += sum(byte & 1 for byte in seen.raw)
    finally:
        _libc.munmap(address, size)
    return found / looked


def read_in(path: Path) -> None:
    """Read a file once, so that it is in memory as far as there is room. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.read(READ_BYTES):
            pass
