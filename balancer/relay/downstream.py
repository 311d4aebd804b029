"""Our side towards the clients: strict HTTP/1.1 in, replies out in order, a client that leaves noticed at once."""

import asyncio
from collections import deque
from typing import Protocol

import httptools

from balancer import errors
from balancer.errors import ServeError
from balancer.relay.doors import Doors
from balancer.relay.reply import Reply
from balancer.relay.request import Headers, Peer, Request, new_request_id, read_head
from balancer.relay.vanished import UNACKNOWLEDGED, expect_life, has_vanished

MAX_PIPELINED = 32  # requests read ahead on one connection
MAX_READ_AHEAD = 1 << 20  # bytes that they take
MORSEL = 4 << 10  # bytes parsed at once: some 150 of the smallest heads
HEAD_COST = 1 << 10  # bytes of memory that a request takes beside what it says
LEAST_PIECE = 1 << 10  # bytes of a piece of a body before the next one begins: each costs memory, and time to send
MAX_SWALLOWED = 64 << 10  # of a refused request's body, to keep the connection usable
LINGER = 2.0  # seconds a client has to take its last answer and close, before the connection is cut
MAX_UNSENT = 64 << 10  # bytes that TLS holds for a slow client before its replica is paused, as plain connections do
LOOK = 5.0  # seconds between two looks at whether who waits for an answer is still there
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Source(Protocol):
    """Where a reply's bytes come from, as far as a slow client concerns it."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class ClientConnection(asyncio.BufferedProtocol):
    """One client's connection. Requests may be read ahead; they are answered one after the other."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._settings = doors.settings
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = None
        self._peer = Peer(b"unknown", False, b"http")
        self._url = b""
        self._headers: Headers = []
        self._is_in_head = False
        self._morsel_size = 0  # bytes that are parsed now
        self._head_room = 0  # bytes of the morsel in which the head began: its share of them is at most that
        self._unfruitful = 0  # bytes that came since, or since the last morsel that brought some of a body
        self._unparsed = b""  # what was read when enough was read ahead
        self._is_full = False  # enough is read, so reading is paused
        self._reads_on_soon = False
        self._completed = 0  # requests read whole
        self._reading: Request | None = None  # its head is whole, its body still coming
        self._is_body_unseen = False  # its head asks for another protocol, and the parser would take the body for that
        self._queue: deque[Request] = deque()  # the first one is being answered
        self._task: asyncio.Task[None] | None = None
        self._reply: Reply | None = None
        self._source: Source | None = None
        self._is_deaf = False  # nothing more of what this client sends is listened to
        self._since = 0.0  # of the current wait: for the rest of a head, of a body, or for the next request
        self._is_blocked = False  # the client does not take what we send
        self._sent = 0  # bytes handed to the transport
        self._taken = 0  # bytes of them that had left it at the last look
        self._taken_at = 0.0  # when some last did, or there were none to take; a new client has had no time for it yet
        self._looked_at = 0.0  # whether the client has vanished
        self._unwritten: list[bytes] = []  # waits for the end of this round of the loop
        self._is_over = False  # all is written that ever will be

    # What asyncio tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._parser = self._new_parser()
        address = transport.get_extra_info("peername")
        is_tls = transport.get_extra_info("sslcontext") is not None
        if is_tls:
            transport.set_write_buffer_limits(MAX_UNSENT)  # type: ignore[attr-defined]
        self._peer = Peer.of(address[0] if isinstance(address, tuple) else "", is_tls, self._doors.trusted)
        self._since = self._taken_at = self._doors.loop.time()
        # A slow client is ours to judge, by send_timeout; one that vanished amid its answer is seen to have.
        expect_life(transport.get_extra_info("socket"), max(UNACKNOWLEDGED, self._settings.send_timeout))
        self._doors.connections.add(self)
        origin, limit = self._peer.origin, self._settings.max_connections_per_client
        self._doors.origins[origin] += 1
        if self._doors.origins[origin] > limit and not self._peer.is_trusted:
            self._refuse_now(errors.too_many_connections(limit))
        elif self._doors.is_closed:
            transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._doors.incoming

    def buffer_updated(self, count: int) -> None:
        if self._unparsed:
            self._keep_unparsed(self._doors.incoming[:count])  # TLS may have had more when reading was paused
        elif not self._is_deaf:
            self._parse(self._doors.incoming[:count])

    def eof_received(self) -> None:
        """Who says no more is taken to have left, as every common proxy does.

        asyncio closes the connection when all is sent; who left amid an answer may never take the rest of it.
        """
        if self._task is not None:
            self._transport.abort()  # type: ignore[union-attr]
        else:
            self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._doors.connections.discard(self)
        self._doors.origins[self._peer.origin] -= 1
        if not self._doors.origins[self._peer.origin]:
            del self._doors.origins[self._peer.origin]
        self._parser = None  # it holds this connection, which holds it
        if self._task is not None:
            self._task.cancel()
        self._drop_requests()
        self._unwritten.clear()
        self._source = None

    def pause_writing(self) -> None:
        self._is_blocked = True
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        self._is_blocked = False
        if self._source is not None:
            self._source.resume()
        if self._reply is None:
            self._doors.soon(self, self._answer_next)

    # Reading

    def _parse(self, data: memoryview) -> None:
        """Parses one morsel, or one request with its body; a read may bring thousands, and others wait meanwhile."""
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
        return max(MORSEL, request.length - request.body_size)  # a body is no more than one request, however long

    def _parse_morsel(self, data: memoryview) -> None:
        self._morsel_size = len(data)
        self._unfruitful += len(data)
        while data and not self._is_deaf and self._parser is not None:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                # Nothing is upgraded here: what follows this head is its body, or the next request.
                self._parser = self._new_parser()
                data = data[upgrade.args[0] :]
                if self._is_body_unseen and self._reading is not None:
                    self._parser.feed_data(_head_before_the_body_of(self._reading))
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, Exception):
                    raise  # ours, not the client's
                self._refuse_now(errors.bad_request(f"Malformed request ({str(error).rstrip('.').lower()})."))
        if self._unfruitful > self._settings.max_head_bytes and (self._is_in_head or self._reading is not None):
            self._refuse_now(errors.head_too_large(self._settings.max_head_bytes))

    def _has_read_enough(self) -> bool:
        count = len(self._queue)
        return count > MAX_PIPELINED or (count > 1 and sum(r.held for r in self._queue) > MAX_READ_AHEAD)

    def _keep_unparsed(self, data: memoryview) -> None:
        self._unparsed += data
        self._doors.buffered += len(data)

    def _read_on_soon(self) -> None:
        if not self._reads_on_soon:
            self._reads_on_soon = True
            self._doors.soon(self, self._read_on)

    def _read_on(self) -> None:
        """Parses what was read already, then reads; unless enough waits to be answered."""
        self._reads_on_soon = False
        if self._is_over or self._parser is None or self._has_read_enough() or self._transport.is_closing():  # type: ignore[union-attr]
            return
        unparsed, self._unparsed = self._unparsed, b""
        self._doors.buffered -= len(unparsed)
        self._is_full = False
        self._parse(memoryview(unparsed))
        if not self._is_full:
            self._transport.resume_reading()  # type: ignore[union-attr]

    # What the parser tells us

    def on_message_begin(self) -> None:
        if self._is_body_unseen:
            return  # it is a head of our own
        self._is_in_head = True
        self._since = self._doors.loop.time()
        self._head_room, self._unfruitful = self._morsel_size, 0
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # else it is a trailer, and those are dropped
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
        request = Request(parser.get_method(), self._url, parser.get_http_version(), doors.loop.time())
        request.keeps_alive = parser.should_keep_alive()
        self._reading = request
        try:
            if self._head_room + self._unfruitful > limit and self._head_size() > limit:
                raise errors.head_too_large(limit)
            read_head(request, self._headers, self._peer)
            if self._queue:
                self._hold_behind_others(request)
            self._is_body_unseen = bool(parser.should_upgrade() and (request.is_chunked or request.length))
            if request.length is not None and request.length > self._settings.max_body_bytes:
                raise errors.body_too_large(self._settings.max_body_bytes)
            doors.server.check(request)
        except ServeError as error:
            self._refuse_head(request, error)
        else:
            if request.expects_continue and not self._queue:
                self.write(CONTINUE)

    def _hold_behind_others(self, request: Request) -> None:
        request.held = HEAD_COST + len(request.target) + len(request.fields)
        self._doors.buffered += request.held
        if self._doors.buffered > self._settings.max_buffered_bytes:
            raise errors.buffers_full()

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
        elif self._doors.buffered > self._settings.max_buffered_bytes:
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
        """Refuses at the head; a short body is swallowed, so that the connection stays usable."""
        is_short = not request.is_chunked and (request.length or 0) <= MAX_SWALLOWED
        if error.closes or not is_short or request.expects_continue:
            self._refuse_now(error)
        else:
            request.refusal = error

    def _refuse_now(self, error: ServeError) -> None:
        """Refuses what is being read, and listens no more: where it ends is unknown or not worth waiting for."""
        if self._is_deaf:
            return
        request = self._reading or Request(b"-", b"", "1.1", self._doors.loop.time())
        request.id = request.id or new_request_id()
        request.refusal = error
        self.release(request)
        self._is_in_head, self._is_deaf, self._reading = False, True, None
        self._queue.append(request)
        if len(self._queue) == 1:
            self._answer_next()

    # Answering

    def _answer_next(self) -> None:
        if self._reply is not None or self._is_blocked or not self._queue:
            return
        if self._transport.is_closing():  # type: ignore[union-attr]
            return
        doors, request = self._doors, self._queue[0]
        is_last = doors.facts.is_leaving or doors.is_closed or (self._is_deaf and len(self._queue) == 1)
        keeps_alive = request.keeps_alive and not is_last
        self._reply = reply = Reply(request, self, keeps_alive)
        if request.refusal is not None:
            doors.server.refuse(request, reply, request.refusal)
        else:
            self._task = doors.loop.create_task(doors.server.serve(request, reply, self))

    def write(self, data: bytes) -> None:
        """Sends to the client soon, and in one piece with what else is written until then."""
        if not self._unwritten:
            self._doors.flush_soon(self)
        self._unwritten.append(data)

    def send(self, data: bytes) -> None:
        """Sends to the client now; what it does not take is held, and its reply's source paused."""
        if self._unwritten:
            self._unwritten.append(data)
            data = b"".join(self._unwritten)
            self._unwritten.clear()
        transport = self._transport
        # A replica's bytes may come between a connection's end and its request's; uvloop raises then.
        if transport is not None and not self._is_over and not transport.is_closing():
            self._sent += len(data)
            transport.write(data)

    def flush(self) -> None:
        """Sends what was written."""
        if self._unwritten:
            self.send(b"")

    def take_from(self, source: Source) -> None:
        """The reply's bytes come from `source` now."""
        self._source = source
        if self._is_blocked:
            source.pause()

    def answered(self, keep: bool) -> None:
        """The current reply is over; the next request's turn, or the end of the connection."""
        self._task = self._reply = self._source = None
        if not self._queue:
            return  # the client left in this very moment
        self.release(self._queue.popleft())
        self._since = self._doors.loop.time()
        if self._is_full and not self._has_read_enough():
            self._read_on_soon()
        if not keep or (self._doors.is_closed and not self._queue):
            self._close()
        elif self._queue:
            # Not from here: thousands may wait, and each would be a few calls deeper.
            self._doors.soon(self, self._answer_next)
        elif self._reading is not None and self._reading.expects_continue and self._reading.refusal is None:
            self.write(CONTINUE)

    def release(self, request: Request) -> None:
        """The request's body is not needed any more: it will not be sent again."""
        self._doors.buffered -= request.held
        request.held = 0
        request.body.clear()

    def _drop_requests(self) -> None:
        """Nothing more will be answered here."""
        for request in self._queue:
            self.release(request)
        self._queue.clear()
        if self._reading is not None:
            self.release(self._reading)
            self._reading = None
        self._doors.buffered -= len(self._unparsed)
        self._unparsed = b""

    # Closing

    def check_time(self, now: float) -> None:
        """Ends whatever waits too long on this connection. `now` is the loop's time in seconds."""
        settings, transport = self._settings, self._transport
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if not unsent or self._sent - unsent > self._taken:
            self._taken, self._taken_at = self._sent - unsent, now
        elif now - self._taken_at > settings.send_timeout:
            transport.abort()
            return
        if self._reply is not None and now - self._looked_at > LOOK:
            self._looked_at = now
            if has_vanished(transport.get_extra_info("socket")):
                transport.abort()
                return
        waited, request = now - self._since, self._reading
        if self._is_over:
            if unsent:
                self._since = now
            # Below TLS, what the client has not taken yet is not to be seen.
            elif waited > (LINGER if transport.can_write_eof() else settings.send_timeout):
                transport.abort()
        elif not transport.is_reading():
            return  # that nothing comes is our own doing; should the client leave, the next bytes to it will tell
        elif self._is_in_head:
            if waited > settings.head_timeout:
                self._refuse_now(errors.request_timeout("head", settings.head_timeout))
        elif request is not None:
            if request.expects_continue and self._queue:
                return  # it has not been told to send its body yet
            if waited > settings.body_timeout:
                self._refuse_now(errors.request_timeout("body", settings.body_timeout))
        elif self._queue or unsent:
            self._since = now
        elif waited > settings.keep_alive_timeout:
            self.flush()
            transport.close()

    def abort(self) -> None:
        """Ends the connection now, whatever is under way on it."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        """Closes unless a request is being read or answered."""
        if not self._queue and self._reading is None and not self._is_in_head:
            self.flush()
            self._transport.close()  # type: ignore[union-attr]

    def recognise(self) -> None:
        """Looks anew whether the client is a trusted proxy."""
        self._peer = Peer.of(self._peer.address.decode(), self._peer.scheme == b"https", self._doors.trusted)

    def break_off(self, why: str) -> None:
        """Ends the answer in progress, if any, as broken, or says 503 where none has begun; then the connection."""
        if self._task is not None and self._reply is not None:
            reply, task = self._reply, self._task
            reply.refuse(errors.stream_broken(why) if reply.has_begun else errors.shutting_down())
            task.cancel()
        else:
            self._close()

    def _close(self) -> None:
        """Says that nothing more comes, and leaves the closing to the client.

        Were we to close at once on a client that still sends, its kernel would drop what it has not read of our answer.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or self._is_over:
            return
        self._drop_requests()
        self.flush()
        self._is_deaf = self._is_over = True
        self._since = self._doors.loop.time()
        if transport.can_write_eof():
            transport.write_eof()
            transport.resume_reading()
        else:
            transport.close()

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # What follows a request that said `Connection: close` is ignored; without this it would be an error.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser


def _head_before_the_body_of(request: Request) -> bytes:
    """What makes a new parser read the body of that request, whose head another one has read."""
    framing = b"Transfer-Encoding: chunked" if request.is_chunked else b"Content-Length: %d" % (request.length or 0)
    return b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing
