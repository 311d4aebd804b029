"""An answer that is held back until it is whole, so that until then another replica may give one instead."""

from typing import Final

from balancer.relay.request import Headers

LARGEST: Final = 64 << 10  # bytes of a body that is held back


class Held:
    """The head of an answer, and its body so far."""

    __slots__ = ("headers", "length", "pieces", "size")

    def __init__(self, headers: Headers, length: int | None) -> None:
        self.headers = headers
        self.length = length
        self.pieces: list[bytes] = []
        self.size = 0  # bytes of the body so far

    def holds(self, data: bytes) -> bool:
        """Keeps a piece of the body; returns False once the body is longer than `LARGEST`."""
        self.pieces.append(data)
        self.size += len(data)
        return self.size <= LARGEST
