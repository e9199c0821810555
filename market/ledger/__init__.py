"""The ledger: what was used, what it cost, and the proof of it.

``market.ledger.read(...)`` reads it; the rest is the service that keeps it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "read":  # pyarrow and its friends load only for those who read
        from market.ledger.reader import read

        return read
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
