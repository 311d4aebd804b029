"""Times as people type them: dates, times of day, and ages."""

import re
from datetime import UTC, datetime, tzinfo

_AGE = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def moment(text: str, zone: tzinfo | None = UTC) -> float:
    """Seconds since 1970 of an ISO date or time; one that names no zone is of `zone` (None: this machine's).

    Raises ValueError.
    """
    when = datetime.fromisoformat(text)
    try:
        return (when if when.tzinfo else when.replace(tzinfo=zone)).timestamp()
    except OverflowError:
        raise ValueError(f"{text!r} is too far away") from None


def since(text: str, now: float, zone: tzinfo | None = UTC) -> float:
    """The same, or an age before `now`, such as 2h. Raises ValueError, with a message for who typed it."""
    if age := _AGE.fullmatch(text):
        return now - int(age[1]) * _SECONDS[age[2]]
    try:
        return moment(text, zone)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither an age, as 90s, 10m, 2h, 7d or 4w, nor a time, as 2026-03-01 or 2026-03-01T14:30"
        ) from None
