"""Named points at which a test may kill the process, as a crash would.

``MARKET_CRASH=point:n`` kills at the n-th time ``point`` is reached. Without it nothing happens.
"""

import os
import signal

_point = ""
_left = 0


def arm(plan: str) -> None:
    """Kill this process at ``point:n``; an empty plan never kills."""
    global _point, _left
    _point, _, count = plan.partition(":")
    _left = int(count or 1)


def reach(point: str) -> None:
    """A step lies behind us."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("MARKET_CRASH", ""))
