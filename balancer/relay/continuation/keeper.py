"""Keeps what a client has of a stream in case its replica breaks, and passes on only whole events meanwhile."""

from balancer.relay.continuation.events import ENDS, end_of_last


class Keeper:
    """References to the pieces that were passed on, at most `most` bytes, and the held-back start of an event.

    Nothing is parsed here. `is_cumulative`: each event repeats all that came before it, so the last piece is enough.
    """

    __slots__ = ("_most", "held", "is_cumulative", "is_over", "pieces", "size")

    def __init__(self, most: int, is_cumulative: bool) -> None:
        self.pieces: list[bytes] = []
        self.size = 0  # bytes kept, including `held`
        self.held = b""
        self.is_over = False  # it gave up: all is passed on as it arrives, and nothing is kept
        self._most = most
        self.is_cumulative = is_cumulative

    def take(self, data: bytes) -> bytes:
        """Takes a piece as it arrived; returns what the client gets now, of it and of what was held back."""
        if self.held or not data.endswith(ENDS):
            data = self._whole(data)
            if not data or self.is_over:
                return data
        if self.is_cumulative:
            self.pieces = [data]
            self.size = len(data) + len(self.held)
        else:
            self.pieces.append(data)
            self.size += len(data)
        if self.size > self._most:
            data += self.give_up()
        return data

    def _whole(self, data: bytes) -> bytes:
        """Returns all whole events; the start of the next one is held back."""
        data = self.held + data
        end = end_of_last(data)
        self.size += len(data) - end - len(self.held)
        data, self.held = data[:end], data[end:]
        if self.size > self._most:
            data += self.give_up()
        return data

    def give_up(self) -> bytes:
        """Keeps nothing from now on; returns what was held back, for the client."""
        held, self.held = self.held, b""
        self.is_over = True
        self.pieces = []
        self.size = 0
        return held
