"""What one key may still use: requests and tokens, in buckets that fill again as time passes. Pure data; the clock is
passed in.

A request takes what it will probably use before it starts, and its answer settles the difference, after which a bucket
may hold less than nothing. A request for more than a full bucket holds is let in once the bucket is full.
"""

import math
from dataclasses import dataclass

from balancer.contract.account import KeyTerms

MINUTE, DAY = 60.0, 86400.0
Limits = tuple[int | None, int | None, int | None, int | None]
NO_LIMITS: Limits = (None, None, None, None)


class Bucket:
    """`whole` of `what` ("tokens per minute") in `period` seconds; full at first, and after a period without use.

    `limit` is our part of it, beside other balancers. It knows of what was taken from `since` on.
    """

    __slots__ = ("at", "left", "limit", "per_request", "rate", "share", "since", "what", "whole")

    def __init__(self, what: str, limit: int, period: float, now: float, used: int = 0) -> None:
        self.what = what
        self.per_request = what.startswith("requests")
        self.whole = limit
        self.limit: float = limit
        self.share = 1.0
        self.rate = limit / period
        self.left = float(limit - used)
        self.at = self.since = now

    def refill(self, now: float) -> None:
        left = self.left + (now - self.at) * self.rate
        self.left = left if left < self.limit else self.limit
        self.at = now

    def take_over(self, before: "Bucket", now: float) -> None:
        """As much has been used as of one with another limit, or all that there is."""
        before.refill(now)
        left = self.whole - (before.limit - before.left) / before.share
        self.left = max(0.0, left)
        if left >= 0:
            self.since = before.since

    def take_share(self, share: float) -> None:
        """This part of the limit, and of what is left, is ours from now on."""
        self.rate *= share / self.share
        self.left *= share / self.share
        self.limit = self.whole * share
        self.share = share

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
    """The buckets of one key. `used_today`: the requests and tokens that it used in the last 24 hours; `before`: what
    the key had until now, of which it keeps what it has left.
    """

    __slots__ = ("_format", "buckets", "limits", "requests", "tokens")
    buckets: list[Bucket]

    def __init__(
        self, terms: KeyTerms, now: float, used_today: tuple[int, int] = (0, 0), before: "Quota | None" = None
    ) -> None:
        self.limits = limits_of(terms)
        known = {bucket.what: bucket for bucket in before.buckets} if before is not None else {}
        self.requests = _both("requests", *self.limits[:2], now, used_today[0], known)
        self.tokens = _both("tokens", *self.limits[2:], now, used_today[1], known)
        self.buckets = self.requests + self.tokens
        self._format = b"".join(
            b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
            % ((name,) * 3)
            for name, is_there in ((b"requests", self.requests), (b"tokens", self.tokens))
            if is_there
        )

    @property
    def counts_tokens(self) -> bool:
        return bool(self.tokens)

    def take(self, tokens: int, now: float) -> Lacking | None:
        """Takes one request and that many tokens; or nothing, and says what is lacking."""
        worst: Lacking | None = None
        for bucket in self.buckets:
            bucket.refill(now)
            limit, left = bucket.limit, bucket.left
            amount = 1 if bucket.per_request else tokens
            if left < amount and left < limit - 1e-6:
                wait = bucket.wait_for(amount)
                if worst is None or wait > worst.wait:
                    worst = Lacking(bucket.what, bucket.whole, wait)
        if worst is None:
            for bucket in self.buckets:
                bucket.left -= 1 if bucket.per_request else tokens
        return worst

    def take_share(self, share: float) -> None:
        """This part of each limit is ours from now on."""
        for bucket in self.buckets:
            if share != bucket.share:
                bucket.take_share(share)

    def give_back(self, tokens: float, taken_at: float) -> None:
        """Puts back tokens that were taken but not used; a negative number takes those used beyond that."""
        for bucket in self.tokens:
            if bucket.since <= taken_at:
                bucket.left = min(bucket.limit, bucket.left + tokens)

    def fields(self) -> bytes:
        """The header lines by which OpenAI's clients learn what is left, as of the last `take`: of two, the tighter."""
        values: list[int | bytes] = []
        for buckets in (self.requests, self.tokens):
            if buckets:
                values += _told(min(buckets, key=lambda bucket: bucket.left))
        return self._format % tuple(values)


def limits_of(terms: KeyTerms) -> Limits:
    """Those that a quota holds a key to."""
    return terms.requests_per_minute, terms.requests_per_day, terms.tokens_per_minute, terms.tokens_per_day


def _both(
    what: str, per_minute: int | None, per_day: int | None, now: float, used_today: int, known: dict[str, Bucket]
) -> list[Bucket]:
    buckets = []
    if per_minute:
        buckets.append(_bucket(Bucket(f"{what} per minute", per_minute, MINUTE, now), known))
    if per_day:
        buckets.append(_bucket(Bucket(f"{what} per day", per_day, DAY, now, used_today), known))
    return buckets


def _bucket(fresh: Bucket, known: dict[str, Bucket]) -> Bucket:
    if (before := known.get(fresh.what)) is None:
        return fresh
    if before.whole == fresh.whole:
        return before
    fresh.take_over(before, fresh.at)
    return fresh


def _told(bucket: Bucket) -> tuple[int, int, bytes]:
    limit, left = bucket.limit, bucket.left
    seconds = math.ceil((limit - left) / bucket.rate)
    return bucket.whole, int(left) if left > 0 else 0, b"%ds" % seconds if seconds < 60 else _span(seconds)


def _span(seconds: int) -> bytes:
    """As OpenAI writes it: 6m0s, 23h59m0s."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return (b"%dh" % hours if hours else b"") + b"%dm%ds" % (minutes, seconds)
