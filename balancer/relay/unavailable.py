"""Does a replica's 503 mean that it is full, so that the request may go to another replica, or is it the answer?

SGLang also answers 503 when it stops a request that ran too long, or drops one in favour of another. Those requests had
begun to generate.
"""

from balancer.errors import is_anthropic
from balancer.relay.held import Held
from balancer.relay.request import Headers

SOON = 5.0  # a full replica answers within this many seconds; a 503 that takes longer comes from a request it worked on
FULL_FOR = 1  # seconds that a replica counts as full if it does not say for how long
QUEUE_FULL = b"queue is full"
OVERLOADED = b'"overloaded_error"'  # the Anthropic format says only this for a full queue, and for other cases


class Unavailable(Held):
    """A 503 without Retry-After, held back until its body is complete or too long."""

    __slots__ = ()

    def says_full(self, path: str, seconds: float) -> bool:
        """Does the answer mean that the replica is full? `seconds` is how long the whole answer took."""
        body = b"".join(self.pieces)
        return seconds < SOON and (QUEUE_FULL in body or (is_anthropic(path) and OVERLOADED in body))


def retry_after(headers: Headers) -> int | None:
    """A 503's Retry-After in whole seconds, limited to 1 to 60 (1 for a date, which no replica sends), or None."""
    for name, value in headers:
        if name.lower() == b"retry-after":
            return min(max(int(value), 1), 60) if value.isdigit() and len(value) < 10 else 1
    return None
