"""Two fair queues, one behind the other: bulk requests leave while no other request waits.

Pure data, with the methods of FairQueue. A key says by its type where its entries belong.
"""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from balancer.routing.fair_queue import FairQueue

T = TypeVar("T", bound=Hashable)


class Bulk(str):
    """A key whose requests can wait until nobody else does."""

    __slots__ = ()


class RankedQueue(Generic[T]):
    """Entries that had a turn before go ahead of both queues, whoever's they are."""

    def __init__(self) -> None:
        self._front = FairQueue[T]()
        self._back = FairQueue[T]()

    @property
    def size(self) -> int:
        return self._front.size + self._back.size

    def __iter__(self) -> Iterator[T]:
        return iter([*self._front, *self._back])

    def depth(self, key: Hashable) -> int:
        """How many entries the key has."""
        return self._front.depth(key) + self._back.depth(key)

    def position(self, key: Hashable, share: float = 1.0) -> int:
        """The maximum number of entries that leave up to and including that key's next entry.

        It does not foresee entries that arrive later.
        """
        if isinstance(key, Bulk):
            return self._front.size + self._back.position(key, share)
        return self._front.position(key, share)

    def push(self, entry: T, key: Hashable, share: float = 1.0) -> None:
        """Adds an entry to the end of its key's line."""
        (self._back if isinstance(key, Bulk) else self._front).push(entry, key, share)

    def push_again(self, entry: T, arrived: float) -> None:
        """Adds an entry that had a turn before: ahead of all lines, in order of arrival (seconds) among its kind."""
        self._front.push_again(entry, arrived)

    def again(self) -> list[T]:
        """The entries that had a turn before, in order. Any of them may be taken."""
        return self._front.again()

    def first(self) -> T | None:
        """The entry whose turn it is, until it is taken or removed. None if no line has any."""
        first = self._front.first()
        return self._back.first() if first is None else first

    def take(self, entry: T) -> None:
        """Removes an entry that is served; its line pays for it."""
        self._of(entry).take(entry)

    def remove(self, entry: T) -> None:
        """Removes an entry that stopped waiting; its line pays nothing. Ignores one that is not in the queue."""
        self._of(entry).remove(entry)

    def give_way(self, key: Hashable | None, share: float = 1.0) -> T | None:
        """Removes and returns the entry that would leave last, if one more of `key`'s would leave before it.

        With `key` None, it makes room for an entry that had a turn before.
        """
        if isinstance(key, Bulk):
            return self._back.give_way(key, share)
        last = self._back.give_way(None)
        return self._front.give_way(key, share) if last is None else last

    def _of(self, entry: T) -> FairQueue[T]:
        return self._back if entry in self._back else self._front
