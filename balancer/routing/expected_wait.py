"""How long who comes now would wait, judged by how fast places came free while others waited.

Counted is the time that passed while somebody waited, times the requests that were at replicas meanwhile, and how many
of those who waited got a place: what a request costs in places times seconds. So the estimate follows at once when
replicas come or go. What is long past counts less and less. The clock is passed in, in seconds.
"""

import math

FADES = 120.0  # seconds in which what was seen loses two thirds of its weight
FEW = 4  # places given that say little; where it takes long until there are so many, they are kept for as long


class ExpectedWait:
    def __init__(self, now: float) -> None:
        self._at = now
        self._passed = 0.0  # places times seconds
        self._given = 0.0  # places that somebody who waited got

    def passed(self, now: float, places: int) -> None:
        """Since the last call so many places were in use while somebody waited for one; 0: nobody did."""
        seconds, self._at = now - self._at, now
        if not places or self._given > FEW:
            fading = math.exp(-seconds / FADES)
            self._passed *= fading
            self._given *= fading
        self._passed += seconds * places

    def given(self) -> None:
        """Somebody who waited got a place."""
        self._given += 1

    def likely(self, position: int, places: int) -> float | None:
        """Seconds until whoever stands at that position (the first is 1) has a place, if so many are in use.

        None where nothing is known yet.
        """
        if self._given < 1:
            return None
        return position * self._passed / self._given / places

    def least(self, position: int, places: int) -> float:
        """The same at the least, as if all that are at replicas were just about to end; 0 where little is known yet.

        They may have begun together: then nothing comes free for long, and all at once after that.
        """
        if self._given < FEW:
            return 0.0
        return position * self._passed / (self._given + places) / places
