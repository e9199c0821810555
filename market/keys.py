"""API keys: secrets shown once, of which only a hash is kept."""

import hashlib
import os
import secrets

KEY_PREFIX = "sk-market-"


def new_key() -> str:
    """A fresh secret of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key. It has 256 bits of entropy, so a plain hash cannot be guessed."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(key: str) -> str:
    """Public name of a key."""
    return f"key-{hash_key(key)[:12]}"


def write_secret(path: os.PathLike[str], text: str) -> None:
    """Write a file that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text + "\n")
