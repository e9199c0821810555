"""Requests under way, where they survive the death of their process.

A file of slots mapped into memory, one per request: what is written there costs no system call, and
the kernel keeps it when the process is killed. Whoever sweeps afterwards gives each request that
was not finished its record: charge 0, ``recovered``. The file is locked by its owner from before
its first record to after its last one; unlocked it is an orphan, and so is the epoch's spool.

Layout: [magic 8][next sequence number u64], then slots of [length u32][crc32 u32][msgpack record].
"""

import fcntl
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from market.errors import MarketFault
from market.types import UsageRecord

MAGIC = b"inflight"
SLOT_BYTES = 1024
GROW_SLOTS = 1024
_HEAD = struct.Struct("<8sQ")
_SLOT = struct.Struct("<II")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(UsageRecord).decode
SUFFIX = ".inflight"


def table_path(folder: Path, producer: str, epoch: int) -> Path:
    """Where an epoch's table lies while the epoch is not over."""
    return folder / f"{producer}.{epoch}{SUFFIX}"


class InflightTable:
    """The slots of one producer and epoch; not safe for concurrent use."""

    def __init__(self, folder: Path, producer: str, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = table_path(folder, producer, epoch)
        fresh = self.path.with_suffix(".new")
        # Locked before it has its name: unlocked, another process would take it for an orphan.
        self._file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._free: list[int] = []
        self._slots: dict[str, int] = {}
        self._size = 0
        self._map: mmap.mmap | None = None
        self._grow()
        self.set_next_seq(0)
        fresh.rename(self.path)

    @property
    def used(self) -> bool:
        """Whether a request is under way."""
        return bool(self._slots)

    def add(self, record: UsageRecord) -> None:
        """Remember a request by what its record will be if it is never finished.

        Raises OSError if the disk is full, MarketFault if the record does not fit.
        """
        payload = _encode(record)
        if len(payload) > SLOT_BYTES - _SLOT.size:
            raise MarketFault(f"{record.request_id} does not fit a slot: {len(payload)} bytes")
        if not self._free:
            self._grow()
        assert self._map is not None
        assert record.request_id is not None
        slot = self._free.pop()
        at = _offset(slot)
        self._map[at + _SLOT.size : at + _SLOT.size + len(payload)] = payload
        # Last: a slot that is half written has no length.
        self._map[at : at + _SLOT.size] = _SLOT.pack(len(payload), zlib.crc32(payload))
        self._slots[record.request_id] = slot

    def remove(self, request_id: str | None) -> None:
        """The request has its record; an unknown one is none of ours."""
        slot = self._slots.pop(request_id or "", None)
        if slot is not None:
            assert self._map is not None
            at = _offset(slot)
            self._map[at : at + _SLOT.size] = bytes(_SLOT.size)
            self._free.append(slot)

    def set_next_seq(self, seq: int) -> None:
        """Number of the next record that the spool will take."""
        assert self._map is not None
        self._map[: _HEAD.size] = _HEAD.pack(MAGIC, seq)

    def close(self, keep: bool) -> None:
        """Let go of the file; delete it unless requests are left that somebody must see to.

        Again is harmless.
        """
        if self._map is None:
            return
        if not keep:
            self.path.unlink(missing_ok=True)
        self._map.close()
        self._map = None
        os.close(self._file)

    def _grow(self) -> None:
        slots = self._size + GROW_SLOTS
        # Allocated, not only sized: on a full disk this fails here, not in a later write (SIGBUS).
        os.posix_fallocate(self._file, 0, _offset(slots))
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self._file, _offset(slots))
        self._free += range(slots - 1, self._size - 1, -1)
        self._size = slots


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a dead process left under way; its next record would have had ``next_seq``."""

    producer: str
    epoch: int
    next_seq: int
    records: tuple[UsageRecord, ...]
    path: Path


def unfinished(folder: Path) -> list[Unfinished]:
    """Tables that no living process owns, oldest epoch first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        producer, epoch, _ = path.name.rsplit(".", 2)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process on this machine has seen to it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(descriptor).st_nlink:
                continue  # its owner has just ended in good order
            next_seq, records = _read(path.read_bytes())
            found.append(Unfinished(producer, int(epoch), next_seq, records, path))
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
    return sorted(found, key=lambda table: (table.producer, table.epoch))


def _offset(slot: int) -> int:
    return _HEAD.size + slot * SLOT_BYTES


def _read(content: bytes) -> tuple[int, tuple[UsageRecord, ...]]:
    magic, next_seq = _HEAD.unpack_from(content)
    records = []
    for at in range(_HEAD.size, len(content) if magic == MAGIC else 0, SLOT_BYTES):
        length, crc = _SLOT.unpack_from(content, at)
        payload = content[at + _SLOT.size : at + _SLOT.size + length]
        if 0 < length <= SLOT_BYTES and zlib.crc32(payload) == crc:
            records.append(_decode(payload))
    return next_seq, tuple(records)
