"""Which part of a round each key gets: its weight, by what its requests cost.

What is scarce is places at replicas, so a request costs the time for which it keeps one. That is not known before; but
the requests of one key are alike as a rule, so it is estimated by those before. Only those that had to wait are looked
at: without a queue there is nothing to share out.
"""

from collections import OrderedDict
from collections.abc import Hashable

MOST_KEYS = 1024  # that are remembered
LATEST = 50  # requests that make a mean
# A key about which little is known counts as having had so many ordinary requests besides.
ORDINARY = 3
# What a request may cost, in ordinary ones: a mean says little about the next one, and nobody should sit out for long.
LEAST_COST, MOST_COST = 1 / 4, 4.0


class Shares:
    """The measured costs of all keys, the last used ones of them."""

    def __init__(self) -> None:
        self._all = _Mean()
        self._keys: OrderedDict[Hashable, _Mean] = OrderedDict()

    def of(self, key: Hashable, weight: float = 1.0) -> float:
        """How many requests of that key go in one round; `weight` for one whose requests are ordinary."""
        mean = self._keys.get(key)
        if mean is None or not self._all.value:
            return weight
        self._keys.move_to_end(key)
        cost = (mean.value * mean.count + self._all.value * ORDINARY) / (mean.count + ORDINARY) / self._all.value
        return weight / min(max(cost, LEAST_COST), MOST_COST)

    def note(self, key: Hashable, seconds: float) -> None:
        """A request of that key kept its place for so long."""
        self._all.note(seconds)
        mean = self._keys.get(key)
        if mean is None:
            mean = self._keys[key] = _Mean()
            if len(self._keys) > MOST_KEYS:
                self._keys.popitem(last=False)
        mean.note(seconds)


class _Mean:
    """Of the latest values, the older ones the less."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def note(self, value: float) -> None:
        self.count = min(self.count + 1, LATEST)
        self.value += (value - self.value) / self.count
