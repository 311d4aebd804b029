"""W3C trace context: which trace a request belongs to, and what its replica is told of that."""

import os
import random
import re
from typing import NamedTuple

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 1
_ids = random.Random()  # seeded by the system; an id has to be unique, not secret
os.register_at_fork(after_in_child=_ids.seed)  # or processes that have the same parent draw the same


class Trace(NamedTuple):
    """One request's place in a trace. `parent_id` is 0 where the trace begins with it."""

    trace_id: int
    parent_id: int
    span_id: int

    @property
    def traceparent(self) -> bytes:
        """The field by which the spans of whoever gets it become children of this one."""
        return b"00-%032x-%016x-01" % (self.trace_id, self.span_id)


def begin(traceparent: bytes) -> Trace | None:
    """A request's own span, within the trace that its client names, if it does. None: the client wants no record."""
    said = _TRACEPARENT.fullmatch(traceparent)
    if said is not None and (trace_id := int(said[1], 16)) and (parent_id := int(said[2], 16)):
        return Trace(trace_id, parent_id, drawn(64)) if int(said[3], 16) & _SAMPLED else None
    return Trace(drawn(128), 0, drawn(64))


def drawn(bits: int) -> int:
    """A random number of so many bits that is not 0."""
    return _ids.getrandbits(bits) or 1
