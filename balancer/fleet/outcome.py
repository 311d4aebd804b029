"""How one attempt at a replica ended, and what that says of the replica."""

import enum


class Outcome(enum.Enum):
    """How one attempt at one replica ended."""

    ANSWERED = "answered"  # a whole answer was relayed
    REFUSED = "refused"  # no connection, or it was gone before anything was sent
    UNREACHED = "unreached"  # no connection within connect_timeout
    UNKNOWN = "unknown"  # no connection, because nobody says where the replica is
    LOST = "lost"  # sent, and the connection ended before the first byte of an answer
    BUSY = "busy"  # the replica said that it is full
    SILENT = "silent"  # no byte of a body within first_byte_timeout
    MANGLED = "mangled"  # what came was not HTTP, and nothing of it was relayed
    BROKEN = "broken"  # ended or went wrong amid the answer
    STALLED = "stalled"  # nothing amid the answer, and for idle_timeout no sign of life from the replica
    STUCK = "stuck"  # nothing amid the answer for first_byte_timeout, though the replica lives


# What speaks against the replica. (A refused connection is dealt with at once, not counted.)
FAILURES = frozenset((Outcome.UNREACHED, Outcome.LOST, Outcome.SILENT, Outcome.MANGLED))
# What speaks against the replica or the request, as an answered error does. The other replicas tell which.
DOUBTFUL = frozenset((Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK))
# An answer with one of these is doubtful, too.
BROKEN_STATUSES = frozenset((500, 502, 503, 504))
