"""Turns a replica's answer that is not an event stream into one error event, if the client was promised a stream."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import orjson

from balancer.errors import ServeError, is_anthropic
from balancer.relay.continuation.events import is_event_stream
from balancer.relay.request import Request

LARGEST = 64 << 10  # bytes of such an answer that are read


class Wire(Protocol):
    def write(self, data: bytes) -> None: ...

    def answered(self, keep: bool) -> None: ...


def fits(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Can a stream whose head is already sent continue with an answer that has this head?"""
    fields = {name.lower(): value for name, value in headers}
    is_stream = is_event_stream(fields.get(b"content-type", b""))
    return status == 200 and is_stream and b"content-encoding" not in fields


class Misfit:
    """Stands in for the client's connection: collects the body, and at its end writes the event to `wire`.

    `failed` gets the error, for the log.
    """

    def __init__(
        self, wire: Wire, request: Request, status: int, is_chunked: bool, failed: Callable[[ServeError], None]
    ) -> None:
        self._wire = wire
        self._request = request
        self._status = status
        self._is_chunked = is_chunked
        self._failed = failed
        self._body = bytearray()

    def write(self, data: bytes) -> None:
        self._body += data[: LARGEST - len(self._body)]

    send = write

    def answered(self, keep: bool) -> None:
        said = _object(self._body)
        message = _message(said) or "It sent no stream."
        status = self._status if self._status >= 400 else 502
        error = ServeError(status, "replica_error", f"The replica answered {self._status}: {message}")
        self._failed(error)
        event = self._event(said, error)
        self._wire.write(b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event)
        self._wire.answered(False)

    def _event(self, said: dict[str, Any] | None, error: ServeError) -> bytes:
        """The replica's own error if it has the shape that this path uses, else one of ours that quotes it."""
        path, is_error = self._request.path, said is not None and self._status >= 400
        if is_error and is_anthropic(path) and said and said.get("type") == "error":
            return b"event: error\ndata: " + orjson.dumps(said) + b"\n\n"
        if is_error and said and not is_anthropic(path):
            return b"data: " + orjson.dumps(said if "error" in said else {"error": said}) + b"\n\n"
        return error.event(path, self._request.id)


def _object(body: bytes | bytearray) -> dict[str, Any] | None:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return said if isinstance(said, dict) else None


def _message(said: dict[str, Any] | None) -> str:
    """What a JSON error says, in any of the usual shapes."""
    if said is None:
        return ""
    inner = said.get("error")
    found = inner.get("message") if isinstance(inner, dict) else inner or said.get("message") or said.get("detail")
    return found if isinstance(found, str) else ""
