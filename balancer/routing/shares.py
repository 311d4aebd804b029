"""How many requests of each key leave the queue in one round: the key's weight, divided by what its requests cost.

Places at replicas are scarce, so a request costs the time for which it occupies one. That is not known in advance, but
requests of one key resemble each other, so the latest ones give an estimate. Only requests that had to wait are
measured: without a queue there is nothing to share.
"""

from collections import OrderedDict
from collections.abc import Hashable

MOST_KEYS = 1024  # keys remembered: the ones used last
LATEST = 50  # requests that a mean is made of
# A key starts as if it had sent this many average requests.
ORDINARY = 3
# Limits of the estimated cost, in average requests: a mean says little about the next request.
LEAST_COST, MOST_COST = 1 / 4, 4.0


class Shares:
    """The measured costs of the keys."""

    def __init__(self) -> None:
        self._all = _Mean()
        self._keys: OrderedDict[Hashable, _Mean] = OrderedDict()

    def of(self, key: Hashable, weight: float = 1.0) -> float:
        """How many requests of that key leave in one round; for a key with average requests this is its weight."""
        mean = self._keys.get(key)
        if mean is None or not self._all.value:
            return weight
        self._keys.move_to_end(key)
        cost = (mean.value * mean.count + self._all.value * ORDINARY) / (mean.count + ORDINARY) / self._all.value
        return weight / min(max(cost, LEAST_COST), MOST_COST)

    def note(self, key: Hashable, seconds: float) -> None:
        """A request of that key occupied its place for that many seconds."""
        self._all.note(seconds)
        mean = self._keys.get(key)
        if mean is None:
            mean = self._keys[key] = _Mean()
            if len(self._keys) > MOST_KEYS:
                self._keys.popitem(last=False)
        mean.note(seconds)


class _Mean:
    """A mean in which older values count less and less."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def note(self, value: float) -> None:
        self.count = min(self.count + 1, LATEST)
        self.value += (value - self.value) / self.count
