"""HTTP/1.1 client for the replicas: one connection, and the exchange in progress on it."""

import asyncio
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import httptools

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.relay.acknowledged import acknowledged, never_arrived
from balancer.relay.places import Place
from balancer.relay.receiver import FrameReceiver, Headers, Receiver, Unwanted
from balancer.relay.vanished import NEAR, expect_life, has_vanished_nearby, is_of_the_host

if TYPE_CHECKING:
    from balancer.relay.pool import ConnectionPool

SWITCHING = 101
HANDSHAKE = 1  # what TCP's handshake counts among the bytes acknowledged
LARGEST_HEAD: Final = 64 << 10  # bytes of header fields, or of anything else that arrives without any part of a body
COPIED: Final = 16 << 10  # up to this many bytes, copying a body behind the head is cheaper than sending it by itself


class ReplicaConnection(asyncio.Protocol):
    """One TCP connection to a replica. It carries one exchange at a time, for the request that holds `place`."""

    def __init__(self, pool: "ConnectionPool", replica: ReplicaAddress) -> None:
        self.replica = replica
        self.place: Place | None = None
        self.sent_at = self.last_byte_at = self.idle_since = 0.0
        self.connected_in = 0.0  # seconds
        # How long the replica had been away when the request was sent, and when the last bytes came (`heard_at`).
        self.sent_away = self.heard_away = self.heard_at = 0.0
        self.is_paused = False
        self.has_answered = False  # any byte of an answer to the current request has arrived
        self.has_head = False
        self.has_begun = False  # part of the body has arrived, too
        self.lost_host = False  # it ended because the replica's whole host had gone
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._frames: FrameReceiver | None = None  # once the connection carries a WebSocket
        self._outcome: asyncio.Future[Outcome] | None = None
        self._headers: Headers = []
        self._sent = HANDSHAKE  # bytes sent, as `acknowledged` counts them
        self._sent_before = 0  # the same without the current request
        self._unfruitful = 0  # bytes received since the request was sent, or since the last read with part of a body
        self._is_interim = False
        self._has_no_body = False
        self._ends_with_connection = False
        self._can_be_kept = False

    async def exchange(
        self, place: Place, head: bytes, body: Sequence[bytes], is_head: bool, receiver: Receiver
    ) -> Outcome:
        """Sends one request, whose body is in pieces, and feeds its answer to `receiver`.

        A request of which the replica acknowledged nothing before it closed the connection was refused, not lost.
        If the exchange is cancelled or fails, it closes the connection, which makes SGLang abort the request.
        """
        if self._transport is None or self._transport.is_closing():
            return Outcome.REFUSED
        self.has_answered = self.has_head = self.has_begun = self._can_be_kept = False
        self._has_no_body = is_head
        self._unfruitful = 0
        self.place = place
        self._receiver = receiver
        self._outcome = self._pool.loop.create_future()
        self.sent_at = self.last_byte_at = self.heard_at = self._pool.loop.time()
        self.sent_away = self.heard_away = place.away(self.sent_at)
        self._pool.busy.add(self)
        if self.replica.is_https:  # what TLS makes of it is longer
            self._sent = acknowledged(self._transport.get_extra_info("socket")) or 0
        self._sent_before = self._sent
        if len(body) == 1 and len(body[0]) <= COPIED:
            whole = head + body[0]
            self._sent += len(whole)
            self._transport.write(whole)
        else:
            self._sent += len(head) + sum(map(len, body))
            self._transport.writelines((head, *body))
        try:
            return await self._outcome
        finally:
            self.tell_when_heard()
            self.place = self._receiver = self._outcome = None
            self._pool.busy.discard(self)
            if self._can_be_kept and not self.is_paused and self._transport.get_write_buffer_size() == 0:
                self._pool.keep(self)
            else:
                self._transport.abort()

    def finish(self, outcome: Outcome) -> None:
        """Ends the exchange, if there is one; later bytes are not part of its answer."""
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)
            self._receiver = None

    def tell_when_heard(self) -> None:
        """Reports when the replica's last bytes arrived. Called now and then rather than for every read."""
        if self.place is not None and self.has_answered:
            self.place.heard(self.last_byte_at)

    def _finish_whole(self, receiver: Receiver) -> None:
        is_taken = receiver.on_end(self._pool.loop.time() - self.sent_at)
        self.finish(Outcome.ANSWERED if is_taken else Outcome.BUSY)

    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stops reading for now, because the client is slow."""
        if not self.is_paused and self.is_open():
            self.is_paused = True
            self._transport.pause_reading()  # type: ignore[union-attr]

    def resume(self) -> None:
        if self.is_paused and self.is_open():
            self._transport.resume_reading()  # type: ignore[union-attr]
        self.is_paused = False
        self.last_byte_at = self._pool.loop.time()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        expect_life(transport.get_extra_info("socket"), probes=NEAR)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None or self._parser is None:
            if self._frames is None:
                self.close()  # bytes that belong to no request: the connection is out of step
            else:
                self.last_byte_at = self._pool.loop.time()
                self._frames.on_frames(data, self.last_byte_at)
            return
        self.last_byte_at = self._pool.loop.time()
        self.has_answered = True
        self._unfruitful += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, Exception) and not isinstance(error.__context__, Unwanted):
                raise  # an error in our callbacks, not in what the replica sent
            self._give_up()
        if self._unfruitful > LARGEST_HEAD:
            self._give_up()  # an endless head, or endless interim answers, trailers or chunk extensions

    def _switch(self, early: bytes) -> None:
        """The replica switches protocols, which it may only if asked for a WebSocket; `early` are its first frames."""
        receiver, parser = self._receiver, self._parser
        if self.has_head or not isinstance(receiver, FrameReceiver) or parser.get_status_code() != SWITCHING:  # type: ignore[union-attr]
            self.finish(Outcome.BROKEN if self.has_head else Outcome.MANGLED)
            return
        self._frames, self._parser = receiver, None
        self.has_head = self.has_begun = True
        self._pool.busy.discard(self)  # its silence means nothing
        receiver.on_switch(self._headers, self)
        if early:
            receiver.on_frames(early, self.last_byte_at)

    def send(self, data: bytes) -> None:
        """Sends frames of a WebSocket."""
        if self.is_open():
            self._transport.write(data)  # type: ignore[union-attr]

    def pause_writing(self) -> None:
        if self._frames is not None:
            self._frames.on_slow(True)

    def resume_writing(self) -> None:
        if self._frames is not None:
            self._frames.on_slow(False)

    def look_for_host(self) -> None:
        """Ends the exchange if the replica's host is gone, long before the kernel ends the connection."""
        if self.is_open() and has_vanished_nearby(self._transport.get_extra_info("socket")):  # type: ignore[union-attr]
            self.lost_host = True
            gone = TimeoutError(errno.ETIMEDOUT, "its host does not answer")
            self.finish(Outcome.BROKEN if self.has_head else self._unanswered(gone))

    def _give_up(self) -> None:
        """Ends the exchange: what arrived is not HTTP, too long, or not wanted."""
        self._can_be_kept = False
        self.finish(Outcome.BROKEN if self.has_head else Outcome.MANGLED)

    def eof_received(self) -> None:
        """The replica will send nothing more; asyncio closes the connection."""

    def connection_lost(self, error: Exception | None) -> None:
        self._parser = None  # breaks the reference cycle with the parser
        self._can_be_kept = False
        self.lost_host = self.lost_host or is_of_the_host(error)
        if self._frames is not None:
            self._frames.on_lost()
            self._frames = None
        if self._receiver is not None and self.has_head and self._ends_with_connection and error is None:
            self._finish_whole(self._receiver)
        elif self.has_head:
            self.finish(Outcome.BROKEN)
        else:
            self.finish(self._unanswered(error))

    def _unanswered(self, error: Exception | None) -> Outcome:
        """How an exchange ends whose connection ended before the whole head of an answer."""
        if self.has_answered or self._transport is None or self._outcome is None:
            return Outcome.LOST  # in part of a head, or there is no exchange
        sock = self._transport.get_extra_info("socket")
        return Outcome.REFUSED if never_arrived(sock, self._sent_before, error) else Outcome.LOST

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self._headers = []  # it may contain trailers of the previous message
        if self._receiver is None:
            self._can_be_kept = False  # an answer without a request

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        headers = self._headers
        status = self._parser.get_status_code()
        self._is_interim = 100 <= status < 200
        if self._is_interim or self._receiver is None:
            return
        if self._unfruitful > LARGEST_HEAD and sum(len(n) + len(v) + 4 for n, v in headers) > LARGEST_HEAD:
            self._give_up()
            return
        if status < 100:  # no valid status, and unlike an interim answer it may have a body
            self._can_be_kept = False
            self.finish(Outcome.MANGLED)
            return
        length: int | None = None
        is_chunked = False
        for name, value in headers:
            lowered = name.lower()
            if lowered == b"content-length":
                length = int(value)
            elif lowered == b"transfer-encoding":
                is_chunked = True
        bodiless = self._has_no_body or status in (204, 304)
        self._ends_with_connection = length is None and not is_chunked and not bodiless
        self.has_head = True
        if not self._receiver.on_head(status, headers, length):
            self.finish(Outcome.BUSY)
        elif self._has_no_body:
            # The parser would wait for the body that the head announces, so this connection is not used again.
            self._finish_whole(self._receiver)

    def on_body(self, data: bytes) -> None:
        if self._receiver is not None:
            self.has_begun = True
            self._unfruitful = 0
            self._receiver.on_body(data, self.last_byte_at)

    def on_message_complete(self) -> None:
        if self._is_interim or self._receiver is None:
            return
        self._can_be_kept = self._parser.should_keep_alive()  # type: ignore[union-attr]
        self._finish_whole(self._receiver)

    def __repr__(self) -> str:
        state = "busy" if self.place is not None else "idle" if self.is_open() else "closed"
        return f"<ReplicaConnection to {self.replica.name}: {state}>"
