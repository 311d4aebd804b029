"""A WebSocket on its way between a client and a replica: bytes both ways, with an end that both understand."""

import asyncio

from balancer.fleet.outcome import Outcome
from balancer.observe.record import Record, RequestObserver
from balancer.relay.answer_relay import AnswerRelay
from balancer.relay.downstream import ClientConnection
from balancer.relay.frames import BadFrame, FrameReader, close_frame
from balancer.relay.places import Place
from balancer.relay.reply import Reply
from balancer.relay.request import Headers, Request
from balancer.relay.upstream import ReplicaConnection

# Why a WebSocket closes (RFC 6455 section 7.4).
GOING_AWAY, PROTOCOL_ERROR, INTERNAL_ERROR, SERVICE_RESTART = 1001, 1002, 1011, 1012
EVERY = 0.5  # seconds between two looks at each
QUIET = 2.0  # seconds without a byte, after which one whose replica leaves is closed
LONGEST = 30.0  # seconds after which it is closed in any case


class WebSocketRelay(AnswerRelay):
    """Relays one attempt to open a WebSocket: the frames, if the replica switches protocols, or else its answer.

    `idle` gives the seconds without a byte after which it is closed. Frames are not held back: each side is read no
    faster than the other takes what comes.
    """

    __slots__ = ("_at_client", "_at_replica", "_connection", "_idle", "_leaves_since", "_loop", "_moved_at", "_timer")

    def __init__(
        self,
        place: Place,
        request: Request,
        reply: Reply,
        record: Record,
        client: ClientConnection,
        observer: RequestObserver,
        loop: asyncio.AbstractEventLoop,
        idle: float,
    ) -> None:
        super().__init__(place, request, reply, record, client, observer)
        self._loop = loop
        self._idle = idle
        self._connection: ReplicaConnection | None = None
        self._at_client = FrameReader(is_masked=False)  # what the client gets
        self._at_replica = FrameReader(is_masked=True)
        self._moved_at = 0.0
        self._leaves_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    # What the replica's connection tells

    def on_switch(self, headers: Headers, connection: ReplicaConnection) -> None:
        record, now = self._record, connection.last_byte_at
        record.replica_status, record.first_byte = 101, now - record.received_at
        self._place.begun(False)
        self._connection, self._moved_at = connection, now
        self._reply.switch(headers, self._own_fields())
        self.has_begun = True
        self._timer = self._loop.call_later(EVERY, self._look)
        self._client.carry(self)

    def on_frames(self, data: bytes, now: float) -> None:
        if self._reply.is_over:
            return
        self._moved_at = now
        try:
            self._at_client.pass_by(data)
        except BadFrame:
            self.close(INTERNAL_ERROR, "the replica sent what is no WebSocket")
            return
        self._reply.frames(data)
        self._look_for_the_end()

    def on_slow(self, is_slow: bool) -> None:
        if is_slow:
            self._client.hold_back()
        else:
            self._client.read_on()

    def on_lost(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._at_client.is_closed or self._at_replica.is_closed:
            self._over()
        elif self._at_client.is_between and not self._reply.is_over:
            self._reply.frames(close_frame(INTERNAL_ERROR, "the replica went away"))

    # What the client's connection tells

    def from_client(self, data: bytes) -> None:
        if self._connection is None or self._reply.is_over:
            return
        self._moved_at = self._loop.time()
        self._request.body_size += len(data)
        try:
            self._at_replica.pass_by(data)
        except BadFrame as error:
            self.close(PROTOCOL_ERROR, str(error))
            return
        self._connection.send(data)
        self._look_for_the_end()

    # The end

    def _look_for_the_end(self) -> None:
        if self._at_client.is_closed and self._at_replica.is_closed:
            self._over()  # now, or a client that is quicker than its replica looks as if it had left

    def close(self, code: int, why: str) -> None:
        """Closes it towards both sides, unless one of them is amid a frame; that one's connection just ends."""
        if self._connection is None or self._reply.is_over:
            return
        if self._at_client.is_between and not self._at_client.is_closed:
            self._reply.frames(close_frame(code, why))
        if self._at_replica.is_between and not self._at_replica.is_closed:
            self._connection.send(close_frame(GOING_AWAY, "", is_masked=True))
        self._over()

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            self._connection.finish(Outcome.ANSWERED)
        self._reply.close()

    def _look(self) -> None:
        """Closes it if nothing moves, or if the replica or this process is about to leave."""
        self._timer = self._loop.call_later(EVERY, self._look)
        now = self._loop.time()
        quiet = now - self._moved_at
        if quiet > self._idle:
            self.close(GOING_AWAY, f"nothing came for {self._idle:g} s")
        elif self._place.is_leaving or self._client.is_to_close:
            if self._leaves_since is None:
                self._leaves_since = now
            if quiet >= QUIET or now - self._leaves_since >= LONGEST:
                self.close(SERVICE_RESTART, "this server is about to stop: connect again")
        else:
            self._leaves_since = None
