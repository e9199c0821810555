"""Times as people write them: durations, moments, months. Pure: what time it is comes in.

Whatever the text, the answer comes at once: a value within bounds, or InvalidRequest.
"""

import re
from datetime import UTC, datetime, timedelta

from market.errors import InvalidRequest

TEXT_MAX = 40
DURATION_MAX_S = 3_660 * 86_400
FIRST_YEAR, LAST_YEAR = 1970, 2999
UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_PART = re.compile(r"([0-9]+)([smhdw])")
_DURATION = re.compile(r"(?:[0-9]+[smhdw])+")
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


def duration(text: str, what: str) -> int:
    """``30d``, ``12h``, ``1d12h``, ``90s`` as seconds. Raises InvalidRequest."""
    if not _is_duration(text):
        raise InvalidRequest(
            f"{what}: {_shown(text)} is no duration such as 30d, 12h or 90m", param=what
        )
    seconds = sum(int(number) * UNITS_S[unit] for number, unit in _PART.findall(text))
    if seconds > DURATION_MAX_S:
        raise InvalidRequest(
            f"{what}: {text} is too long, at most {DURATION_MAX_S // 86_400}d", param=what
        )
    return seconds


def moment(text: str, now: datetime, what: str, *, past: bool = False) -> datetime:
    """A date, an ISO time (UTC if it names no zone), or a duration: from now, or before now.

    Raises InvalidRequest.
    """
    if _is_duration(text):
        length = timedelta(seconds=duration(text, what))
        return now - length if past else now + length
    try:
        found = datetime.fromisoformat(text if len(text) <= TEXT_MAX else "")
    except ValueError:
        raise InvalidRequest(
            f"{what}: {_shown(text)} is no time such as 2026-11-01 or 2026-11-01T12:00Z, nor a "
            f"duration {'before' if past else 'from'} now such as 7d or 24h",
            param=what,
        ) from None
    if not FIRST_YEAR <= found.year <= LAST_YEAR:
        raise InvalidRequest(
            f"{what}: {_shown(text)} is not in the years {FIRST_YEAR} to {LAST_YEAR}", param=what
        )
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def month(text: str, what: str = "period") -> tuple[datetime, datetime]:
    """[start, end) of a calendar month such as 2026-11, UTC. Raises InvalidRequest."""
    match = _MONTH.fullmatch(text)
    if match is None or not FIRST_YEAR <= int(match[1]) <= LAST_YEAR:
        raise InvalidRequest(
            f"{what}: {_shown(text)} is no month; use for example 2026-11", param=what
        )
    year, number = int(match[1]), int(match[2])
    start = datetime(year, number, 1, tzinfo=UTC)
    return start, datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)


def _is_duration(text: str) -> bool:
    return len(text) <= TEXT_MAX and _DURATION.fullmatch(text) is not None


def _shown(text: str) -> str:
    return repr(text) if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]!r}..."
