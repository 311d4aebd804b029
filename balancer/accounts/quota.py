"""What one key may still use: requests and tokens, in buckets that fill again as time passes. Pure data; the clock is
passed in.

A request takes what it will probably use before it starts, and its answer settles the difference, after which a bucket
may hold less than nothing. A request for more than a full bucket holds is let in once the bucket is full.
"""

import math
from dataclasses import dataclass

from balancer.contract.account import KeyTerms

MINUTE, DAY = 60.0, 86400.0


class Bucket:
    """`limit` of `what` ("tokens per minute") in `period` seconds; full at first, and after a period without use."""

    __slots__ = ("at", "left", "limit", "per_request", "rate", "what")

    def __init__(self, what: str, limit: int, period: float, now: float, used: int = 0) -> None:
        self.what = what
        self.per_request = what.startswith("requests")
        self.limit = limit
        self.rate = limit / period
        self.left = float(limit - used)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until it holds that much or is full, if nobody takes from it meanwhile."""
        return max(0.0, (min(amount, self.limit) - self.left) / self.rate)


@dataclass(frozen=True, slots=True)
class Lacking:
    """Why a request is refused: `limit` of `what`, as in "tokens per minute"; there is enough in `wait` seconds."""

    what: str
    limit: int
    wait: float


class Quota:
    """The buckets of one key. `used_today`: tokens that it used in the last 24 hours."""

    __slots__ = ("_format", "buckets", "counts_tokens", "day", "minute", "requests", "terms")

    def __init__(self, terms: KeyTerms, now: float, used_today: int = 0) -> None:
        self.terms = terms
        per_minute, tokens, per_day = terms.requests_per_minute, terms.tokens_per_minute, terms.tokens_per_day
        self.requests = Bucket("requests per minute", per_minute, MINUTE, now) if per_minute else None
        self.minute = Bucket("tokens per minute", tokens, MINUTE, now) if tokens else None
        self.day = Bucket("tokens per day", per_day, DAY, now, used_today) if per_day else None
        self.buckets = [bucket for bucket in (self.requests, self.minute, self.day) if bucket is not None]
        self.counts_tokens = self.minute is not None or self.day is not None
        self._format = b"".join(
            b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
            % ((name,) * 3)
            for name, is_there in ((b"requests", self.requests), (b"tokens", self.counts_tokens))
            if is_there
        )

    def take(self, tokens: int, now: float) -> Lacking | None:
        """Takes one request and that many tokens; or nothing, and says what is lacking."""
        worst: Lacking | None = None
        for bucket in self.buckets:
            limit = bucket.limit
            left = bucket.left + (now - bucket.at) * bucket.rate
            bucket.left = left = left if left < limit else limit
            bucket.at = now
            amount = 1 if bucket.per_request else tokens
            if left < amount and left < limit - 1e-6:
                wait = bucket.wait_for(amount)
                if worst is None or wait > worst.wait:
                    worst = Lacking(bucket.what, limit, wait)
        if worst is None:
            for bucket in self.buckets:
                bucket.left -= 1 if bucket.per_request else tokens
        return worst

    def give_back(self, tokens: float) -> None:
        """Puts back tokens that were taken but not used; a negative number takes those used beyond that."""
        for bucket in (self.minute, self.day):
            if bucket is not None:
                bucket.left = min(bucket.limit, bucket.left + tokens)

    def fields(self) -> bytes:
        """The header lines by which OpenAI's clients learn what is left, as of the last `take`."""
        values: list[int | bytes] = []
        if (requests := self.requests) is not None:
            values += _told(requests)
        if (tokens := self.minute or self.day) is not None:
            if self.day is not None and self.day.left < tokens.left:
                tokens = self.day
            values += _told(tokens)
        return self._format % tuple(values)


def _told(bucket: Bucket) -> tuple[int, int, bytes]:
    limit, left = bucket.limit, bucket.left
    seconds = math.ceil((limit - left) / bucket.rate)
    return limit, int(left) if left > 0 else 0, b"%ds" % seconds if seconds < 60 else _span(seconds)


def _span(seconds: int) -> bytes:
    """As OpenAI writes it: 6m0s, 23h59m0s."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return (b"%dh" % hours if hours else b"") + b"%dm%ds" % (minutes, seconds)
