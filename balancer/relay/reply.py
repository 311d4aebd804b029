"""The reply to one request: an answer relayed as it arrives, one of our own errors, or a stream that is broken off."""

from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Final, Protocol

from balancer.errors import ServeError, is_anthropic
from balancer.relay.continuation.events import EVENT_END, is_event_stream
from balancer.relay.hidden_usage import EMPTY, HiddenUsage
from balancer.relay.misfit import Misfit, fits
from balancer.relay.paths import kind_of
from balancer.relay.request import HOP_BY_HOP, Request
from balancer.relay.usage import Tail

Headers = list[tuple[bytes, bytes]]

# A piece of a body of at most this many bytes waits until the end of this round of the event loop, to be sent together
# with other writes. A larger one is sent at once, so that a slow client pauses its replica before the next read.
SMALL: Final = 16 << 10
# A replica's CORS fields are dropped: SGLang lets every page read its answers, but here `cors_origins` decides.
_CORS = frozenset(
    b"access-control-allow-origin access-control-allow-credentials access-control-allow-methods "
    b"access-control-allow-headers access-control-expose-headers access-control-max-age "
    b"access-control-allow-private-network timing-allow-origin".split()
)
NOT_PASSED_ON: Final = HOP_BY_HOP | _CORS | {b"content-length", b"x-request-id", b"x-replica-id", b"x-route-reason"}


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    return b"Date: %b\r\n" % formatdate(second, usegmt=True).encode()


STATUS_LINES: Final = {status: _status_line(status) for status in range(100, 1000)}


class Wire(Protocol):
    """The client's connection, as far as a reply needs it."""

    def write(self, data: bytes) -> None:
        """Sends soon, together with everything else written in this round of the event loop."""

    def send(self, data: bytes) -> None:
        """Sends now, after anything written before."""

    def answered(self, keep: bool) -> None:
        """The reply has ended; `keep` says whether the connection can carry another."""


class Reply:
    """Writes the answer to one request to the client's connection, in framing that this client understands."""

    __slots__ = (
        "_hidden",
        "_keeps_alive",
        "_wire",
        "bytes_sent",
        "error",
        "extra_fields",
        "hides_usage",
        "is_chunked",
        "is_early",
        "is_event_stream",
        "is_over",
        "is_taken",
        "request",
        "status",
        "tail",
    )

    def __init__(self, request: Request, wire: Wire, keeps_alive: bool) -> None:
        self.request = request
        self.extra_fields = b""  # header lines that are added to any answer: CORS, what a key has left
        self.hides_usage = False  # its client did not ask for the token counts of its stream; we did
        self.status = 0
        self.bytes_sent = 0
        self.error: ServeError | None = None  # our error with which it was answered or broken off
        self.is_chunked = False
        self.is_early = False  # the head of a stream was sent before a replica answered
        self.is_event_stream = False
        self.is_over = False
        self.is_taken = False  # the server is at work on it, and will log it
        self._hidden: HiddenUsage | None = None
        self._wire = wire
        self._keeps_alive = keeps_alive
        self.tail = Tail(request.path)

    @property
    def has_begun(self) -> bool:
        return self.status != 0

    @property
    def is_awaited(self) -> bool:
        """Has its client nothing of an answer, but perhaps an early head?"""
        return self.status == 0 or self.is_early

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], length: int | None, own: bytes = b"") -> None:
        """Writes the head: the replica's fields without `NOT_PASSED_ON`, the `own` lines, and the framing."""
        if self.is_early:
            self._go_on(status, headers)
            return
        request = self.request
        lines = [STATUS_LINES[status]]
        dropped: set[bytes] = set()
        is_encoded = is_unbuffered = False
        for name, value in headers:
            lowered = name.lower()
            if lowered not in NOT_PASSED_ON:
                lines.append(b"%b: %b\r\n" % (name, value))
                if lowered == b"content-type":
                    self.is_event_stream = is_event_stream(value)
                elif lowered == b"content-encoding":
                    is_encoded = True
                elif lowered == b"x-accel-buffering":
                    is_unbuffered = True
            elif lowered == b"connection" and value.lower() not in (b"keep-alive", b"close"):
                dropped.update(token.strip().lower() for token in value.split(b","))
        self.tail.begin(self.is_event_stream)
        if self.is_event_stream and not is_unbuffered:
            own += b"X-Accel-Buffering: no\r\n"  # otherwise nginx and similar proxies buffer a stream
        if is_encoded or length is not None:
            self.is_event_stream = False  # an event of ours would corrupt the encoding or exceed the length
        elif self.hides_usage and self.is_event_stream:
            self._hidden = HiddenUsage()
        if dropped:
            lines = [line for line in lines if line.partition(b":")[0].lower() not in dropped]
        lines.append(b"X-Request-Id: %b\r\n%b%b" % (request.id, own, self.extra_fields))
        if is_anthropic(request.path):  # its clients look for the id there
            lines = [line for line in lines if not line.lower().startswith(b"request-id:")]
            lines.append(b"Request-Id: %b\r\n" % request.id)
        if length is not None and status != 204:
            lines.append(b"Content-Length: %d\r\n" % length)
        elif status >= 200 and status not in (204, 304):
            if request.version == "1.1":
                self.is_chunked = request.method != b"HEAD"
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                self._keeps_alive = False
        if not self._keeps_alive:
            lines.append(b"Connection: close\r\n")
        elif request.version == "1.0":
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self.status = status
        self._wire.write(b"".join(lines))

    def switch(self, headers: Iterable[tuple[bytes, bytes]], own: bytes) -> None:
        """Writes the head of a 101: from here on the connection carries a WebSocket."""
        lines = [STATUS_LINES[101]]
        lines += [b"%b: %b\r\n" % field for field in headers if field[0].lower() not in NOT_PASSED_ON]
        lines.append(b"Upgrade: websocket\r\nConnection: Upgrade\r\n")
        lines.append(b"X-Request-Id: %b\r\n%b%b\r\n" % (self.request.id, own, self.extra_fields))
        self.status = 101
        self._wire.send(b"".join(lines))

    def frames(self, data: bytes) -> None:
        """Passes on a piece of a WebSocket."""
        self.bytes_sent += len(data)
        self._wire.send(data)

    def close(self) -> None:
        """Ends a WebSocket, whose closing has been said in its frames."""
        if not self.is_over:
            self.is_over = True
            self._wire.answered(False)

    def begin_early(self) -> None:
        """Writes the head of an event stream before any replica has begun to answer."""
        self.begin(200, [(b"Content-Type", b"text/event-stream; charset=utf-8"), (b"Cache-Control", b"no-cache")], None)
        self.is_early = True

    def _go_on(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Takes the replica's head after ours was sent early: drops it, or turns an answer that is no event stream into
        an error event.
        """
        self.is_early = False
        if not fits(status, headers):
            self._hidden = None
            self._wire = Misfit(self._wire, self.request, status, self.is_chunked, self._failed)
            self.is_chunked = self.is_event_stream = False

    def _failed(self, error: ServeError) -> None:
        self.error = self.error or error

    def comment(self) -> bool:
        """Writes an SSE comment as a sign of life. Returns False if the answer is no event stream, has a body, or is
        over.
        """
        if self.is_over or self.bytes_sent or not self.is_event_stream:
            return False
        line = b": waiting\n\n"
        self._wire.send(b"%x\r\n%b\r\n" % (len(line), line) if self.is_chunked else line)
        return True

    def body(self, data: bytes) -> None:
        """Passes on a piece of the body as it came."""
        if not data:
            return  # an empty chunk would end the body
        self.bytes_sent += len(data)
        tail = self.tail
        tail.pieces.append(data)
        if len(tail.pieces) > tail.most or self.bytes_sent > tail.until:
            tail.trim(self.bytes_sent)
        hidden = self._hidden
        if hidden is not None and (EMPTY in data or data[-2:] != EVENT_END or hidden.held):
            shown = hidden.take(data)
            self.bytes_sent += len(shown) - len(data)
            if not shown:
                return
            data = shown
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        piece = b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data
        if self.is_event_stream or len(data) > SMALL:
            self._wire.send(piece)
        else:
            self._wire.write(piece)

    def end(self) -> None:
        """Ends a complete answer."""
        if self._hidden is not None and (rest := self._hidden.rest()):
            self.bytes_sent += len(rest)
            self._pass_on(rest)
        if self.is_chunked:
            self._wire.write(b"0\r\n\r\n")
        self.is_over = True
        self._wire.answered(self._keeps_alive)

    def whole(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends a complete answer of the balancer's own."""
        self.begin(status, headers, len(body), _date(int(time())))
        if body and self.request.method != b"HEAD":
            self.body(body)
        self.is_chunked = False
        self.end()

    def refuse(self, error: ServeError) -> None:
        """Answers with one of our errors, or breaks off an answer that has already begun."""
        if self.is_over:
            return
        if self.has_begun:
            self.break_off(error)
            return
        request = self.request
        if request.path == "/":  # refused before its target was read
            request.path = kind_of(request.target.partition(b"?")[0])[0]
        self.error = error
        headers = [(b"Content-Type", b"application/json")]
        if error.retry_after is not None:
            headers.append((b"Retry-After", b"%d" % error.retry_after))
        if error.allow is not None:
            headers.append((b"Allow", error.allow.encode()))
        if error.status == 401:
            headers.append((b"WWW-Authenticate", b"Bearer"))
        self._keeps_alive = self._keeps_alive and not error.closes
        self.whole(error.status, headers, error.body_at(request.path, request.id))

    def break_off(self, error: ServeError) -> None:
        """Ends an incomplete answer in a way that no client takes for complete: no [DONE], no last chunk.

        If the last event of an event stream is complete, one more event says why.
        """
        if self.is_over:
            return
        self.error = error
        if self.is_event_stream and self.tail.is_at_boundary():
            self.body(error.event(self.request.path, self.request.id))
        self.is_over = True
        self._wire.answered(False)
