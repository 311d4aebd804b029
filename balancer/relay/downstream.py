"""Our side towards the clients: replies go out in order, a client that leaves is noticed at once, every wait ends."""

import asyncio
from typing import Final, Protocol

from balancer import errors
from balancer.errors import ServeError
from balancer.relay.doors import Doors
from balancer.relay.reply import Reply
from balancer.relay.request import Peer, Request
from balancer.relay.request_reader import CONTINUE, Frames, RequestReader
from balancer.relay.vanished import UNACKNOWLEDGED, expect_life, has_vanished

HELD_SHARE: Final = 0.5  # share of max_buffered_bytes: above it no more of a stream is kept: new requests need room
LINGER = 2.0  # seconds that a client has to take its last answer and close before the connection is aborted
MAX_UNSENT = 64 << 10  # bytes that TLS buffers for a slow client before its replica is paused, as many as plain TCP
LONGEST_TICK = 1.0  # seconds counted between two checks at most: if more passed, this process was stalled
LEAST_RATE = 1 << 10  # bytes per second that a body must average after SLOW_START
SLOW_START = 30.0  # seconds
GOING_AWAY = 1001  # why a WebSocket closes (RFC 6455 section 7.4)
LOOK = 5.0  # seconds between two checks whether a client that waits for an answer is still there


class Pausable(Protocol):
    """The source of a reply's bytes, which is paused while the client is slow."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class ClientConnection(RequestReader):
    """One client's connection. Requests may be read ahead; they are answered one after the other.

    The states of a connection. It is idle until a head begins (`_is_in_head`); a body follows (`_reading`). A whole
    request goes to the end of `_queue`; the first one there is being answered (`_reply`, and `_task` unless it was
    refused). Meanwhile reading goes on, unless enough requests wait already (`_is_full`); the answer's source is paused
    while the client takes nothing (`_is_blocked`). After its last request, or a refusal after which nothing can be
    read, the connection ignores all input (`_is_deaf`), but requests in the queue are still answered. Then it is over
    (`_is_over`): the client has a moment to take the rest and close. A client that closes before its answer is whole
    ends everything at once (`connection_lost`).
    """

    def __init__(self, doors: Doors) -> None:
        super().__init__(doors)

        # The answer in progress
        self._task: asyncio.Task[None] | None = None
        self._reply: Reply | None = None
        self._source: Pausable | None = None

        # What is sent, and whether the client takes it
        self._unwritten: list[bytes] = []  # sent at the end of this round of the loop
        self._is_blocked = False  # the client does not take what we send
        self._sent = 0  # bytes handed to the transport
        self._taken = 0  # bytes of those that had left it at the last check
        self._taken_at = 0.0  # when some last did, or none were waiting; at first, when the client connected
        self._looked_at = 0.0  # when we last checked whether the client has vanished
        self._checked_at = 0.0

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
        # The kernel must not end a slow client before send_timeout does; `check_time` notices one that vanished.
        expect_life(transport.get_extra_info("socket"), max(UNACKNOWLEDGED, self._settings.send_timeout))
        self._doors.connections.add(self)
        origin, limit = self._peer.origin, self._settings.max_connections_per_client
        self._doors.origins[origin] += 1
        here, elsewhere = self._doors.origins[origin], self._doors.origins_elsewhere.get(origin, 0)
        if here + elsewhere > limit and not self._peer.is_trusted:
            self._refuse_now(errors.too_many_connections(limit))
        elif self._doors.is_closed:
            transport.close()

    def eof_received(self) -> None:
        """A client that sends EOF counts as gone, as it does for every common proxy.

        asyncio would close the connection once all is sent, but a client that left mid-answer may never take the rest.
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
        self._parser = None  # it refers to this connection: a reference cycle
        if self._task is not None:
            self._task.cancel()
        self._drop_requests()
        self._unwritten.clear()
        self._source = self._frames = None

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
        """Sends to the client soon, in one piece with whatever else is written until then."""
        if not self._unwritten:
            self._doors.flush_soon(self)
        self._unwritten.append(data)

    def send(self, data: bytes) -> None:
        """Sends to the client now; what it does not take is buffered, and the reply's source paused."""
        if self._unwritten:
            self._unwritten.append(data)
            data = b"".join(self._unwritten)
            self._unwritten.clear()
        transport = self._transport
        # A replica's bytes may arrive after this connection has ended and before its request has; uvloop would raise.
        if transport is not None and not self._is_over and not transport.is_closing():
            self._sent += len(data)
            transport.write(data)

    def flush(self) -> None:
        """Sends what was written."""
        if self._unwritten:
            self.send(b"")

    def take_from(self, source: Pausable) -> None:
        """The reply's bytes come from `source` now."""
        self._source = source
        if self._is_blocked:
            source.pause()

    def carry(self, frames: Frames) -> None:
        """From now on the connection carries a WebSocket: `frames` gets what the client sends."""
        self._frames = frames
        early, self._unparsed = self._unparsed, b""
        self._doors.buffered -= len(early)
        self.read_on()
        if early:
            frames.from_client(early)

    def hold_back(self) -> None:
        """Reads nothing from the client of a WebSocket for now: its replica is slow."""
        if self._transport is not None and not self._is_over and self._transport.is_reading():
            self._transport.pause_reading()

    def read_on(self) -> None:
        if self._transport is not None and not self._is_over and not self._transport.is_reading():
            self._transport.resume_reading()

    @property
    def is_to_close(self) -> bool:
        """Is this process about to stop?"""
        return self._doors.facts.is_leaving or self._doors.is_closed

    def answered(self, keep: bool) -> None:
        """The current reply is over: starts the next request, or ends the connection."""
        self._task = self._reply = self._source = self._frames = None
        if not self._queue:
            return  # the client has just left
        self.release(self._queue.popleft())
        self._since = self._doors.loop.time()
        if self._is_full and not self._has_read_enough():
            self._read_on_soon()
        if not keep or (self._doors.is_closed and not self._queue):
            self._close()
        elif self._queue:
            # Not called directly: thousands may wait, and each would be a few calls deeper in the stack.
            self._doors.soon(self, self._answer_next)
        elif self._reading is not None and self._reading.expects_continue and self._reading.refusal is None:
            self.write(CONTINUE)

    def hold(self, request: Request, count: int) -> bool:
        """Counts `count` more bytes as kept with the request, fewer if negative; False if there is no room for them."""
        if not self._queue or self._queue[0] is not request:
            return False  # the request is over
        request.held += count
        self._doors.buffered += count
        doors = self._doors
        return doors.buffered + doors.buffered_elsewhere <= self._settings.max_buffered_bytes * HELD_SHARE

    # Closing

    def check_time(self, now: float) -> None:
        """Ends whatever waits too long on this connection. `now` is the loop's time in seconds.

        In this order: a client that takes nothing of what is sent; one that vanished; one that does not close after its
        last answer; a head or a body that does not arrive; an idle connection.
        """
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
        since_last, self._checked_at = min(now - self._checked_at, LONGEST_TICK), now
        waited, request = now - self._since, self._reading
        if self._is_over:
            if unsent:
                self._since = now
            # With TLS, we cannot see what the client has not taken yet.
            elif waited > (LINGER if transport.can_write_eof() else settings.send_timeout):
                transport.abort()
        elif not transport.is_reading():
            return  # nothing arrives because we paused reading; if the client leaves, the next write to it will fail
        elif self._is_in_head:
            if waited > settings.head_timeout:
                self._refuse_now(errors.request_timeout("head", settings.head_timeout))
        elif request is not None:
            if request.expects_continue and self._queue:
                return  # the client still waits for our 100 Continue before it sends the body
            self._body_time += since_last
            is_slow = self._body_time > SLOW_START + request.body_size / LEAST_RATE
            if waited > settings.body_timeout or is_slow:
                self._refuse_now(errors.request_timeout("body", settings.body_timeout))
        elif self._queue or unsent:
            self._since = now
        elif waited > settings.keep_alive_timeout:
            self.flush()
            transport.close()

    def give_way(self) -> bool:
        """Frees memory. Refuses the request being read; else the one whose answer has not begun; else the largest that
        waits behind an answer. Failing these, drops what is kept of the request whose answer is in progress.

        Returns False if there is nothing to free.
        """
        reply, task = self._reply, self._task
        if self.is_reading_body:
            self._refuse_now(errors.buffers_full())
        elif reply is not None and task is not None and reply.is_awaited:
            self._refuse_in_progress(reply, task, errors.buffers_full())
        elif (waiting := self._largest_waiting()) is not None:
            waiting.refusal = errors.buffers_full()
            self.release(waiting)
        elif reply is not None and self._queue[0].body:
            self.release(self._queue[0])  # its answer is in progress; if it breaks, it cannot continue elsewhere
        else:
            return False
        return True

    def _largest_waiting(self) -> Request | None:
        """The one of the requests whose turn has not come that holds most, if any has a body."""
        largest: Request | None = None
        for request in self._queue:
            is_answered = self._reply is not None and request is self._queue[0]
            if request.body and not is_answered and (largest is None or request.held > largest.held):
                largest = request
        return largest

    def _refuse_in_progress(self, reply: Reply, task: asyncio.Task[None], error: ServeError) -> None:
        """Ends the answer in progress with `error`, by which it may be broken off."""
        if reply.is_taken:
            reply.refuse(error)
        else:  # it came in this round of the loop: its task, cancelled before its first step, never runs
            self._doors.server.refuse(reply.request, reply, error)
        task.cancel()

    def close_if_idle(self) -> None:
        """Closes unless a request is being read or answered."""
        if not self._queue and self._reading is None and not self._is_in_head:
            self.flush()
            self._transport.close()  # type: ignore[union-attr]

    def recognise(self) -> None:
        """Checks again whether the client is a trusted proxy."""
        self._peer = Peer.of(self._peer.address.decode(), self._peer.scheme == b"https", self._doors.trusted)

    def break_off(self, why: str) -> None:
        """Ends the answer in progress, if any, as broken, or with a 503 if it has not begun; then the connection."""
        if self._task is not None and self._reply is not None:
            reply, task = self._reply, self._task
            if self._frames is not None:
                self._frames.close(GOING_AWAY, why)
            error = errors.shutting_down() if reply.is_awaited else errors.stream_broken(why)
            self._refuse_in_progress(reply, task, error)
        else:
            self._close()

    def _close(self) -> None:
        """Sends EOF and leaves it to the client to close.

        If we closed at once on a client that still sends, its kernel would drop what it has not read of our answer.
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

    def __repr__(self) -> str:
        states = {
            "over": self._is_over,
            "deaf": self._is_deaf,
            "full": self._is_full,
            "blocked": self._is_blocked,
            "reading a head": self._is_in_head,
            "reading a body": self._reading is not None,
            f"{len(self._queue)} to answer": bool(self._queue),
        }
        said = ", ".join(name for name, is_so in states.items() if is_so) or "idle"
        return f"<ClientConnection of {self._peer.address.decode()}: {said}>"
