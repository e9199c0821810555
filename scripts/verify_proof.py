#!/usr/bin/env python3
"""Check a proof of ``market ledger prove`` without the market's code.

    market ledger prove req-gw0-1000000001 > proof.json
    python scripts/verify_proof.py proof.json [--public-key KEY] [--checkpoint FILE]

It shows that the row was in the ledger when the checkpoint was signed. Give the public key and a
checkpoint that you kept (every statement has one): then nobody can have made up either. A kept
checkpoint of another size than the proof's needs a proof made for it; the sizes are compared.
Needs Python 3.9 and ``cryptography`` (for the Ed25519 signature).
"""

import argparse
import base64
import hashlib
import json
import struct
import sys

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

# The columns of the usage ledger in order, and how each is hashed.
COLUMNS = """
    lsn:int64 booked_at:int64 producer:text epoch:int32 seq:int64 kind:text reverses_lsn:int64
    request_id:text tenant_id:text api_key_id:text model:text adapter:text lane:text
    deployment_id:text lease_id:text slice_id:text provider_id:text node_id:text gpu_type:text
    gpu_milli:int32 started_at:int64 finished_at:int64 input_tokens:int64
    cached_input_tokens:int64 output_tokens:int64 claimed_output_tokens:int64 gpu_us:int64
    queue_ms:int32 ttft_ms:int32 duration_ms:int32 finish_reason:text usage_quality:text
    price_id:text charge:int128 currency:text attrs:text
"""
WIDTHS = {"int64": 8, "int32": 4, "int128": 16}


def sha256(*parts):
    """Digest of the parts one after the other."""
    return hashlib.sha256(b"".join(parts)).digest()


def number(kind, value):
    """A number of the row as it was hashed; nothing that only looks like it."""
    if value is None:
        return 0
    if kind == "int128" and isinstance(value, str) and str(int(value)) == value:
        return int(value)
    if kind != "int128" and type(value) is int:
        return value
    raise ValueError(f"{value!r} is no number of kind {kind}")


def encode(row):
    """The row's bytes: numbers, then which are null, then lengths of texts, then the texts."""
    numbers = [(kind, value) for _, kind, value in row if kind != "text"]
    texts = [None if value is None else value.encode() for _, kind, value in row if kind == "text"]
    return b"".join(
        [number(k, v).to_bytes(WIDTHS[k], "little", signed=True) for k, v in numbers]
        + [bytes([value is None]) for _, value in numbers]
        + [struct.pack("<I", 2**32 - 1 if text is None else len(text)) for text in texts]
        + [text for text in texts if text is not None]
    )


def climb_rows(leaf, index, path):
    """Top of the tree over a part's rows: up to 16 children per node."""
    node = leaf
    for family in path:
        place = index % 16
        if family[place] != "":
            raise ValueError("row path: the row's own place is taken")
        node = sha256(b"\x01", *(node if d == "" else bytes.fromhex(d) for d in family))
        index //= 16
    return node


def climb_log(leaf, index, size, path):
    """Top of the log over parts (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        raise ValueError("leaf index outside the log")
    node, last = leaf, size - 1
    for sibling in path:
        sibling = bytes.fromhex(sibling)
        if last == 0:
            raise ValueError("leaf path is too long")
        if index & 1 or index == last:
            node = sha256(b"\x01", sibling, node)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = sha256(b"\x01", node, sibling)
        index, last = index >> 1, last >> 1
    if last:
        raise ValueError("leaf path is too short")
    return node


def read_checkpoint(note, public_key):
    """(size, root) of a signed note (C2SP); raises ValueError if the signature is wrong."""
    text, _, signatures = note.partition("\n\n")
    name, key_id, key = public_key.split("+", 2)
    raw = base64.b64decode(key)[1:]
    signature = base64.b64decode(signatures.split()[-1])
    if signature[:4].hex() != key_id:
        raise ValueError("checkpoint: signed with another key")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature[4:], (text + "\n").encode())
    except InvalidSignature:
        raise ValueError("checkpoint: the signature does not match") from None
    origin, size, root = text.split("\n")
    if origin != name:
        raise ValueError("checkpoint: of another log")
    return int(size), base64.b64decode(root)


def check(proof, public_key=None, kept=None):
    """Raises ValueError unless every step from the row to the signature holds."""
    key = public_key or proof["public_key"]
    row, part = proof["row"], proof["part"]
    lsn = {name: value for name, _, value in row}["lsn"]
    if lsn != part["lo"] + proof["row_index"] or not 0 <= proof["row_index"] < part["rows"]:
        raise ValueError("the row is not where the proof says")
    if [f"{name}:{kind}" for name, kind, _ in row] != COLUMNS.split():
        raise ValueError("the row has other columns than the usage ledger")
    leaf = sha256(b"\x00", encode(row))
    if climb_rows(leaf, proof["row_index"], proof["row_path"]).hex() != part["rows_root"]:
        raise ValueError("the row is not in its part")
    entry = json.dumps(part, sort_keys=True, separators=(",", ":")).encode()
    size, root = read_checkpoint(proof["checkpoint"], key)
    if climb_log(sha256(b"\x00", entry), proof["leaf_index"], size, proof["leaf_path"]) != root:
        raise ValueError("the part is not in the log that was signed")
    if kept is not None and read_checkpoint(kept, key) != (size, root):
        raise ValueError("your checkpoint is another than the proof's (size or root differ)")
    return lsn, size


def main():
    """Check the proof named on the command line; exit code 1 if it does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("proof", help="file made by: market ledger prove REQUEST_ID")
    parser.add_argument("--public-key", help="the ledger's key as you know it (proof/ledger.pub)")
    parser.add_argument("--checkpoint", help="file with a checkpoint that you kept")
    options = parser.parse_args()
    with open(options.proof) as file:
        proof = json.load(file)
    kept = None
    if options.checkpoint:
        with open(options.checkpoint) as file:
            kept = file.read()
    try:
        lsn, size = check(proof, options.public_key, kept)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        print(f"NOT PROVEN: {error}")
        return 1
    known = "the key you gave" if options.public_key else "the key in the proof (not checked)"
    print(f"PROVEN: row {lsn} is in the ledger of {size} parts, signed with {known}:")
    for name, _, value in proof["row"]:
        if value is not None:
            print(f"  {name:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
