"""A replica's answer on its way to the client."""

import re
from typing import Final

from balancer.fleet.address import ReplicaAddress
from balancer.observe.record import Record, RequestObserver, Spans
from balancer.relay.continuation.delivered import CUMULATIVE
from balancer.relay.continuation.events import EVENT_END, is_event_stream
from balancer.relay.continuation.keeper import Keeper
from balancer.relay.downstream import ClientConnection
from balancer.relay.failover import SAFE_METHODS
from balancer.relay.held import LARGEST, Held
from balancer.relay.places import Place
from balancer.relay.reply import Reply
from balancer.relay.request import Headers, Request
from balancer.relay.unavailable import FULL_FOR, Unavailable, retry_after

COUNTED_AT_ONCE: Final = 16 << 10  # bytes of a stream counted ahead of keeping them, to save counting at every event


class AnswerRelay:
    """Relays one attempt's answer to the client, piece by piece as it arrives; status, times and counts go to `record`.

    A 503 may only mean that the replica is full, so it is held back until that is known. A short answer that is no
    stream is held back until it is whole: if it breaks off, the client has nothing of it, and the request may be sent
    again. At most `most_kept` bytes of a stream are kept, in case it has to continue on another replica.
    """

    __slots__ = (
        "_client",
        "_counted",
        "_held",
        "_inter_token",
        "_last_at",
        "_most_kept",
        "_observer",
        "_place",
        "_record",
        "_reply",
        "_request",
        "has_begun",
        "kept",
    )

    def __init__(
        self,
        place: Place,
        request: Request,
        reply: Reply,
        record: Record,
        client: ClientConnection,
        observer: RequestObserver,
        most_kept: int = 0,
    ) -> None:
        self._place = place
        self._request = request
        self._reply = reply
        self._record = record
        self._client = client
        self._observer = observer
        self._most_kept = most_kept
        self._counted = 0  # bytes counted as held for `kept`
        self.has_begun = False  # the client has at least the head
        self.kept: Keeper | None = None  # what the client has of a stream that can continue elsewhere
        self._inter_token: Spans | None = None
        self._held: Held | None = None
        self._last_at = 0.0

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        """Four cases: an answer; a 503 with Retry-After; a 503 to a GET or HEAD; any other 503, to be read."""
        record = self._record
        record.replica_status = status
        if status != 503:
            if length is not None and self._is_held_back(headers, length):
                self._held = Held(headers, length)
            else:
                self._begin(status, headers, length)
        elif (seconds := retry_after(headers)) is not None:
            record.full_for = seconds
            return False
        elif self._request.method in SAFE_METHODS:
            return False  # another replica may answer, whatever this 503 means; and one to a HEAD has no body to read
        else:
            self._held = Unavailable(headers, length)
        return True

    def _is_held_back(self, headers: Headers, length: int) -> bool:
        """Is it an answer that makes no difference to the client before it is whole?"""
        if not 0 < length <= LARGEST or self._request.method == b"HEAD":
            return False
        return not any(is_event_stream(value) for name, value in headers if name.lower() == b"content-type")

    def _begin(self, status: int, headers: Headers, length: int | None) -> None:
        own = self._own_fields()
        if 300 <= status < 400:
            headers = _relative_redirects(headers, self._place.replica)
        self._reply.begin(status, headers, length, own)
        self.has_begun = True
        if self._reply.is_event_stream and self._most_kept and self._may_keep(0):
            self.kept = Keeper(self._most_kept, self._request.path in CUMULATIVE)
        else:
            # The replica has the request, and a long answer need not keep a large prompt in memory.
            self._client.release(self._request)
        if self._reply.is_event_stream:
            self._inter_token = self._observer.inter_token(self._place.replica.name)

    @property
    def could_be_kept(self) -> bool:
        """Is it a stream that can continue elsewhere if it is neither too long to be kept, nor was there no room?"""
        return self._most_kept > 0 and self._reply.is_event_stream

    def _own_fields(self) -> bytes:
        """The header lines that say who answers, and why."""
        record = self._record
        own = b"X-Replica-Id: %b\r\n" % self._place.replica.name.encode("latin-1", "replace")
        if self._request.wants_explanation:
            matched = b"" if record.matched is None else b"; matched=%.2f" % record.matched
            own += b"X-Route-Reason: %b%b; attempts=%d; queued=%.3f\r\n" % (
                record.reason.encode(),
                matched,
                record.attempts,
                record.queued,
            )
        return own

    def _may_keep(self, count: int) -> bool:
        """Is there room for `count` more bytes of the stream, and still the request, without which they are no use?"""
        return bool(self._request.body) and self._client.hold(self._request, count)

    def forget(self) -> None:
        """The attempt has failed: gives back the room of an answer that was held back."""
        if self._held is not None:
            self._client.hold(self._request, -min(self._held.size, self._request.held))
            self._held = None

    def _let_go(self, held: Held) -> None:
        """Relays what was held back, like any other answer."""
        self._held = None
        self._begin(self._record.replica_status, held.headers, held.length)
        for piece in held.pieces:
            self.on_body(piece, self._last_at)

    def on_body(self, data: bytes, now: float) -> None:
        if self._held is not None:
            self._last_at = now
            has_room = self._client.hold(self._request, len(data))
            if not self._held.holds(data) or not has_room:
                self._let_go(self._held)
            return
        record = self._record
        if record.first_byte is None:
            record.first_byte = now - record.received_at
            self._place.begun(record.replica_status == 200)
        elif self._inter_token is not None:
            self._inter_token.note(now - self._last_at)
        self._last_at = now
        if (kept := self.kept) is not None:
            size = kept.size + len(data)
            if size > self._counted or kept.held or kept.is_cumulative or not data.endswith(EVENT_END):
                data = self._keep(kept, data)
                if not data:
                    return
            else:  # nearly every event: Keeper.take inlined, because this runs for each of them
                kept.pieces.append(data)
                kept.size = size
        self._reply.body(data)

    def _keep(self, kept: Keeper, data: bytes) -> bytes:
        """Keeps a piece of the stream; returns what the client gets now."""
        data = kept.take(data)
        if kept.size > self._counted:
            more = min(kept.size + COUNTED_AT_ONCE, self._most_kept) - self._counted
            self._counted += more
            if not self._may_keep(more):
                data += kept.give_up()
        if kept.is_over:
            self.kept = None
            self._client.release(self._request)
        return data

    def on_end(self, seconds: float) -> bool:
        record = self._record
        if self._held is not None:
            if isinstance(self._held, Unavailable) and self._held.says_full(self._request.path, seconds):
                record.full_for = FULL_FOR
                return False
            self._let_go(self._held)
        if self.kept is not None and self.kept.held:
            self._reply.body(self.kept.give_up())
        counts = self._reply.tail.counts()
        record.prompt_tokens, record.completion_tokens = counts.prompt, counts.completion
        record.cached_tokens, record.texts = counts.cached, counts.texts
        self._reply.end()
        return True


def _relative_redirects(headers: Headers, replica: ReplicaAddress) -> Headers:
    """Turns a replica's redirects to itself into paths, because clients reach this endpoint and not the replica.

    SGLang redirects /generate/ to /generate with an absolute URL, whose scheme it takes from X-Forwarded-Proto.
    """
    itself = re.compile(rb"\Ahttps?://%b(?=/[^/])" % re.escape(replica.authority))
    return [(name, itself.sub(b"", value) if name.lower() == b"location" else value) for name, value in headers]
