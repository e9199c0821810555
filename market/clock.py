"""The machine's clocks behind the Clock port."""

import time
from datetime import UTC, datetime


class SystemClock:
    """Wall clock in UTC and the monotonic clock."""

    def now(self) -> datetime:
        """Current UTC time."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds of a clock that never steps."""
        return time.monotonic()
