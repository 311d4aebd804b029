"""Our HTTP/1.1 side towards the replicas: one exchange on one connection, and the pool of idle connections."""

import asyncio
import enum
import functools
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

import httptools

from balancer.fleet.dial import Dialer
from balancer.fleet.member import Member
from balancer.relay.vanished import expect_life
from balancer.spec.settings import Settings

Headers = list[tuple[bytes, bytes]]

# A reused connection that closes within a round trip after a request was sent on it was closing already, and nobody
# read that request. It takes as long as making the connection did, and in seconds no less and no more than these.
LEAST_ROUND_TRIP = 0.05
MOST_ROUND_TRIP = 0.5
LARGEST_HEAD = 64 << 10  # bytes of a replica's fields, and of all else that comes without any of a body
COPIED = 16 << 10  # bytes of a body that are sooner copied behind the head than sent beside it


class Outcome(enum.Enum):
    """How one attempt at one member ended."""

    ANSWERED = "answered"  # a whole answer was relayed
    REFUSED = "refused"  # no connection, or it was gone before anything was sent
    UNREACHED = "unreached"  # no connection within connect_timeout
    UNKNOWN = "unknown"  # no connection, because nobody says where the member is
    LOST = "lost"  # sent, and the connection ended before the first byte of an answer
    BUSY = "busy"  # the replica said that it is full
    SILENT = "silent"  # no byte of a body within first_byte_timeout
    MANGLED = "mangled"  # what came was not HTTP, and nothing of it was relayed
    BROKEN = "broken"  # ended or went wrong amid the answer
    STALLED = "stalled"  # nothing amid the answer, and for idle_timeout no sign of life from the replica
    STUCK = "stuck"  # nothing amid the answer for first_byte_timeout, though the replica lives


class Answer(Protocol):
    """Whoever takes a replica's answer as it comes."""

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        """The head, with the body's length in bytes or None. False: the rest is not wanted."""

    def on_body(self, data: bytes) -> None: ...

    def on_end(self, seconds: float) -> bool:
        """It is whole, so long after the request was sent. False: it says that the replica is full."""


class ReplicaConnection(asyncio.Protocol):
    """One TCP connection to a member; it carries one exchange at a time."""

    def __init__(self, pool: "Pool", member: Member) -> None:
        self.member = member
        self.sent_at = self.last_byte_at = self.idle_since = 0.0
        self.connected_in = 0.0  # seconds
        self.is_paused = False
        self.has_answered = False  # any byte of an answer to the current request
        self.has_head = False
        self.has_begun = False  # the body, too
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._outcome: asyncio.Future[Outcome] | None = None
        self._headers: Headers = []
        self._unfruitful = 0  # bytes that came since, or since the last read that brought some of a body
        self._is_interim = False
        self._has_no_body = False
        self._ends_with_connection = False
        self._can_be_kept = False

    async def exchange(self, head: bytes, body: Sequence[bytes], is_head: bool, answer: Answer) -> Outcome:
        """Sends one request, whose body is in pieces, and feeds its answer to `answer`.

        Cancelled or broken, it closes the connection: that is how SGLang learns to abort.
        """
        if self._transport is None or self._transport.is_closing():
            return Outcome.REFUSED
        self.has_answered = self.has_head = self.has_begun = self._can_be_kept = False
        self._has_no_body = is_head
        self._unfruitful = 0
        self._answer = answer
        self._outcome = self._pool.loop.create_future()
        self.sent_at = self.last_byte_at = self._pool.loop.time()
        self._pool.busy.add(self)
        if len(body) == 1 and len(body[0]) <= COPIED:
            self._transport.write(head + body[0])
        else:
            self._transport.writelines((head, *body))
        try:
            return await self._outcome
        finally:
            self._answer = self._outcome = None
            self._pool.busy.discard(self)
            if self._can_be_kept and not self.is_paused and self._transport.get_write_buffer_size() == 0:
                self._pool.keep(self)
            else:
                self._transport.abort()

    def finish(self, outcome: Outcome) -> None:
        """Ends the exchange, if one is going on; whatever comes after is not part of its answer."""
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)
            self._answer = None

    def _finish_whole(self, answer: Answer) -> None:
        is_taken = answer.on_end(self._pool.loop.time() - self.sent_at)
        self.finish(Outcome.ANSWERED if is_taken else Outcome.BUSY)

    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def was_closing(self) -> bool:
        """Asked just when it was lost: did its end cross with the request that was sent on it?"""
        round_trip = min(max(self.connected_in, LEAST_ROUND_TRIP), MOST_ROUND_TRIP)
        return self._pool.loop.time() - self.sent_at < round_trip

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """The client is slow: read no more for now."""
        if not self.is_paused and self.is_open():
            self.is_paused = True
            self._transport.pause_reading()  # type: ignore[union-attr]

    def resume(self) -> None:
        if self.is_paused and self.is_open():
            self._transport.resume_reading()  # type: ignore[union-attr]
        self.is_paused = False
        self.last_byte_at = self._pool.loop.time()

    # What asyncio tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        expect_life(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._parser is None:
            self.close()  # bytes that nobody asked for: the connection is out of step
            return
        self.last_byte_at = self.member.last_byte_at = self._pool.loop.time()
        self.has_answered = True
        self._unfruitful += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.finish(Outcome.BROKEN if self.has_head else Outcome.MANGLED)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, Exception):
                raise  # ours, not the replica's
            self._give_up()
        if self._unfruitful > LARGEST_HEAD:
            self._give_up()  # a head, interim answers, trailers or a chunk's extensions without end

    def _give_up(self) -> None:
        """What came is no HTTP, or more of it than anybody means."""
        self._can_be_kept = False
        self.finish(Outcome.BROKEN if self.has_head else Outcome.MANGLED)

    def eof_received(self) -> None:
        """The replica said all it will say; asyncio closes the connection."""

    def connection_lost(self, error: Exception | None) -> None:
        self._parser = None  # it holds this connection, which holds it
        self._can_be_kept = False
        if self._answer is not None and self.has_head and self._ends_with_connection and error is None:
            self._finish_whole(self._answer)
        elif self.has_head:
            self.finish(Outcome.BROKEN)
        else:
            self.finish(Outcome.MANGLED if self.has_answered else Outcome.LOST)

    # What the parser tells us

    def on_message_begin(self) -> None:
        self._headers = []  # there may be trailers of the one before
        if self._answer is None:
            self._can_be_kept = False  # it says more than it was asked

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        headers = self._headers
        status = self._parser.get_status_code()
        self._is_interim = 100 <= status < 200
        if self._is_interim or self._answer is None:
            return
        if self._unfruitful > LARGEST_HEAD and sum(len(n) + len(v) + 4 for n, v in headers) > LARGEST_HEAD:
            self._give_up()
            return
        if status < 100:  # none that there is, and unlike an interim answer it may have a body
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
        if not self._answer.on_head(status, headers, length):
            self.finish(Outcome.BUSY)
        elif self._has_no_body:
            # The parser would wait for the body that the head announces; this connection ends here.
            self._finish_whole(self._answer)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self.has_begun = True
            self._unfruitful = 0
            self._answer.on_body(data)

    def on_message_complete(self) -> None:
        if self._is_interim or self._answer is None:
            return
        self._can_be_kept = self._parser.should_keep_alive()  # type: ignore[union-attr]
        self._finish_whole(self._answer)


class Pool:
    """The idle and the busy connections to all members.

    Idle ones are used newest first and closed before SGLang would close them. `doubt` is called, and called again, with
    a member one of whose answers is silent, `tls` is for https members, `dialer` connects to all.
    """

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        doubt: Callable[[Member], None],
        tls: ssl.SSLContext | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.doubt = doubt
        self.tls = tls
        self._dialer = dialer or Dialer()
        self.busy: set[ReplicaConnection] = set()
        self._idle: dict[Member, list[ReplicaConnection]] = {}

    def idle_connection(self, member: Member) -> ReplicaConnection | None:
        """An open connection that waits for work, or None."""
        idle = self._idle.get(member)
        oldest = self.loop.time() - self.settings.upstream_keep_alive
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.is_open():
                return connection
            connection.close()
        return None

    async def connect(self, member: Member) -> ReplicaConnection:
        """A new connection.

        Raises OSError when refused, TimeoutError after connect_timeout, Unresolved when nobody says where it is.
        """
        addresses = await self._dialer.addresses(member)
        tls = (self.tls or ssl.create_default_context()) if member.is_https else None
        make = functools.partial(ReplicaConnection, self, member)
        began_at = self.loop.time()
        connection = await self._dialer.connect(member, addresses, make, tls, self.settings.connect_timeout)
        connection.connected_in = self.loop.time() - began_at
        return connection

    def keep(self, connection: ReplicaConnection) -> None:
        connection.idle_since = self.loop.time()
        self._idle.setdefault(connection.member, []).append(connection)

    def forget(self, member: Member) -> None:
        """The member left: no idle connection to it is used again. Busy ones go on to their end."""
        for connection in self._idle.pop(member, ()):
            connection.close()

    def sweep(self, now: float) -> None:
        """Ends what waited too long; call it a few times a second. `now` is the loop's time in seconds."""
        settings = self.settings
        for member, idle in list(self._idle.items()):
            while idle and (now - idle[0].idle_since > settings.upstream_keep_alive or not idle[0].is_open()):
                idle.pop(0).close()
            if not idle:
                del self._idle[member]
        for connection in list(self.busy):
            if connection.is_paused:
                continue  # the silence is the client's doing
            if (
                not connection.has_begun
            ):  # a head says little: SGLang sends that of /generate before it looks at the prompt
                if now - connection.sent_at > settings.first_byte_timeout:
                    connection.finish(Outcome.SILENT)
            else:
                self._judge_silence(connection, now)

    def _judge_silence(self, connection: ReplicaConnection, now: float) -> None:
        """Ends an answer that is silent while its replica gives no sign of life, or for far too long."""
        settings, member = self.settings, connection.member
        silence = now - connection.last_byte_at
        lifeless = min(silence, now - member.alive_at)
        if lifeless > settings.idle_timeout:
            connection.finish(Outcome.STALLED)
        elif silence > max(settings.idle_timeout, settings.first_byte_timeout):
            connection.finish(Outcome.STUCK)
        elif lifeless > settings.idle_timeout / 2:
            self.doubt(member)

    def close(self) -> None:
        for member in list(self._idle):
            self.forget(member)

    def __repr__(self) -> str:
        return f"<Pool busy={len(self.busy)} idle={sum(map(len, self._idle.values()))}>"
