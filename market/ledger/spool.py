"""A producer's spool: records on local disk before the ledger has them.

One file per epoch and stretch of records, ``<producer>.<epoch>.<first seq>.spool``: records one
after the other as [length u32][crc32 u32][msgpack]. A record is in the file before anybody is told
that it was recorded, so it survives the death of its process; whoever starts next on this machine
sends it under its old identity. Whether its process lives is said by the epoch's table of requests
under way alone (inflight.py): two signs could contradict each other. Files are deleted when all of
their records are booked.
"""

import os
import struct
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from market.errors import InvalidRequest
from market.ledger.inflight import table_path
from market.types import UsageRecord

SEGMENT_BYTES = 8 * 2**20
_HEADER = struct.Struct("<II")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(UsageRecord).decode


class Spool:
    """Appends the records of one producer and epoch; not safe for concurrent use."""

    def __init__(self, folder: Path, producer: str, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._producer = producer
        self._epoch = epoch
        self.next_seq = 0
        self._segments: list[tuple[int, Path, int]] = []
        self._size = 0

    def append(self, record: UsageRecord) -> int:
        """Write a record; returns its sequence number. Raises OSError and leaves no trace."""
        try:
            payload = _encode(record)
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"record does not fit the ledger: {error}") from error
        if not self._segments or self._size >= SEGMENT_BYTES:
            self._open_segment()
        descriptor = self._segments[-1][2]
        content = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            _write_all(descriptor, content)
        except OSError:
            os.ftruncate(descriptor, self._size)  # a short write must not hide what comes next
            raise
        self._size += len(content)
        self.next_seq += 1
        return self.next_seq - 1

    def descriptors(self) -> list[int]:
        """Duplicates of the open files, to be synced and closed by another thread."""
        return [os.dup(descriptor) for _, _, descriptor in self._segments]

    def trim(self, booked: int) -> None:
        """Delete segments whose records all have numbers below ``booked``."""
        while len(self._segments) > 1 and self._segments[1][0] <= booked:
            self._drop_first()
        if self._segments and booked >= self.next_seq:
            self._drop_first()
            self._size = 0

    def close(self) -> None:
        """Let go of the files; what is not booked stays for the next process."""
        for _, _, descriptor in self._segments:
            os.close(descriptor)
        self._segments.clear()

    def _open_segment(self) -> None:
        name = f"{self._producer}.{self._epoch}.{self.next_seq}.spool"
        path = self._folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        descriptor = os.open(path, flags, 0o600)
        self._segments.append((self.next_seq, path, descriptor))
        self._size = 0

    def _drop_first(self) -> None:
        _, path, descriptor = self._segments.pop(0)
        path.unlink(missing_ok=True)
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Orphan:
    """Records that a dead process left: ``first_seq`` on, of one producer and epoch."""

    producer: str
    epoch: int
    first_seq: int
    records: tuple[UsageRecord, ...]
    path: Path


def orphans(folder: Path, dead: Container[tuple[str, int]]) -> Iterator[Orphan]:
    """Segments of dead processes, in order: ``dead`` are the (producer, epoch) of free tables.

    A segment without a table is one whose sweep was killed. A torn end was never acknowledged to
    anybody and is left out.
    """
    for path in sorted(folder.glob("*.spool"), key=_order):
        producer, epoch, first_seq = _order(path)
        if (producer, epoch) not in dead and table_path(folder, producer, epoch).exists():
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # its process has just ended in good order
        yield Orphan(producer, epoch, first_seq, tuple(_read(content)), path)


def _order(path: Path) -> tuple[str, int, int]:
    producer, epoch, first_seq, _ = path.name.rsplit(".", 3)
    return producer, int(epoch), int(first_seq)


def _read(content: bytes) -> Iterator[UsageRecord]:
    offset = 0
    while offset + _HEADER.size <= len(content):
        length, crc = _HEADER.unpack_from(content, offset)
        payload = content[offset + _HEADER.size : offset + _HEADER.size + length]
        if len(payload) < length or zlib.crc32(payload) != crc:
            return
        yield _decode(payload)
        offset += _HEADER.size + length


def _write_all(descriptor: int, content: bytes) -> None:
    written = os.write(descriptor, content)
    while written < len(content):  # short only when the disk is nearly full
        written += os.write(descriptor, content[written:])
