"""Named points at which a test may kill the process, as a crash would.

``MARKET_CRASH=point:n`` kills at the n-th time ``point`` is reached. Without it nothing happens.
"""

import os
import signal

_point, _, _count = os.environ.get("MARKET_CRASH", "").partition(":")
_left = int(_count or 1)


def reach(point: str) -> None:
    """A step of publishing, compaction, settlement or recovery lies behind us."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
