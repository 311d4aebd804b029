"""How one attempt at a replica ended, and what that says of the replica."""

import enum
from typing import Final


class Outcome(enum.Enum):
    """How one attempt at one replica ended."""

    ANSWERED = "answered"  # a whole answer was relayed
    REFUSED = "refused"  # no connection, or it ended before the replica had any of the request
    UNREACHED = "unreached"  # no connection within connect_timeout
    UNKNOWN = "unknown"  # no connection, because the replica's name could not be resolved
    LOST = "lost"  # sent, and the connection ended before the whole head of an answer had come
    BUSY = "busy"  # the replica said that it is full
    SILENT = "silent"  # no byte of a body within first_byte_timeout
    MANGLED = "mangled"  # what came was not HTTP, and nothing of it was relayed
    BROKEN = "broken"  # the answer began, then ended early or became invalid
    STALLED = "stalled"  # the answer began, then no bytes and no other sign of life for idle_timeout
    STUCK = "stuck"  # the answer began, then no bytes for first_byte_timeout, although the replica is alive
    AWAY = "away"  # its replica did not get its turn on GPUs that it shares within start_wait


# Failures that are the replica's fault. (A refused connection is dealt with at once, not counted.)
FAILURES: Final = frozenset((Outcome.UNREACHED, Outcome.LOST, Outcome.SILENT, Outcome.MANGLED))
# Either the replica or the request is to blame, as with an error status. Comparison with other replicas decides.
DOUBTFUL: Final = frozenset((Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK))
# An answer with one of these is doubtful, too.
BROKEN_STATUSES: Final = frozenset((500, 502, 503, 504))
