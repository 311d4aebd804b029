"""Passive outlier detection for one member: when its failures are enough to send traffic elsewhere for a while."""

from collections import deque

CONSECUTIVE = 5
WINDOW = 20
WINDOW_FAILURES = 10


class Outlier:
    """Counts outcomes of one member; the clock is passed in, in seconds.

    Five failures in a row, or half of the last twenty, are enough. The n-th ejection lasts n times the base, at most
    `longest`; a member that stayed in for `longest` starts at one again (as Envoy's outlier detection counts).
    """

    def __init__(self, base: float, longest: float) -> None:
        self.base = base
        self.longest = longest
        self.ejections_total = 0
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._ejections = 0
        self._back_at = 0.0

    def succeeded(self) -> None:
        self._in_a_row = 0
        self._recent.append(True)

    def failed(self) -> bool:
        """Counts a failure; True when the member should be ejected now."""
        self._in_a_row += 1
        self._recent.append(False)
        return self._in_a_row >= CONSECUTIVE or (
            len(self._recent) == WINDOW and self._recent.count(False) >= WINDOW_FAILURES
        )

    def eject(self, now: float) -> float:
        """Starts an ejection; returns the time at which it ends."""
        if now - self._back_at > self.longest:
            self._ejections = 0
        self._ejections += 1
        self.ejections_total += 1
        self._in_a_row = 0
        self._recent.clear()
        self._back_at = now + min(self.base * self._ejections, self.longest)
        return self._back_at
