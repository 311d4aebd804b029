"""A few figures of each relay in memory that all of them share: what it holds, how many connections it has, and how
often it lacked room."""

import mmap

# Bytes; connections; how often it found no room while others held more than their part
HELD, CONNECTIONS, PRESSED = 0, 1, 2
_FIGURES = 3
_BYTES = 8


class Board:
    """Made before the processes part. Each relay writes only its own figures; a figure is written in one piece."""

    def __init__(self, relays: int) -> None:
        self.relays = relays
        self._memory = mmap.mmap(-1, relays * _FIGURES * _BYTES)
        self._figures = memoryview(self._memory).cast("q")

    def set(self, relay: int, figure: int, value: int) -> None:
        self._figures[figure * self.relays + relay] = value

    def add_one(self, relay: int, figure: int) -> None:
        self._figures[figure * self.relays + relay] += 1

    def all(self, figure: int) -> list[int]:
        return self._figures[figure * self.relays : (figure + 1) * self.relays].tolist()

    def elsewhere(self, relay: int, figure: int) -> int:
        """The sum of all others."""
        every = self.all(figure)
        return sum(every) - every[relay]

    def clear(self, relay: int) -> None:
        """The relay is gone."""
        for figure in range(_FIGURES):
            self.set(relay, figure, 0)
