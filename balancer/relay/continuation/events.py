"""Server-sent events as SGLang writes them: splitting, parsing, and writing them the same way."""

from collections.abc import Iterator
from typing import Any, Final

import orjson

DONE = b"[DONE]"
EVENT_END: Final = b"\n\n"  # as SGLang ends its events
ENDS = (EVENT_END, b"\r\n\r\n")
_TYPE: Final = b"text/event-stream"


def is_event_stream(content_type: bytes) -> bool:
    """Does this Content-Type, whose parameters do not matter, say that server-sent events follow?"""
    return content_type[: len(_TYPE)].lower() == _TYPE


def end_of_last(data: bytes) -> int:
    """The offset at which the last whole event ends; 0 if there is none."""
    if data.endswith(ENDS):
        return len(data)
    ends = [(at, len(end)) for end in ENDS if (at := data.rfind(end)) >= 0]
    return sum(max(ends)) if ends else 0


def data_of(events: bytes) -> Iterator[bytes]:
    """The data of each event, given whole events only; comments are skipped."""
    for event in events.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines)


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in an event's data; raises ValueError if there is none."""
    said = orjson.loads(data)
    if not isinstance(said, dict):
        raise ValueError("an event that is no JSON object")
    return said


def written(said: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(said) + b"\n\n"


def written_with_name(said: dict[str, Any]) -> bytes:
    """An event as Anthropic's clients expect it: named after its type."""
    return b"event: %b\n" % str(said["type"]).encode() + written(said)
