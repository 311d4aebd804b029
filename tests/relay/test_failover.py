"""The table of what may be tried again, row by row."""

import pytest

from balancer.fleet.outcome import DOUBTFUL, FAILURES, Outcome
from balancer.relay.failover import MAX_SENT, RetryBudget, final_error, may_repeat
from balancer.spec.settings import Settings

PLAIN, RETRYING = Settings(), Settings(retry_sent=True)


class Budget(RetryBudget):
    """Counts what is asked of it."""

    def __init__(self, is_full: bool) -> None:
        super().__init__()
        self.asked = 0
        self.is_full = is_full

    def withdraw(self, now: float) -> bool:
        self.asked += 1
        return self.is_full


#    outcome             method   retry_sent  repeat  costs the budget
ROWS = [
    (Outcome.REFUSED, b"POST", PLAIN, True, False),
    (Outcome.REFUSED, b"GET", PLAIN, True, False),
    (Outcome.UNREACHED, b"POST", PLAIN, True, False),
    (Outcome.BUSY, b"POST", PLAIN, True, False),
    (Outcome.LOST, b"GET", PLAIN, True, True),
    (Outcome.LOST, b"HEAD", PLAIN, True, True),
    (Outcome.LOST, b"POST", PLAIN, False, False),
    (Outcome.LOST, b"OPTIONS", PLAIN, False, False),
    (Outcome.LOST, b"DELETE", PLAIN, False, False),
    (Outcome.LOST, b"POST", RETRYING, True, True),
    (Outcome.SILENT, b"GET", RETRYING, False, False),
    (Outcome.MANGLED, b"GET", RETRYING, False, False),
    (Outcome.BROKEN, b"GET", RETRYING, False, False),
    (Outcome.STALLED, b"GET", RETRYING, False, False),
]


@pytest.mark.parametrize(("outcome", "method", "settings", "repeats", "costs"), ROWS)
def test_what_may_be_repeated_and_what_that_costs(
    outcome: Outcome, method: bytes, settings: Settings, repeats: bool, costs: bool
) -> None:
    budget = Budget(is_full=True)
    assert may_repeat(outcome, method, 1, settings, budget, 0.0) is repeats
    assert budget.asked == costs


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNREACHED, Outcome.BUSY])
def test_unaccepted_requests_move_on(outcome: Outcome) -> None:
    """A request that no replica has accepted moves on any number of times without using the retry budget."""
    assert may_repeat(outcome, b"POST", MAX_SENT + 5, PLAIN, Budget(is_full=False), 0.0)


def test_sent_requests_have_a_budget() -> None:
    """A request that was sent is repeated at no more than three members, and only within the retry budget."""
    assert may_repeat(Outcome.LOST, b"GET", 2, PLAIN, Budget(is_full=True), 0.0)
    assert not may_repeat(Outcome.LOST, b"GET", 3, PLAIN, Budget(is_full=True), 0.0)
    assert not may_repeat(Outcome.LOST, b"GET", 1, PLAIN, Budget(is_full=False), 0.0)


def test_every_outcome_has_a_verdict() -> None:
    """For every outcome it is decided whether it counts against the replica."""
    harmless = {Outcome.ANSWERED, Outcome.REFUSED, Outcome.UNKNOWN, Outcome.BUSY}
    assert sorted([*FAILURES, *DOUBTFUL, *harmless], key=str) == sorted(Outcome, key=str)


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        (Outcome.REFUSED, 502, "replica_unreachable"),
        (Outcome.UNREACHED, 502, "replica_unreachable"),
        (Outcome.LOST, 502, "replica_lost"),
        (Outcome.BUSY, 503, "replicas_busy"),
        (Outcome.SILENT, 504, "first_byte_timeout"),
        (Outcome.MANGLED, 502, "replica_bad_answer"),
        (Outcome.BROKEN, 502, "stream_broken"),
        (Outcome.STALLED, 502, "stream_broken"),
    ],
)
def test_what_the_client_is_told(outcome: Outcome, status: int, code: str) -> None:
    error = final_error(outcome, PLAIN, 7)
    assert (error.status, error.code) == (status, code)
    assert error.retry_after == (7 if outcome is Outcome.BUSY else None)


@pytest.mark.parametrize(
    ("outcome", "counts"),
    [
        (Outcome.REFUSED, False),
        (Outcome.UNREACHED, True),
        (Outcome.LOST, True),
        (Outcome.BUSY, False),
        (Outcome.SILENT, True),
        (Outcome.MANGLED, True),
        (Outcome.BROKEN, False),
        (Outcome.STALLED, False),
    ],
)
def test_what_counts_against_a_member(outcome: Outcome, counts: bool) -> None:
    assert (outcome in FAILURES) is counts


# The budget: a fifth of the traffic, three a second at least


def spent(budget: RetryBudget, now: float) -> int:
    count = 0
    while budget.withdraw(now):
        count += 1
    return count


def test_a_quiet_service_may_repeat_three_a_second() -> None:
    budget = RetryBudget()
    assert spent(budget, 1000.0) == 3
    assert spent(budget, 1000.0) == 0
    assert spent(budget, 1001.0) == 3
    assert spent(budget, 1001.5) == 1
    assert spent(budget, 5000.0) == 3, "what is not used does not pile up"


def test_a_busy_service_may_repeat_a_fifth_of_its_requests() -> None:
    budget = RetryBudget()
    spent(budget, 0.0)
    for _ in range(100):
        budget.deposit()
    assert 19 <= spent(budget, 0.0) <= 20
    for _ in range(100_000):
        budget.deposit()
    assert spent(budget, 0.0) <= 100, "a long calm is not a licence for a storm"
