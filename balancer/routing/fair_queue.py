"""A queue in which each key has its turn: whoever fills it keeps nobody else waiting, and nobody else out.

Keys are served round and round (deficit round robin, with what a key overdrew carried over: surplus round robin).
`share` is how many requests of a key go in one round, as against other keys; below one, the key sits rounds out. Within
a key who came first goes first. Ahead of all go those that had their turn before and came to nothing at a replica, by
when they arrived. Where the queue is full and a key has less in it than another, the other gives up its last place
(longest queue drop): so one key alone may fill it all.

Nothing here waits or knows of time. Each step costs the same however many wait, but for two: an entry that comes again
is sorted in among its like, and `position` adds up the rounds that lie ahead, both at the speed of a list.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

LEAST_SHARE = 1 / 16  # else a round would be long to skip


class _Line(Generic[T]):
    """One key's entries, first come, and how many of them it may still send in this round."""

    __slots__ = ("credit", "entries", "key", "share")

    def __init__(self, key: Hashable, share: float) -> None:
        self.key = key
        self.share = max(share, LEAST_SHARE)
        self.credit = self.share
        self.entries: OrderedDict[T, None] = OrderedDict()

    def round_of(self, place: int) -> int:
        """In which round its entry at that place goes at the earliest; the first place is 1, the first round 0."""
        return int((place - 1) / self.share)

    def actual_round_of(self, place: int) -> int:
        """The same with what it has sent already in this round, or overdrew."""
        beyond = place - 1 - self.credit
        return 0 if beyond < 0 else int(beyond / self.share) + 1


class FairQueue(Generic[T]):
    """Entries in the order in which they are to be served. An entry is in it once at most."""

    def __init__(self) -> None:
        self.size = 0  # entries
        self._lines: OrderedDict[Hashable, _Line[T]] = OrderedDict()  # none is empty; whose turn it is comes first
        self._line_of: dict[T, _Line[T]] = {}
        self._again: list[tuple[float, int, T]] = []
        self._came_again = 0
        # By the rounds to come: how many entries go in it, and the lines whose last entry does.
        self._rounds: list[int] = []
        self._ends: list[dict[_Line[T], None]] = []

    def __iter__(self) -> Iterator[T]:
        """All of them, in no particular order; may be changed meanwhile."""
        return iter([entry for _, _, entry in self._again] + list(self._line_of))

    def depth(self, key: Hashable) -> int:
        """How many entries that key has, without those that came again."""
        line = self._lines.get(key)
        return len(line.entries) if line else 0

    def position(self, key: Hashable, share: float = 1.0) -> int:
        """How many will have been served, itself among them, when the next entry of that key is; at most so many.

        Keys that come later, and have their turn, are not foreseen.
        """
        line = self._lines.get(key) or _Line(key, share)
        return len(self._again) + sum(self._rounds[: line.actual_round_of(len(line.entries) + 1) + 1]) + 1

    # In

    def push(self, entry: T, key: Hashable, share: float = 1.0) -> None:
        """At the end of its key's line. A key keeps the share that it came with until its line is empty."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(key, share)
        self.size += 1
        line.entries[entry] = None
        self._line_of[entry] = line
        self._lengthened(line)

    def push_again(self, entry: T, arrived: float) -> None:
        """Ahead of all that had no turn yet, among its like by when it arrived."""
        self.size += 1
        self._came_again += 1
        insort(self._again, (arrived, self._came_again, entry))

    # Out

    def again(self) -> list[T]:
        """Those that came again, in their order; each may have a reason of its own to wait on."""
        return [entry for _, _, entry in self._again]

    def first(self) -> T | None:
        """Whose turn it is among the others: the same one until it is taken or removed."""
        while self._lines:
            line = next(iter(self._lines.values()))
            if line.credit > 0:
                return next(iter(line.entries))
            line.credit += line.share
            self._lines.move_to_end(line.key)
        return None

    def take(self, entry: T) -> None:
        """It is served: its key's turn goes on, or ends with it."""
        line = self._line_of.get(entry)
        self.remove(entry)
        if line is not None and line.entries:
            line.credit -= 1
            if line.credit <= 0:
                line.credit += line.share
                self._lines.move_to_end(line.key)

    def remove(self, entry: T) -> None:
        """It waits no more. Costs nobody a turn; one that is not here is passed over."""
        line = self._line_of.pop(entry, None)
        if line is None:
            left = [again for again in self._again if again[2] != entry]
            self.size -= len(self._again) - len(left)
            self._again = left
            return
        self.size -= 1
        self._shortened(line)
        del line.entries[entry]
        if not line.entries:
            del self._lines[line.key]

    def give_way(self, key: Hashable | None, share: float = 1.0) -> T | None:
        """Takes out the last entry of whoever has most for its share, if that would go later than another of `key`'s.

        `key` None: than one that comes again. None where nobody has more.
        """
        if not self._ends:
            return None
        if key is not None:
            line = self._lines.get(key) or _Line(key, share)
            if line.round_of(len(line.entries) + 1) >= len(self._ends) - 1:
                return None
        last = next(reversed(next(reversed(self._ends[-1])).entries))
        self.remove(last)
        return last

    # The rounds to come

    def _lengthened(self, line: _Line[T]) -> None:
        length = len(line.entries)
        here = line.round_of(length)
        while len(self._rounds) <= here:
            self._rounds.append(0)
            self._ends.append({})
        self._rounds[here] += 1
        if length > 1:
            self._ends[line.round_of(length - 1)].pop(line)
        self._ends[here][line] = None

    def _shortened(self, line: _Line[T]) -> None:
        """It is about to lose an entry: those behind it move up, so the last place is free."""
        length = len(line.entries)
        here = line.round_of(length)
        self._rounds[here] -= 1
        self._ends[here].pop(line)
        if length > 1:
            self._ends[line.round_of(length - 1)][line] = None
        while self._rounds and not self._rounds[-1]:
            self._rounds.pop()
            self._ends.pop()
