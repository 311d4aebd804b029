"""Removes the event with token counts from a stream whose client did not ask for it; we did."""

import re

from balancer.relay.continuation.events import end_of_last

_EVENT = re.compile(rb".*?(?:\r\n\r\n|\n\n)", re.DOTALL)
EMPTY = b'"choices":[]'  # as SGLang and vLLM write it; quotes within a text are escaped
USAGE = b'"usage":{'
LARGEST = 1 << 20  # bytes of one event that are held back until it is whole


class HiddenUsage:
    """Passes on whole events; the rest of one waits until it is whole.

    While nothing is `held`, it need not be asked about whole events without `EMPTY`, which are nearly all.
    """

    __slots__ = ("_is_over", "held")

    def __init__(self) -> None:
        self.held = b""  # an event that is not whole yet
        self._is_over = False

    def take(self, data: bytes) -> bytes:
        if self._is_over:
            return data
        data = self.held + data
        end = end_of_last(data)
        whole, self.held = data[:end], data[end:]
        if len(self.held) > LARGEST:
            self._is_over = True
            return whole + self.rest()
        if EMPTY not in whole:
            return whole
        events = _EVENT.findall(whole)
        return b"".join(event for event in events if not (EMPTY in event and USAGE in event))

    def rest(self) -> bytes:
        """What is held of an event that has no end."""
        held, self.held = self.held, b""
        return held
