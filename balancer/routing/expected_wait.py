"""How long a new request would wait for a place, measured by how fast requests left the queue.

While any request waits, two sums grow: time multiplied by the number of places in use, and places given from the
queue. Their quotient is the cost of a request in place-seconds, so the estimate adapts at once when replicas are added
or lost. Older measurements count less and less. The clock is passed in, in seconds.
"""

import math

FADES = 120.0  # seconds after which a measurement has lost two thirds of its weight
FEW = 4  # so few places given prove little, and do not fade while requests wait, however long that takes


class ExpectedWait:
    """The measurement, and the estimates that follow from it."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._passed = 0.0  # places times seconds
        self._given = 0.0  # places given to requests that waited

    def passed(self, now: float, places: int) -> None:
        """Since the last call, this many places were in use while requests waited; 0: none waited."""
        seconds, self._at = now - self._at, now
        if not places or self._given > FEW:
            fading = math.exp(-seconds / FADES)
            self._passed *= fading
            self._given *= fading
        self._passed += seconds * places

    def given(self) -> None:
        """A request that waited got a place."""
        self._given += 1

    def likely(self, position: int, places: int) -> float | None:
        """Seconds until the request at that position in the queue (from 1) gets one of that many places.

        None while nothing is known.
        """
        if self._given < 1:
            return None
        return position * self._passed / self._given / places

    def least(self, position: int, places: int) -> float:
        """The shortest plausible time in seconds: as if all requests at replicas were about to end.

        Requests that began together end together, and until then nothing seems to move. 0 while little is known.
        """
        if self._given < FEW:
            return 0.0
        return position * self._passed / (self._given + places) / places
