"""How an answer is framed for its client, told from the bytes that are written."""

import re
import time
from email.utils import parsedate_to_datetime

import pytest

from balancer import errors
from balancer.relay.reply import Reply
from balancer.relay.request import Request


class Wire:
    """A client's connection that only remembers."""

    def __init__(self) -> None:
        self.written = b""
        self.sent: list[bytes] = []
        self.kept: bool | None = None

    def write(self, data: bytes) -> None:
        self.written += data

    def send(self, data: bytes) -> None:
        self.written += data
        self.sent.append(data)

    def answered(self, keep: bool) -> None:
        assert self.kept is None, "answered once"
        self.kept = keep


def reply_to(method: bytes = b"GET", version: str = "1.1", keeps_alive: bool = True) -> tuple[Reply, Wire]:
    wire, request = Wire(), Request(method, b"/v1/x", version, 0.0)
    request.id = b"id"
    return Reply(request, wire, keeps_alive), wire


FRAMED = [
    # version, keep, length  head's framing                                    body's framing              kept
    ("1.1", True, 5, b"Content-Length: 5\r\n\r\n", b"hello", True),
    ("1.1", True, None, b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", True),
    ("1.1", False, 5, b"Content-Length: 5\r\nConnection: close\r\n\r\n", b"hello", False),
    ("1.1", False, None, b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", False),
    ("1.0", True, 5, b"Content-Length: 5\r\nConnection: keep-alive\r\n\r\n", b"hello", True),
    ("1.0", True, None, b"Connection: close\r\n\r\n", b"hello", False),
    ("1.0", False, 5, b"Content-Length: 5\r\nConnection: close\r\n\r\n", b"hello", False),
]


@pytest.mark.parametrize(("version", "keep", "length", "head", "body", "kept"), FRAMED)
def test_framing(version: str, keep: bool, length: int | None, head: bytes, body: bytes, kept: bool) -> None:
    reply, wire = reply_to(version=version, keeps_alive=keep)
    reply.begin(200, [(b"Connection", b"close"), (b"content-length", b"5"), (b"transfer-encoding", b"chunked")], length)
    reply.body(b"hello")
    reply.end()
    assert wire.written == b"HTTP/1.1 200 OK\r\nX-Request-Id: id\r\n" + head + body
    assert wire.kept is kept
    assert reply.bytes_sent == 5


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, b"200 OK"),
        (418, b"418 I'm a Teapot"),
        (299, b"299 Status"),
        (999, b"999 Status"),
        (503, b"503 Service Unavailable"),
    ],
)
def test_status_lines(status: int, line: bytes) -> None:
    reply, wire = reply_to()
    reply.begin(status, [], 0)
    assert wire.written.startswith(b"HTTP/1.1 " + line + b"\r\n")


def test_our_own_answers_are_dated() -> None:
    for answer in (lambda reply: reply.whole(200, [], b"x"), lambda reply: reply.refuse(errors.unauthorized())):
        reply, wire = reply_to()
        answer(reply)
        (date,) = re.findall(rb"\r\nDate: ([^\r]+)\r\n", wire.written)
        assert abs(parsedate_to_datetime(date.decode()).timestamp() - time.time()) < 5
        assert date.endswith(b" GMT")


@pytest.mark.parametrize(
    ("headers", "values"),
    [
        ([(b"Content-Type", b"text/event-stream")], [b"no"]),
        ([(b"content-type", b"Text/Event-Stream; charset=utf-8"), (b"Content-Encoding", b"gzip")], [b"no"]),
        ([(b"Content-Type", b"text/event-stream"), (b"X-ACCEL-Buffering", b"yes")], [b"yes"]),
        ([(b"Content-Type", b"application/json")], []),
        ([], []),
    ],
)
def test_streams_of_events_ask_proxies_not_to_collect_them(
    headers: list[tuple[bytes, bytes]], values: list[bytes]
) -> None:
    reply, wire = reply_to()
    reply.begin(200, headers, None)
    assert re.findall(rb"(?i)\r\nx-accel-buffering: ([^\r]+)\r\n", wire.written) == values


def test_only_events_and_large_pieces_are_sent_one_by_one() -> None:
    """Each is a call to the kernel, a packet, and may wake whoever reads: what can wait a moment goes together."""
    reply, wire = reply_to()
    reply.begin(200, [], 10)
    reply.body(b"hello")
    reply.body(b"world")
    reply.end()
    assert wire.sent == []
    assert wire.written.endswith(b"\r\n\r\nhelloworld")
    reply, wire = reply_to()
    reply.begin(200, [], 1 << 20)
    reply.body(b"x" * (1 << 20))
    assert wire.sent == [b"x" * (1 << 20)]
    reply, wire = reply_to()
    reply.begin(200, [(b"content-type", b"text/event-stream")], None)
    assert wire.sent == []
    reply.body(b"data: 1\n\n")
    reply.body(b"data: 2\n\n")
    reply.end()
    assert wire.sent == [b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 2\n\n\r\n"]
    assert wire.written.endswith(b"data: 2\n\n\r\n0\r\n\r\n")


BOUNDARIES = [
    ([], True),
    ([b"data: 1\n\n"], True),
    ([b"data: 1\n", b"\n"], True),
    ([b"data: 1\r\n\r\n"], True),
    ([b"data: 1\r\n", b"\r\n"], True),
    ([b"data: 1"], False),
    ([b"data: 1\n"], False),
    ([b"data: 1\r\n"], False),
    ([b"data: 1\n\ndata: 2"], False),
    ([b"data: 1\n\n", b"d"], False),
    ([b"\n", b"\n"], True),
]


@pytest.mark.parametrize(("pieces", "is_boundary"), BOUNDARIES)
def test_where_an_event_may_be_added(pieces: list[bytes], is_boundary: bool) -> None:
    reply, wire = reply_to()
    reply.begin(200, [(b"content-type", b"text/event-stream; charset=utf-8")], None)
    for piece in pieces:
        reply.body(piece)
    assert reply.tail.is_at_boundary() is is_boundary
    reply.break_off(errors.stream_broken("why."))
    assert (b"stream_broken" in wire.written) is is_boundary
    assert not wire.written.endswith(b"0\r\n\r\n")
    assert wire.kept is False


def test_late_refusal() -> None:
    """A refusal after an answer has begun breaks it off, and after its end does nothing."""
    reply, wire = reply_to()
    reply.begin(200, [], 10)
    reply.body(b"hello")
    reply.refuse(errors.lost())
    assert wire.written.endswith(b"\r\n\r\nhello")
    assert wire.kept is False
    reply.refuse(errors.lost())
    reply.break_off(errors.lost())
    assert wire.written.endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (errors.no_replica(), b"Retry-After: 5\r\n"),
        (errors.unauthorized(), b"WWW-Authenticate: Bearer\r\n"),
        (errors.method_not_allowed("TRACE"), b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"),
    ],
)
def test_errors_say_in_fields_what_clients_look_for(error: errors.ServeError, fields: bytes) -> None:
    reply, wire = reply_to()
    reply.refuse(error)
    assert fields in wire.written
    assert wire.written.endswith(error.body)
    assert wire.kept is True
