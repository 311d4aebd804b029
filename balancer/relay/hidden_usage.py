"""Takes out of a stream the event with the token counts that we asked for and the client did not."""

from balancer.relay.continuation.events import end_of_last

EVENT_END = b"\n\n"
EMPTY = b'"choices":[]'  # as SGLang and vLLM write it; quotes within a text are escaped
USAGE = b'"usage":{'
LARGEST = 1 << 20  # bytes of one event that are held back until it is whole


class HiddenUsage:
    """Passes on whole events; the rest of one waits until it is whole."""

    __slots__ = ("_held", "_is_over")

    def __init__(self) -> None:
        self._held = b""
        self._is_over = False

    def take(self, data: bytes) -> bytes:
        if not self._held and data[-2:] == EVENT_END and EMPTY not in data:
            return data
        if self._is_over:
            return data
        data = self._held + data
        end = end_of_last(data)
        whole, self._held = data[:end], data[end:]
        if len(self._held) > LARGEST:
            self._is_over = True
            return whole + self.rest()
        if EMPTY not in whole:
            return whole
        events = whole.split(EVENT_END)
        return EVENT_END.join(event for event in events if not (EMPTY in event and USAGE in event))

    def rest(self) -> bytes:
        """What is held of an event that has no end."""
        held, self._held = self._held, b""
        return held
