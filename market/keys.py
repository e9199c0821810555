"""API keys: secrets shown once, of which only a hash is kept."""

import hashlib
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
