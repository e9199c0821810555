"""Digests of ledger rows: what proves that a row is in the ledger as it was booked.

A row is encoded from its values alone, so its digest survives compaction and any rewriting of
files. Layout, little-endian, columns in schema order: each number, time (microseconds) or amount
(16 bytes, pico units), zero if null; then for each of those columns one byte, 1 if null; then for
each text column its length in bytes as uint32, 2^32-1 if null; then the texts. A map is the text
of its pairs as JSON. Rows are the leaves of a tree with up to 16 children per node:
leaf = SHA-256(0x00 row), node = SHA-256(0x01 children); ``rows_root`` is its top.
scripts/verify_proof.py has the same encoding for a single row.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ARITY = 16
HASH_BYTES = 32
NULL_LENGTH = 2**32 - 1

Bytes = npt.NDArray[np.uint8]


def leaf_hashes(rows: pa.RecordBatch) -> bytes:
    """The digests of the rows, 32 bytes each, one after the other."""
    if rows.num_rows == 0:
        return b""
    encoded = _encode(rows)
    offsets = np.frombuffer(encoded.buffers()[1], np.int64)[: rows.num_rows + 1].tolist()
    content = memoryview(encoded.buffers()[2])
    sha256 = hashlib.sha256
    return b"".join([sha256(content[start:end]).digest() for start, end in pairwise(offsets)])


def rows_root(leaves: bytes) -> bytes:
    """Top of the tree over ``leaves``; SHA-256 of nothing if there are none."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = leaves
    while len(level) > HASH_BYTES:
        level = _parents(level)
    return level


def row_path(leaves: bytes, index: int) -> list[list[str]]:
    """For each level the digests of the node's family, its own place empty, as hex."""
    path = []
    level = leaves
    while len(level) > HASH_BYTES:
        first = index - index % ARITY
        family = level[first * HASH_BYTES : (first + ARITY) * HASH_BYTES]
        digests = [family[n : n + HASH_BYTES].hex() for n in range(0, len(family), HASH_BYTES)]
        digests[index - first] = ""
        path.append(digests)
        level = _parents(level)
        index //= ARITY
    return path


def _parents(level: bytes) -> bytes:
    step = ARITY * HASH_BYTES
    sha256 = hashlib.sha256
    return b"".join(
        [sha256(b"\x01" + level[n : n + step]).digest() for n in range(0, len(level), step)]
    )


def _encode(rows: pa.RecordBatch) -> pa.Array:
    """Each row as bytes, with the leaf's 0x00 in front, as a large_binary array."""
    count = rows.num_rows
    fixed: list[Bytes] = [np.zeros((count, 1), np.uint8)]
    nulls: list[Bytes] = []
    lengths: list[Bytes] = []
    texts: list[pa.Array] = []
    for column in rows.columns:
        if pa.types.is_map(column.type):
            column = _map_texts(column)
        if pa.types.is_string(column.type):
            texts.append(column.cast(pa.large_binary()))
            lengths.append(_lengths(column, count))
        else:
            fixed.append(_fixed(column, count))
            nulls.append(_nulls(column, count))
    head = np.ascontiguousarray(np.concatenate([*fixed, *nulls, *lengths], axis=1))
    width = head.shape[1]
    heads = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), count, [None, pa.py_buffer(head)]
    ).cast(pa.large_binary())
    empty = pa.scalar(b"", pa.large_binary())
    return pc.binary_join_element_wise(
        heads, *texts, empty, null_handling="replace", null_replacement=""
    )


def _fixed(column: pa.Array, count: int) -> Bytes:
    """The column's little-endian bytes, (count, width)."""
    if column.null_count:
        zero = pa.scalar(0, pa.int64()).cast(column.type)
        column = pc.fill_null(column, zero)
    width = column.type.bit_width // 8
    data = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * width
    fixed: Bytes = data[start : start + count * width].reshape(count, width)
    return fixed


def _nulls(column: pa.Array, count: int) -> Bytes:
    if not column.null_count:
        return np.zeros((count, 1), np.uint8)
    nulls: npt.NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return nulls.astype(np.uint8).reshape(count, 1)


def _lengths(column: pa.Array, count: int) -> Bytes:
    lengths = pc.fill_null(pc.binary_length(column).cast(pa.int64()), NULL_LENGTH)
    words: Bytes = lengths.to_numpy().astype("<u4").view(np.uint8).reshape(count, 4)
    return words


def _map_texts(column: pa.Array) -> pa.Array:
    if column.null_count == len(column):
        return pa.nulls(len(column), pa.string())
    return pa.array([map_text(pairs) for pairs in column.to_pylist()], pa.string())


def map_text(pairs: Sequence[tuple[str, str]] | None) -> str | None:
    """A map's canonical text."""
    if pairs is None:
        return None
    return json.dumps([list(pair) for pair in pairs], ensure_ascii=True, separators=(",", ":"))
