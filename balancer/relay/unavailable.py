"""A replica's 503: does it say that it is full, so that the request may go elsewhere, or is it an answer?

SGLang says 503 too of a request that it ran for too long, or gave up for another one: that was generated already.
"""

from balancer.errors import is_anthropic
from balancer.relay.request import Headers

LARGEST = 64 << 10  # bytes of such an answer that are held back to read them
SOON = 5.0  # seconds within which a replica says that it is full; what takes longer was worked on
QUEUE_FULL = b"queue is full"
OVERLOADED = b'"overloaded_error"'  # all that Anthropic's clients are told of a full queue, and of more


class Unavailable:
    """A 503 without Retry-After, held back until its body is whole or too long."""

    __slots__ = ("_size", "headers", "length", "pieces")

    def __init__(self, headers: Headers, length: int | None) -> None:
        self.headers = headers
        self.length = length
        self.pieces: list[bytes] = []
        self._size = 0

    def holds(self, data: bytes) -> bool:
        """Takes a piece of the body; False once there is too much of it."""
        self.pieces.append(data)
        self._size += len(data)
        return self._size <= LARGEST

    def says_full(self, path: str, seconds: float) -> bool:
        """`seconds` is how long the whole answer took."""
        body = b"".join(self.pieces)
        return seconds < SOON and (QUEUE_FULL in body or (is_anthropic(path) and OVERLOADED in body))


def retry_after(headers: Headers) -> int | None:
    """A 503's Retry-After in whole seconds, from 1 to 60 (1 for a date, which nobody sends), or None."""
    for name, value in headers:
        if name.lower() == b"retry-after":
            return min(max(int(value), 1), 60) if value.isdigit() and len(value) < 10 else 1
    return None
