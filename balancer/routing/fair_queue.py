"""A queue with a line for each key: the lines take turns, so that no key can delay or exclude the others.

Lines are served by surplus round robin: deficit round robin in which a line may overdraw its credit and pays it back
in later rounds. `share` is the number of entries that a line may send in one round; with less than one it sits out
rounds. Within a line, entries leave in the order of their arrival. Entries that had a turn before, and failed at a
replica, go ahead of all lines, ordered by arrival. When the queue is full, the longest line can give up its last entry
for a key with a shorter one (longest queue drop), so that one key alone may use the whole queue.

Pure data: nothing here waits or reads a clock. All steps take constant time, except that `push_again` inserts into a
sorted list, and `position` sums a slice of one.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

LEAST_SHARE = 1 / 16  # limits how many rounds a line can sit out


class _Line(Generic[T]):
    """One key's entries in the order of their arrival, and how many more it may send in this round."""

    __slots__ = ("credit", "entries", "key", "share")

    def __init__(self, key: Hashable, share: float) -> None:
        self.key = key
        self.share = max(share, LEAST_SHARE)
        self.credit = self.share
        self.entries: OrderedDict[T, None] = OrderedDict()

    def round_of(self, place: int) -> int:
        """The earliest round in which its entry at that place leaves. Places count from 1, rounds from 0."""
        return int((place - 1) / self.share)

    def actual_round_of(self, place: int) -> int:
        """The same, taking into account what the line has already sent in this round, or has overdrawn."""
        beyond = place - 1 - self.credit
        return 0 if beyond < 0 else int(beyond / self.share) + 1


class FairQueue(Generic[T]):
    """Entries in the order in which they are to be served. An entry can be in it only once."""

    def __init__(self) -> None:
        self.size = 0  # entries
        self._lines: OrderedDict[Hashable, _Line[T]] = OrderedDict()  # none is empty; it is the first one's turn
        self._line_of: dict[T, _Line[T]] = {}
        self._again: list[tuple[float, int, T]] = []
        self._came_again = 0
        # By round: how many entries leave in it, and the lines whose last entry leaves in it.
        self._rounds: list[int] = []
        self._ends: list[dict[_Line[T], None]] = []

    def __iter__(self) -> Iterator[T]:
        """All entries, in no particular order. The queue may change during the iteration."""
        return iter([entry for _, _, entry in self._again] + list(self._line_of))

    def __contains__(self, entry: T) -> bool:
        """Is it in a key's line?"""
        return entry in self._line_of

    def depth(self, key: Hashable) -> int:
        """How many entries the key's line has."""
        line = self._lines.get(key)
        return len(line.entries) if line else 0

    def position(self, key: Hashable, share: float = 1.0) -> int:
        """The maximum number of entries that leave up to and including that key's next entry.

        It does not foresee entries of other keys that arrive later.
        """
        line = self._lines.get(key) or _Line(key, share)
        return len(self._again) + sum(self._rounds[: line.actual_round_of(len(line.entries) + 1) + 1]) + 1

    # In

    def push(self, entry: T, key: Hashable, share: float = 1.0) -> None:
        """Adds an entry to the end of its key's line. A line keeps its share until it is empty."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(key, share)
        self.size += 1
        line.entries[entry] = None
        self._line_of[entry] = line
        self._lengthened(line)

    def push_again(self, entry: T, arrived: float) -> None:
        """Adds an entry that had a turn before: ahead of all lines, in order of arrival (seconds) among its kind."""
        self.size += 1
        self._came_again += 1
        insort(self._again, (arrived, self._came_again, entry))

    # Out

    def again(self) -> list[T]:
        """The entries that had a turn before, in order. Any of them may be taken."""
        return [entry for _, _, entry in self._again]

    def first(self) -> T | None:
        """The first entry of the line whose turn it is, until it is taken or removed. None if no line has any."""
        while self._lines:
            line = next(iter(self._lines.values()))
            if line.credit > 0:
                return next(iter(line.entries))
            line.credit += line.share
            self._lines.move_to_end(line.key)
        return None

    def take(self, entry: T) -> None:
        """Removes an entry that is served; its line pays for it."""
        line = self._line_of.get(entry)
        self.remove(entry)
        if line is not None and line.entries:
            line.credit -= 1
            if line.credit <= 0:
                line.credit += line.share
                self._lines.move_to_end(line.key)

    def remove(self, entry: T) -> None:
        """Removes an entry that stopped waiting; its line pays nothing. Ignores one that is not in the queue."""
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
        """Removes and returns the entry that would leave last, if one more of `key`'s would leave in an earlier round.

        With `key` None, it makes room for an entry that had a turn before. Returns None if no line is longer.
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
        """The line is about to lose an entry: those behind move up, so the last place disappears."""
        length = len(line.entries)
        here = line.round_of(length)
        self._rounds[here] -= 1
        self._ends[here].pop(line)
        if length > 1:
            self._ends[line.round_of(length - 1)][line] = None
        while self._rounds and not self._rounds[-1]:
            self._rounds.pop()
            self._ends.pop()
