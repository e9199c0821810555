"""The log over sealed parts: an RFC 6962 Merkle tree with signed checkpoints.

Leaves are manifest entries (canonical JSON). A checkpoint is a C2SP signed note: origin, tree size,
root, Ed25519 signature. Whoever keeps one can later prove that the log was rewritten, if it was.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from market.errors import MarketFault
from market.keys import write_secret

ORIGIN = "compute-market/ledger"
ED25519 = b"\x01"


def leaf_bytes(entry: dict[str, Any]) -> bytes:
    """A manifest entry as the bytes that are hashed."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def leaf_hash(leaf: bytes) -> bytes:
    """RFC 6962: SHA-256(0x00 leaf)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """Roots of the complete subtrees of a growing log: appending costs O(1), a root O(log n)."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Add the next leaf's hash."""
        size, node = self.size, leaf
        while size & 1:
            node = _node(self._peaks.pop(), node)
            size >>= 1
        self._peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        """RFC 6962 tree head of all leaves so far; SHA-256 of nothing for an empty log."""
        if not self._peaks:
            return hashlib.sha256(b"").digest()
        root = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            root = _node(peak, root)
        return root


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Tree head of these leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """RFC 6962 audit path of leaf ``index``, lowest level first."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*inclusion_path(leaves[:split], index), root_of(leaves[split:])]
    return [*inclusion_path(leaves[split:], index - split), root_of(leaves[:split])]


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that ``path`` leads to (RFC 9162, 2.1.3.2). Raises ValueError if it is none."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} of {size}")
    node, position, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            raise ValueError("path too long")
        if position & 1 or position == last:
            node = _node(sibling, node)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            node = _node(node, sibling)
        position, last = position >> 1, last >> 1
    if last:
        raise ValueError("path too short")
    return node


class Signer:
    """The ledger's Ed25519 key, made on first use and readable by its owner only."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def load(cls, path: Path) -> "Signer":
        """The key in ``path`` (32 raw bytes as hex); a new one if there is none."""
        if not path.exists():
            fresh = Ed25519PrivateKey.generate().private_bytes_raw().hex()
            write_secret(path, fresh)
        try:
            return cls(
                Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
            )
        except ValueError as error:
            raise MarketFault(f"{path} is no ledger key: {error}") from error

    @property
    def public(self) -> Ed25519PublicKey:
        """What checks the signatures."""
        return self._private.public_key()

    def verifier(self) -> str:
        """The public key as C2SP writes it: name+id+base64."""
        key = _public_bytes(self.public)
        return f"{ORIGIN}+{_key_id(key).hex()}+{base64.b64encode(ED25519 + key).decode()}"

    def checkpoint(self, size: int, root: bytes) -> str:
        """A signed note that the log's first ``size`` leaves have this root."""
        text = f"{ORIGIN}\n{size}\n{base64.b64encode(root).decode()}\n"
        signature = _key_id(_public_bytes(self.public)) + self._private.sign(text.encode())
        return f"{text}\n— {ORIGIN} {base64.b64encode(signature).decode()}\n"


def read_checkpoint(note: str, public: Ed25519PublicKey) -> tuple[int, bytes]:
    """(size, root) of a checkpoint. Raises ValueError unless it is signed with this key."""
    text, separator, signatures = note.partition("\n\n")
    if not separator or not signatures.startswith(f"— {ORIGIN} "):
        raise ValueError("not a signed note of this ledger")
    signature = base64.b64decode(signatures.split()[-1])
    if signature[:4] != _key_id(_public_bytes(public)):
        raise ValueError("signed with another key")
    try:
        public.verify(signature[4:], (text + "\n").encode())
    except InvalidSignature:
        raise ValueError("the signature does not match") from None
    origin, size, root = text.split("\n")[:3]
    if origin != ORIGIN:
        raise ValueError(f"a checkpoint of {origin}")
    return int(size), base64.b64decode(root)


def _public_bytes(public: Ed25519PublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _key_id(public: bytes) -> bytes:
    return hashlib.sha256(f"{ORIGIN}\n".encode() + ED25519 + public).digest()[:4]
