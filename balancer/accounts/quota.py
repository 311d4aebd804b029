"""What one key may still use: requests and tokens, in buckets that fill again as time passes. Pure data; the clock is
passed in.

A request takes what it will probably use before it starts, and its answer settles the difference: a bucket may then
hold less than nothing. One that would take more than a bucket holds when full is let in when it is full.
"""

import math
from dataclasses import dataclass

from balancer.contract.account import KeyTerms

MINUTE, DAY = 60.0, 86400.0


class Bucket:
    """`limit` per `period` seconds; it is full at first, and again after one period without use."""

    __slots__ = ("at", "left", "limit", "period")

    def __init__(self, limit: int, period: float, now: float, used: int = 0) -> None:
        self.limit = limit
        self.period = period
        self.left = float(limit - used)
        self.at = now

    def fill(self, now: float) -> None:
        self.left = min(self.limit, self.left + (now - self.at) * self.limit / self.period)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until it holds that much, or is full; 0 if it does now."""
        lacking = min(amount, self.limit) - self.left
        return lacking * self.period / self.limit if lacking > 1e-6 else 0.0


@dataclass(frozen=True, slots=True)
class Lacking:
    """Why a request is refused: `limit` of `what`, as in "tokens per minute"; there is enough in `wait` seconds."""

    what: str
    limit: int
    wait: float


class Quota:
    """The buckets of one key. `used_today`: tokens that it used in the last 24 hours."""

    __slots__ = ("day", "minute", "requests", "terms")

    def __init__(self, terms: KeyTerms, now: float, used_today: int = 0) -> None:
        self.terms = terms
        per_minute, tokens, per_day = terms.requests_per_minute, terms.tokens_per_minute, terms.tokens_per_day
        self.requests = Bucket(per_minute, MINUTE, now) if per_minute else None
        self.minute = Bucket(tokens, MINUTE, now) if tokens else None
        self.day = Bucket(per_day, DAY, now, used_today) if per_day else None

    @property
    def counts_tokens(self) -> bool:
        return self.minute is not None or self.day is not None

    def take(self, tokens: int, now: float) -> Lacking | None:
        """Takes one request and that many tokens; or nothing, and says what is lacking."""
        worst: Lacking | None = None
        for bucket, amount, what in (
            (self.requests, 1, "requests per minute"),
            (self.minute, tokens, "tokens per minute"),
            (self.day, tokens, "tokens per day"),
        ):
            if bucket is not None:
                bucket.fill(now)
                wait = bucket.wait_for(amount)
                if wait and (worst is None or wait > worst.wait):
                    worst = Lacking(what, bucket.limit, wait)
        if worst is None:
            if self.requests is not None:
                self.requests.left -= 1
            self.give_back(-tokens)
        return worst

    def give_back(self, tokens: float) -> None:
        """Puts tokens back that were taken and not used; a negative number takes what was used beyond."""
        for bucket in (self.minute, self.day):
            if bucket is not None:
                bucket.left = min(bucket.limit, bucket.left + tokens)

    def fields(self) -> bytes:
        """The header lines by which OpenAI's clients learn what is left, as of the last `take`."""
        tokens = self.minute or self.day
        if self.minute is not None and self.day is not None and self.day.left < self.minute.left:
            tokens = self.day
        lines = b""
        if (requests := self.requests) is not None:
            lines = b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n" % (
                requests.limit,
                max(0, requests.left),
            ) + b"x-ratelimit-reset-requests: %b\r\n" % _span(requests.wait_for(requests.limit))
        if tokens is not None:
            lines += b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\n" % (
                tokens.limit,
                max(0, tokens.left),
            ) + b"x-ratelimit-reset-tokens: %b\r\n" % _span(tokens.wait_for(tokens.limit))
        return lines


def _span(seconds: float) -> bytes:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s, 23h59m0s."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    if seconds < 60:
        return b"%gs" % (math.ceil(seconds * 10) / 10)
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (b"%dh" % hours if hours else b"") + b"%dm%ds" % (minutes, rest)
