"""What a key has left: buckets, what is refused and for how long, and the fields that say so."""

import pytest

from balancer.accounts.quota import Quota
from balancer.contract.account import KeyTerms


def test_a_bucket_fills_again_as_time_passes() -> None:
    quota = Quota(KeyTerms(requests_per_minute=60), now=100.0)
    assert [quota.take(0, 100.0) for _ in range(60)] == [None] * 60
    lacking = quota.take(0, 100.0)
    assert lacking is not None
    assert (lacking.what, lacking.limit, lacking.wait) == ("requests per minute", 60, pytest.approx(1.0))
    assert quota.take(0, 101.1) is None
    assert quota.take(0, 101.1) is not None


def test_what_is_refused_takes_nothing() -> None:
    quota = Quota(KeyTerms(requests_per_minute=2, tokens_per_minute=100), now=0.0)
    assert quota.take(80, 0.0) is None
    lacking = quota.take(80, 0.0)
    assert lacking is not None
    assert lacking.what == "tokens per minute"
    assert lacking.wait == pytest.approx(36.0)
    assert quota.take(20, 0.0) is None, "the request that was refused took neither its place nor its tokens"


def test_a_request_above_the_limit_is_let_in_when_it_is_full() -> None:
    quota = Quota(KeyTerms(tokens_per_minute=100), now=0.0)
    assert quota.take(5000, 0.0) is None
    quota.give_back(5000 - 150, 0.0)
    lacking = quota.take(1, 0.0)
    assert lacking is not None, "150 were used, of 100"
    assert lacking.wait == pytest.approx(0.6 * 51)


def test_what_was_not_used_comes_back_and_no_more() -> None:
    quota = Quota(KeyTerms(tokens_per_minute=100), now=0.0)
    assert quota.take(90, 0.0) is None
    quota.give_back(80, 0.0)
    assert quota.take(90, 0.0) is None
    quota.give_back(10_000, 0.0)
    assert quota.tokens[0].left == 100


def test_other_limits_leave_what_is_left_of_the_rest() -> None:
    before = Quota(KeyTerms(requests_per_minute=2, tokens_per_day=1000), now=0.0)
    assert before.take(900, 0.0) is None
    quota = Quota(KeyTerms(requests_per_minute=2, tokens_per_day=1000, tokens_per_minute=50), 0.0, (9, 9), before)
    assert [bucket.left for bucket in quota.buckets] == [1, 50, 100]


@pytest.mark.parametrize(
    ("limit", "left", "settled"),
    [
        (2000, 1100, 1190),
        (950, 50, 140),
        (500, 0, 0),  # what was used beyond a new limit is forgiven, and comes back no second time
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_changed_limit_takes_over_what_was_used(limit: int, left: float, settled: float, share: float) -> None:
    before = Quota(KeyTerms(tokens_per_day=1000), now=0.0)
    before.take_share(share)
    assert before.take(int(900 * share), 1.0) is None
    quota = Quota(KeyTerms(tokens_per_day=limit), 2.0, (0, 9), before)
    quota.take_share(share)
    assert quota.tokens[0].left == pytest.approx(left * share, abs=1)
    quota.give_back(90 * share, taken_at=1.0)
    assert quota.tokens[0].left == pytest.approx(settled * share, abs=1)


def test_what_another_bucket_gave_does_not_come_back() -> None:
    before = Quota(KeyTerms(tokens_per_day=1000), now=0.0)
    assert before.take(900, 1.0) is None
    quota = Quota(KeyTerms(tokens_per_day=1000, tokens_per_minute=500), 2.0, (0, 0), before)
    assert quota.take(100, 2.0) is None
    quota.give_back(800, taken_at=1.0)
    assert [round(bucket.left) for bucket in quota.tokens] == [400, 800]


def test_a_part_of_a_limit_is_a_part_of_what_is_left_too() -> None:
    quota = Quota(KeyTerms(requests_per_minute=60), now=0.0)
    assert [quota.take(0, 0.0) for _ in range(20)] == [None] * 20
    quota.take_share(0.5)
    assert [quota.take(0, 0.0) is None for _ in range(21)] == [True] * 20 + [False]
    lacking = quota.take(0, 0.0)
    assert lacking is not None
    assert (lacking.limit, lacking.wait) == (60, pytest.approx(2.0)), "it fills at half of the speed"
    quota.take_share(1.0)
    assert quota.take(0, 1.0) is None
    assert quota.fields().startswith(b"x-ratelimit-limit-requests: 60\r\n")


def test_a_day_remembers_what_was_used_before_the_start() -> None:
    quota = Quota(KeyTerms(tokens_per_day=86400), now=0.0, used_today=(7, 86400))
    lacking = quota.take(60, 0.0)
    assert lacking is not None
    assert (lacking.what, lacking.wait) == ("tokens per day", pytest.approx(60.0))
    assert quota.take(60, 61.0) is None
    quota = Quota(KeyTerms(requests_per_day=864, requests_per_minute=600), now=0.0, used_today=(864, 9))
    lacking = quota.take(0, 0.0)
    assert lacking is not None
    assert (lacking.what, lacking.limit, lacking.wait) == ("requests per day", 864, pytest.approx(100.0))
    assert [quota.take(0, 101.0) is None for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("terms", "fields"),
    [
        (KeyTerms(), {}),
        (
            KeyTerms(requests_per_minute=60),
            {"limit-requests": "60", "remaining-requests": "59", "reset-requests": "1s"},
        ),
        (
            KeyTerms(requests_per_minute=60, requests_per_day=24),
            {"limit-requests": "24", "remaining-requests": "23", "reset-requests": "1h0m0s"},
        ),
        (
            KeyTerms(tokens_per_minute=6000),
            {"limit-tokens": "6000", "remaining-tokens": "5900", "reset-tokens": "1s"},
        ),
        (
            KeyTerms(tokens_per_minute=6000, tokens_per_day=600),
            {"limit-tokens": "600", "remaining-tokens": "500", "reset-tokens": "4h0m0s"},
        ),
    ],
)
def test_the_fields_are_those_of_openai(terms: KeyTerms, fields: dict[str, str]) -> None:
    quota = Quota(terms, now=0.0)
    assert quota.take(100, 0.0) is None
    lines = quota.fields().decode().splitlines()
    assert dict(line.split(": ") for line in lines) == {f"x-ratelimit-{name}": value for name, value in fields.items()}
