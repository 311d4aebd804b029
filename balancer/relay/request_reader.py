"""The reading half of a client's connection: turns bytes into whole requests, and limits how many are read ahead."""

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

import httptools

from balancer import errors
from balancer.errors import ServeError
from balancer.relay.doors import Doors
from balancer.relay.request import Headers, Peer, Request, new_request_id, read_head

MAX_PIPELINED: Final = 32  # requests read ahead on one connection
MAX_READ_AHEAD = 1 << 20  # bytes of memory for requests read ahead on one connection
MORSEL: Final = 4 << 10  # bytes parsed at once: some 150 of the smallest heads
HEAD_COST = 1 << 10  # bytes of memory that a request takes in addition to its contents
LEAST_PIECE: Final = 1 << 10  # smaller pieces of a body are merged: each piece costs memory, and time to send
MAX_SWALLOWED = 64 << 10  # a refused request's body up to this size is read, to keep the connection usable
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Frames(Protocol):
    """A WebSocket, as far as its client's connection needs it."""

    def from_client(self, data: bytes) -> None: ...

    def close(self, code: int, why: str) -> None: ...


class RequestReader(asyncio.BufferedProtocol):
    """Puts each whole request into `_queue`, refused ones too; the subclass answers them.

    Three cases end the reading for good (`_is_deaf`): a request that says it is the last, a refusal of a request whose
    end is unknown or far away, and the end of the connection.
    """

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._settings = doors.settings
        self._transport: asyncio.Transport | None = None
        self._peer = Peer(b"unknown", False, b"http")

        # The request that is being read
        self._parser: httptools.HttpRequestParser | None = None
        self._url = b""
        self._headers: Headers = []
        self._is_in_head = False
        self._reading: Request | None = None  # its head is complete, its body still arriving
        self._is_body_unseen = False  # its head asks for an upgrade, so the parser does not read the body as one
        self._since = 0.0  # start of the current wait: for the rest of a head or body, or for the next request
        self._body_time = 0.0  # seconds in which the body could have arrived

        # How much arrived
        self._morsel_size = 0  # bytes being parsed now
        self._head_room = 0  # size of the morsel in which the head began: at most this many bytes of it are the head's
        self._unfruitful = 0  # bytes parsed after that morsel, or after the last one that contained part of a body
        self._completed = 0  # requests read completely

        # What waits
        self._queue: deque[Request] = deque()  # the first one is being answered
        self._unparsed = b""  # bytes read, but not parsed because enough was read ahead
        self._is_full = False  # enough is read ahead, so reading is paused
        self._reads_on_soon = False

        # The end
        self._is_deaf = False  # whatever else this client sends is ignored, or belongs to a WebSocket
        self._frames: Frames | None = None  # takes it then
        self._is_over = False  # nothing more will be written

    def write(self, data: bytes) -> None:
        """Sends `data` to the client soon."""
        raise NotImplementedError

    def _answer_next(self) -> None:
        """Answers the first request of `_queue`; called when no other is being answered."""
        raise NotImplementedError

    def abort(self) -> None:
        """Ends the connection now, even in the middle of a request or answer."""
        if self._transport is not None:
            self._transport.abort()

    # Reading

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._doors.incoming

    def buffer_updated(self, count: int) -> None:
        if self._unparsed:
            self._keep_unparsed(self._doors.incoming[:count])  # TLS may still deliver bytes after reading was paused
        elif not self._is_deaf:
            self._parse(self._doors.incoming[:count])
        elif self._frames is not None:
            self._frames.from_client(bytes(self._doors.incoming[:count]))
        elif self._queue and self._queue[-1].opens_websocket:
            self._keep_early(self._doors.incoming[:count])

    def _parse(self, data: memoryview) -> None:
        """Parses one morsel, or one request with its body: one read may bring thousands, and other clients wait."""
        if self._reading is not None:
            self._since = self._doors.loop.time()
        completed = self._completed
        while not self._is_deaf:
            morsel = data if len(data) <= MORSEL else data[: self._bytes_at_once()]
            data = data[len(morsel) :]
            self._parse_morsel(morsel)
            if not data or self._reading is None or self._completed != completed:
                break
        if self._is_deaf:
            if self._queue and self._queue[-1].opens_websocket:
                self._keep_early(data)
            return
        if data:
            self._keep_unparsed(data)
            self._read_on_soon()
        if data or self._has_read_enough():
            self._is_full = True
            self._transport.pause_reading()  # type: ignore[union-attr]

    def _bytes_at_once(self) -> int:
        request = self._reading
        if request is None or request.length is None or request.refusal is not None:
            return MORSEL
        return max(MORSEL, request.length - request.body_size)  # however long, a body belongs to one request

    def _parse_morsel(self, data: memoryview) -> None:
        self._morsel_size = len(data)
        self._unfruitful += len(data)
        while data and not self._is_deaf and self._parser is not None:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._queue and self._queue[-1].opens_websocket:
                    self._keep_early(data)
                    return
                # No other upgrade is made: what follows this head is its body, or the next request.
                self._parser = self._new_parser()
                if self._is_body_unseen and self._reading is not None:
                    self._parser.feed_data(_head_before_the_body_of(self._reading))
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, Exception):
                    raise  # an error in our callbacks, not in what the client sent
                self._refuse_now(errors.bad_request(f"Malformed request ({str(error).rstrip('.').lower()})."))
        if self._unfruitful > self._settings.max_head_bytes and (self._is_in_head or self._reading is not None):
            self._refuse_now(errors.head_too_large(self._settings.max_head_bytes))

    def _has_read_enough(self) -> bool:
        count = len(self._queue)
        return count > MAX_PIPELINED or (count > 1 and sum(r.held for r in self._queue) > MAX_READ_AHEAD)

    def _keep_unparsed(self, data: memoryview) -> None:
        self._unparsed += data
        self._doors.buffered += len(data)

    def _keep_early(self, data: memoryview) -> None:
        """Keeps what follows the opening of a WebSocket until that is answered; more is not read meanwhile."""
        if data and not self._is_over:
            self._keep_unparsed(data)
            self._transport.pause_reading()  # type: ignore[union-attr]

    def _read_on_soon(self) -> None:
        if not self._reads_on_soon:
            self._reads_on_soon = True
            self._doors.soon(self, self._read_on)

    def _read_on(self) -> None:
        """Parses what was already read, then resumes reading, unless enough requests still wait for an answer."""
        self._reads_on_soon = False
        if self._is_over or self._parser is None or self._has_read_enough() or self._transport.is_closing():  # type: ignore[union-attr]
            return
        unparsed, self._unparsed = self._unparsed, b""
        self._doors.buffered -= len(unparsed)
        self._is_full = False
        self._parse(memoryview(unparsed))
        if not self._is_full and not self._unparsed:
            self._transport.resume_reading()  # type: ignore[union-attr]

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        if self._is_body_unseen:
            return  # this head is from `_head_before_the_body_of`
        self._is_in_head = True
        self._since = self._doors.loop.time()
        self._head_room, self._unfruitful = self._morsel_size, 0
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # otherwise it is a trailer, which is dropped
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser, doors, limit = self._parser, self._doors, self._settings.max_head_bytes
        assert parser is not None
        self._is_in_head = False
        if self._is_deaf:
            return
        if self._is_body_unseen:
            self._is_body_unseen = False
            return
        if base := self._settings.base_path:
            self._url = _without(base.encode(), self._url)
        request = Request(parser.get_method(), self._url, parser.get_http_version(), doors.loop.time())
        request.keeps_alive = parser.should_keep_alive()
        self._reading = request
        try:
            if self._head_room + self._unfruitful > limit and self._head_size() > limit:
                raise errors.head_too_large(limit)
            read_head(request, self._headers, self._peer)
            self._is_body_unseen = bool(parser.should_upgrade() and (request.is_chunked or request.length))
            if request.length is not None and request.length > self._settings.max_body_bytes:
                raise errors.body_too_large(self._settings.max_body_bytes)
            doors.server.check(request)
            if self._queue:
                self._hold_behind_others(request)
        except ServeError as error:
            self._refuse_head(request, error)
        else:
            self._body_time = 0.0
            if request.expects_continue and not self._queue:
                self.write(CONTINUE)

    def _hold_behind_others(self, request: Request) -> None:
        self._count_head(request)
        if self._doors.is_full and not self._doors.make_room(request.owner):
            raise errors.buffers_full()

    def _count_head(self, request: Request) -> None:
        request.held = HEAD_COST + len(request.target) + len(request.fields)
        self._doors.buffered += request.held

    def _head_size(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def on_body(self, data: bytes) -> None:
        self._unfruitful = 0
        request = self._reading
        if request is None or request.refusal is not None:
            return
        if request.body and len(request.body[-1]) < LEAST_PIECE:
            request.body[-1] += data
        else:
            request.body.append(data)
        request.body_size += len(data)
        request.held += len(data)
        self._doors.buffered += len(data)
        if request.body_size > self._settings.max_body_bytes:
            self._refuse_now(errors.body_too_large(self._settings.max_body_bytes))
        elif self._doors.is_full and not self._doors.make_room(request.owner):
            self._refuse_now(errors.buffers_full())

    def on_message_complete(self) -> None:
        if self._reading is None or self._is_deaf or self._is_body_unseen:
            return
        request, self._reading = self._reading, None
        self._completed += 1
        self._is_deaf = not request.keeps_alive
        self._queue.append(request)
        if len(self._queue) == 1:
            self._answer_next()

    # Refusing

    def _refuse_head(self, request: Request, error: ServeError) -> None:
        """Refuses a request after its head; a short body is still read, so that the connection stays usable."""
        is_short = not request.is_chunked and (request.length or 0) <= MAX_SWALLOWED
        if error.closes or not is_short or request.expects_continue:
            self._refuse_now(error)
        else:
            request.refusal = error
            if self._queue and not request.held:
                self._count_head(request)  # it waits in the queue like any other

    def _refuse_now(self, error: ServeError) -> None:
        """Refuses what is being read and stops reading: where it ends is unknown, or not worth waiting for."""
        if self._is_deaf:
            return
        request = self._reading or Request(b"-", b"", "1.1", self._doors.loop.time(), address=self._peer.address)
        request.id = request.id or new_request_id()
        request.refusal = error
        self.release(request)
        self._is_in_head, self._is_deaf, self._reading = False, True, None
        self._queue.append(request)
        if len(self._queue) == 1:
            self._answer_next()

    # Memory

    def held(self) -> Iterator[tuple[str | bytes, int]]:
        """The owner of each request on this connection, and the bytes held for that request."""
        for request in self._queue:
            yield request.owner, request.held
        if self._reading is not None:
            yield self._reading.owner, self._reading.held

    @property
    def is_reading_body(self) -> bool:
        return self._reading is not None and self._reading.refusal is None

    def release(self, request: Request) -> None:
        """Frees the request's body, which will not be sent again."""
        self._doors.buffered -= request.held
        request.held = 0
        request.body.clear()

    def _drop_requests(self) -> None:
        """Frees all requests: nothing more will be answered here."""
        for request in self._queue:
            self.release(request)
        self._queue.clear()
        if self._reading is not None:
            self.release(self._reading)
            self._reading = None
        self._doors.buffered -= len(self._unparsed)
        self._unparsed = b""

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # Without this, bytes after a request with `Connection: close` are an error; we ignore them.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser


def _without(base: bytes, target: bytes) -> bytes:
    """The target without that beginning of its path, if it has it."""
    rest = target.removeprefix(base)
    return rest if rest[:1] in (b"/", b"?") and len(rest) < len(target) else target


def _head_before_the_body_of(request: Request) -> bytes:
    """A head that makes a new parser read the body of `request`, whose real head another parser has read."""
    framing = b"Transfer-Encoding: chunked" if request.is_chunked else b"Content-Length: %d" % (request.length or 0)
    return b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing
