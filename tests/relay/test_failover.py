"""The table of what may be tried again, row by row."""

import pytest

from balancer.fleet.outcome import DOUBTFUL, FAILURES, Outcome
from balancer.relay.failover import MAX_DEATHS, RetryBudget, final_error, may_continue, may_repeat, only_generates
from balancer.spec.settings import Settings

PLAIN, NEVER = Settings(), Settings(retry_sent="never", continue_broken=False)


def budget(is_full: bool) -> RetryBudget:
    """At that time's beginning, with something in it or nothing."""
    made = RetryBudget()
    while not is_full and made.withdraw(0.0):
        pass
    return made


#    outcome             method   generates  settings  repeats  costs the budget
ROWS = [
    (Outcome.REFUSED, b"POST", False, NEVER, True, False),
    (Outcome.REFUSED, b"GET", False, PLAIN, True, False),
    (Outcome.UNREACHED, b"POST", False, NEVER, True, False),
    (Outcome.BUSY, b"POST", False, NEVER, True, False),
    (Outcome.LOST, b"GET", False, NEVER, True, True),
    (Outcome.LOST, b"HEAD", False, PLAIN, True, True),
    (Outcome.LOST, b"POST", True, PLAIN, True, False),
    (Outcome.LOST, b"POST", True, NEVER, False, False),
    (Outcome.LOST, b"POST", False, PLAIN, False, False),
    (Outcome.LOST, b"OPTIONS", False, PLAIN, False, False),
    (Outcome.LOST, b"DELETE", False, PLAIN, False, False),
    (Outcome.SILENT, b"POST", True, PLAIN, True, True),
    (Outcome.SILENT, b"POST", True, NEVER, False, False),
    (Outcome.SILENT, b"POST", False, PLAIN, False, False),
    (Outcome.SILENT, b"GET", False, PLAIN, True, True),
    (Outcome.MANGLED, b"GET", False, PLAIN, False, False),
    (Outcome.BROKEN, b"GET", False, PLAIN, False, False),
    (Outcome.STALLED, b"GET", False, PLAIN, False, False),
]


@pytest.mark.parametrize(("outcome", "method", "generates", "settings", "repeats", "costs"), ROWS)
def test_what_may_be_repeated_and_what_that_costs(
    outcome: Outcome, method: bytes, generates: bool, settings: Settings, repeats: bool, costs: bool
) -> None:
    assert may_repeat(outcome, method, generates, 1, settings, budget(is_full=True), 0.0) is repeats
    assert may_repeat(outcome, method, generates, 1, settings, budget(is_full=False), 0.0) is (repeats and not costs)


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNREACHED, Outcome.BUSY])
def test_unaccepted_requests_move_on(outcome: Outcome) -> None:
    """A request that no replica has accepted moves on any number of times without using the retry budget."""
    assert may_repeat(outcome, b"POST", False, MAX_DEATHS + 5, NEVER, budget(is_full=False), 0.0)


def test_sent_requests_have_a_budget() -> None:
    """A request that was sent goes to no more than two replicas, and a GET only within the retry budget."""
    assert may_repeat(Outcome.LOST, b"GET", False, 1, PLAIN, budget(is_full=True), 0.0)
    assert not may_repeat(Outcome.LOST, b"GET", False, 2, PLAIN, budget(is_full=True), 0.0)
    assert not may_repeat(Outcome.LOST, b"GET", False, 1, PLAIN, budget(is_full=False), 0.0)
    assert not may_repeat(Outcome.LOST, b"POST", True, 2, PLAIN, budget(is_full=True), 0.0)


@pytest.mark.parametrize("outcome", [Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK, Outcome.SILENT, Outcome.AWAY])
def test_broken_answers_continue_once(outcome: Outcome) -> None:
    """An answer that broke continues at one other replica; resending and continuing are counted together."""
    assert may_continue(outcome, 1, PLAIN)
    assert not may_continue(outcome, 2, PLAIN)
    assert not may_continue(outcome, 1, NEVER)


def test_unaccepted_continuations_move_on() -> None:
    """A replica that does not accept a continuation leaves it to another one; one that died is the second death."""
    assert may_continue(Outcome.REFUSED, 1, PLAIN)
    assert may_continue(Outcome.BUSY, 1, PLAIN)
    assert not may_continue(Outcome.LOST, 2, PLAIN)
    assert not may_continue(Outcome.SILENT, 2, PLAIN)


@pytest.mark.parametrize(
    ("path", "body", "generates"),
    [
        ("/v1/chat/completions", b"{}", True),
        ("/generate", b"no JSON", True),
        ("/v1/embeddings", b"{}", True),
        ("/v1/files", b"{}", False),
        ("/v1/responses", b"{}", False),
        ("/v1/responses", b'{"store":true}', False),
        ("/v1/responses", b'{"store":false}', True),
        ("/v1/responses", b'{"store":false,"tools":[{"type":"function"}]}', True),
        ("/v1/responses", b'{"store":false,"tools":[{"type":"web_search_preview"}]}', False),
        ("/v1/responses", b"no JSON", False),
    ],
)
def test_only_generates(path: str, body: bytes, generates: bool) -> None:
    """Which POSTs have no effect but their cost: not those that are stored, or use tools of the server."""
    assert only_generates(path, [body[:5], body[5:]]) is generates


def test_every_outcome_has_a_verdict() -> None:
    """For every outcome it is decided whether it counts against the replica."""
    harmless = {Outcome.ANSWERED, Outcome.REFUSED, Outcome.UNKNOWN, Outcome.BUSY, Outcome.AWAY}
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
        (Outcome.AWAY, 503, "model_not_awake"),
    ],
)
def test_what_the_client_is_told(outcome: Outcome, status: int, code: str) -> None:
    error = final_error(outcome, PLAIN, 7)
    assert (error.status, error.code) == (status, code)
    assert error.retry_after == (7 if error.status == 503 else None)


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


def test_two_deaths() -> None:
    """A client is told that two replicas died."""
    assert "Two replicas" in final_error(Outcome.LOST, PLAIN, 1, deaths=2).message
    assert "two replicas" in final_error(Outcome.BROKEN, PLAIN, 1, deaths=2).message
    assert "Two replicas" not in final_error(Outcome.LOST, PLAIN, 1, deaths=1).message


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
