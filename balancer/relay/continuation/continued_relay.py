"""Relays the answer of a replica that continues where another one broke."""

from balancer.observe.record import Record
from balancer.relay.continuation.delivered import CannotContinue
from balancer.relay.continuation.keeper import Keeper
from balancer.relay.continuation.translation import Translation
from balancer.relay.misfit import fits
from balancer.relay.places import Place
from balancer.relay.receiver import Unwanted
from balancer.relay.reply import Reply
from balancer.relay.request import Headers
from balancer.relay.unavailable import FULL_FOR, retry_after


class ContinuedRelay:
    """Gives the client whole events, after a comment that names the new replica; unchanged without a `translation`.

    `body` is a copy of the request's, which is not needed once the replica answers. `refusal` says why the second
    answer cannot follow the first, if it cannot. `has_ended`: the client has all of it, though the replica had more to
    say.
    """

    def __init__(
        self,
        place: Place,
        reply: Reply,
        record: Record,
        translation: Translation | None,
        most: int,
        body: list[bytes],
    ) -> None:
        self._place = place
        self._body = body
        self._reply = reply
        self._record = record
        self._translation = translation
        self._kept = Keeper(most, is_cumulative=True)
        self._has_begun = False
        self.refusal: CannotContinue | None = None
        self.has_ended = False

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        self._body.clear()  # the original may make room for others, and this is counted nowhere
        record = self._record
        record.replica_status = status
        if status == 503:
            record.full_for = retry_after(headers) or FULL_FOR
            return False
        if not fits(status, headers):
            self.refusal = CannotContinue(f"status {status}")
            return False
        record.is_continued = True
        self._reply.body(
            b": continued on %b%b\n\n" % (self._place.replica.name.encode("latin-1", "replace"), self._why())
        )
        return True

    def _why(self) -> bytes:
        """What X-Route-Reason says for an answer that comes from one replica."""
        if not self._reply.request.wants_explanation:
            return b""
        record = self._record
        return b" (%b; attempts=%d; queued=%.3f)" % (record.reason.encode(), record.attempts, record.queued)

    def on_body(self, data: bytes, now: float) -> None:
        record = self._record
        if not self._has_begun:
            self._has_begun = True
            self._place.begun(is_computed=True)
        if record.first_byte is None:
            record.first_byte = now - record.received_at
        try:
            data = self._whole(data)
        except CannotContinue as refusal:
            self.refusal = refusal
            raise Unwanted from None
        if data:
            self._reply.body(data)
        if self._translation is not None and self._translation.is_over:
            self.has_ended = self.on_end(0.0)
            raise Unwanted

    def _whole(self, data: bytes) -> bytes:
        if self._translation is not None:
            return self._translation.take(data)
        return data if self._kept.is_over else self._kept.take(data)

    def on_end(self, seconds: float) -> bool:
        record, reply = self._record, self._reply
        if self._kept.held:
            reply.body(self._kept.give_up())
        counts = reply.tail.counts()
        record.prompt_tokens, record.completion_tokens = counts.prompt, counts.completion
        record.cached_tokens, record.texts = counts.cached, counts.texts
        reply.end()
        return True
