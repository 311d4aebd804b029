"""Checks what a generating request may use before it starts, and records what it used once it is over."""

import fnmatch
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from balancer import errors
from balancer.accounts.ledger import Ledger
from balancer.accounts.quota import Lacking, Quota
from balancer.observe.record import CLIENT_LEFT, Record
from balancer.relay.asked import asked, may_stream, most_tokens, names_of_models, prompt_of, with_usage
from balancer.relay.auth import Key, Keys
from balancer.relay.directory import Destination
from balancer.relay.kept_responses import RESPONSES
from balancer.relay.reply import Reply
from balancer.relay.request import Request

# A stream there tells no counts by itself.
COUNTED_IF_ASKED: Final = frozenset(("/v1/chat/completions", "/v1/completions"))
# Assumed until answers have been measured, and the bounds of what is believed of a measurement.
BYTES_PER_TOKEN, LEAST_BYTES, MOST_BYTES = 4.0, 1.0, 16.0
TOKENS_PER_ANSWER = 256.0
FASTEST = 500.0  # tokens a second that one answer grows by at the most
LATEST = 200  # requests that a mean is made of


class Quotas(Protocol):
    """Quotas that another process keeps."""

    def take(self, key: Key, prompt: int, answer: int | None, reply: Reply, record: Record) -> Awaitable[None]:
        """Does what `Meter.take` and `settle` do, once it is awaited."""


class Meter:
    """Holds requests to the limits of their keys. With a `ledger`, notes what each key uses of which model.

    `clock` is the loop's time in seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        keys: Keys | None = None,
        ledger: Ledger | None = None,
        elsewhere: Quotas | None = None,
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._ledger = ledger
        self._elsewhere = elsewhere
        self._keeps_usage = ledger is not None or elsewhere is not None
        self._bytes_per_token = BYTES_PER_TOKEN
        self._tokens_per_answer = TOKENS_PER_ANSWER

    def begin(self, destination: Destination, request: Request, reply: Reply, record: Record) -> Awaitable[None] | None:
        """Raises ServeError for a request that its key does not allow, or not now.

        Returns what else has to be awaited before the request may go on, if anything.
        """
        waits = None
        is_uncounted = request.path in COUNTED_IF_ASKED and destination.settings.count_streams
        if not self._keeps_usage and not (is_uncounted and may_stream(request.body)):
            return None
        said = asked(request.body, request.body_size) if request.body else {}
        if self._keeps_usage:
            named = request.model.decode("latin-1") or said.get("model")
            service = destination.service
            record.model = service.model_of(named) if service is not None else ""
            prompt = prompt_of(request)
            most = most_tokens(request, said, prompt)
            answer = int(self._tokens_per_answer) if most is None else most
            record.unseen = 0 if said.get("stream") is True or request.opens_websocket else answer
            record.prompt_bytes = len(prompt)
            if (key := request.key) is not None:
                if key.models:
                    _check_models(key, request, destination, record.model)
                if key.quota is not None:
                    waits = self._take(key, most, reply, record)
        if is_uncounted:
            reply.hides_usage = said.get("stream") is True and with_usage(request, said)
        return waits

    def _take(self, key: Key, most: int | None, reply: Reply, record: Record) -> Awaitable[None] | None:
        quota = key.quota
        assert quota is not None
        sizes = (record.prompt_bytes, most) if quota.counts_tokens else (0, 0)
        if self._elsewhere is not None:
            return self._elsewhere.take(key, *sizes, reply, record)
        tokens, lacking, at = self.take(quota, *sizes)
        settle(tokens, lacking, at, quota.fields(), reply, record)
        return None

    def take(self, quota: Quota, prompt: int, answer: int | None) -> tuple[int, Lacking | None, float]:
        """Takes what a request will probably use, by the bytes of its prompt and the most tokens that it asks for.

        Returns how many tokens that is, what is lacking for it, if anything, and the time.
        """
        tokens, now = 0, self._clock()
        if quota.counts_tokens:
            tokens = int(prompt / self._bytes_per_token)
            tokens += int(self._tokens_per_answer) if answer is None else answer
        return tokens, quota.take(tokens, now), now

    def finished(self, record: Record) -> None:
        """Settles what the request took, and notes what it used. Called some time after its end."""
        if not record.model or self._ledger is None:
            return
        prompt, completion = record.prompt_tokens, record.completion_tokens
        if prompt is None and completion is None and record.path == RESPONSES and _is_answered(record):
            # With `background: true` it is made after this answer, and nobody counts it then.
            prompt = int(record.prompt_bytes / self._bytes_per_token)
            completion = max(record.unseen, record.reserved - prompt)
        elif prompt is None and not completion and record.status == CLIENT_LEFT and record.attempts:
            # What its replica had made by then is unknown: else who always left just before the end would pay nothing.
            prompt = int(record.prompt_bytes / self._bytes_per_token)
            completion = min(record.unseen, int((record.duration - record.queued) * FASTEST))
        elif prompt is None:  # the client or the replica left: what was delivered counts, with its prompt
            prompt = int(record.prompt_bytes / self._bytes_per_token) if completion else 0
        elif prompt:
            self._learn(record.bytes_in / prompt, completion)
        used = prompt + (completion or 0)
        if record.reserved and self._keys is not None and (key := self._keys.named(record.key)) and key.quota:
            key.quota.give_back(record.reserved - used, record.reserved_at)
        is_failed = not _is_answered(record)
        self._ledger.note(record.key, record.model, 1, is_failed, prompt, completion or 0, record.cached_tokens or 0)

    def _learn(self, bytes_per_token: float, completion: int | None) -> None:
        if LEAST_BYTES <= bytes_per_token <= MOST_BYTES:  # outside of that, most of the body is an image
            self._bytes_per_token += (bytes_per_token - self._bytes_per_token) / LATEST
        if completion:
            self._tokens_per_answer += (completion - self._tokens_per_answer) / LATEST


def _is_answered(record: Record) -> bool:
    return record.status < 400 and not record.error


def settle(tokens: int, lacking: Lacking | None, at: float, fields: bytes, reply: Reply, record: Record) -> None:
    """Notes what was taken for a request, and when; raises ServeError if something was lacking."""
    reply.extra_fields += fields
    if lacking is not None:
        record.model = ""  # it used nothing
        raise errors.rate_limited(lacking.what, lacking.limit, lacking.wait)
    record.reserved, record.reserved_at = tokens, at


def _check_models(key: Key, request: Request, destination: Destination, model: str) -> None:
    """Raises ServeError unless the key may use every model that the request names, and the one that answers it."""
    named = [name for name in names_of_models(request) if name not in (None, "")]
    names = destination.service.names() if destination.service is not None else ()
    is_known = bool(named) and all(isinstance(name, str) and name in names for name in named)
    for name in named if is_known else (*named, model):
        if not isinstance(name, str) or not any(fnmatch.fnmatchcase(name, pattern) for pattern in key.models):
            raise errors.model_not_allowed(str(name), key.models)
