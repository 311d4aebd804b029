"""Passive outlier detection for one member: its recent outcomes, and how long an ejection lasts."""

from collections import deque

CONSECUTIVE = 5
WINDOW = 20
WINDOW_FAILURES = 10
# How many answers, good or doubtful, are remembered, and for how many seconds.
LATELY = 10
LATELY_SECONDS = 30.0
# An acquitted member is not suspected again for TRUST seconds times its acquittals since the last ejection, at most
# MOST_TRUST seconds.
TRUST = 5.0
MOST_TRUST = 60.0


class Outlier:
    """Counts the outcomes of one member; times are passed in, in seconds.

    Five failures in a row, or ten among the last twenty outcomes, call for an ejection. Only failures that no request
    can be blamed for count here; doubtful answers are remembered for comparison (balancer/fleet/outliers.py). The n-th
    ejection lasts n times `base`, at most `longest`; after `longest` without one, n starts at one again (as in Envoy's
    outlier detection).
    """

    def __init__(self, base: float, longest: float) -> None:
        self.base = base
        self.longest = longest
        self.ejections_total = 0
        self.trusted_until = 0.0
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._lately: deque[tuple[float, bool]] = deque(maxlen=LATELY)
        self._acquittals = 0
        self._ejections = 0
        self._back_at = 0.0

    def answered(self, now: float, is_well: bool) -> None:
        """Counts an answer; a doubtful one (not `is_well`) is neither a success nor certainly a failure."""
        self._lately.append((now, is_well))
        if is_well:
            self._in_a_row = 0
            self._recent.append(True)

    def failed(self) -> bool:
        """Counts a failure; True when the member should be ejected now."""
        self._in_a_row += 1
        self._recent.append(False)
        return self._in_a_row >= CONSECUTIVE or (
            len(self._recent) == WINDOW and self._recent.count(False) >= WINDOW_FAILURES
        )

    def lately(self, now: float) -> tuple[int, int]:
        """How many of its recent answers were doubtful, and how many there were."""
        answers = [is_well for at, is_well in self._lately if now - at < LATELY_SECONDS]
        return answers.count(False), len(answers)

    def acquit(self, now: float) -> None:
        """Clears it of its doubtful answers: it is not suspected again for a while."""
        self._acquittals += 1
        self.trusted_until = now + min(TRUST * self._acquittals, MOST_TRUST)
        self._lately.clear()

    def eject(self, now: float) -> float:
        """Starts an ejection; returns the time at which it ends."""
        if now - self._back_at > self.longest:
            self._ejections = 0
        self._ejections += 1
        self.ejections_total += 1
        self._in_a_row = self._acquittals = 0
        self._recent.clear()
        self._lately.clear()
        self._back_at = now + min(self.base * self._ejections, self.longest)
        return self._back_at
