"""From facts to status, row by row."""

from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State, Status
from balancer.errors import ConfigError
from balancer.fleet.ejection import Outlier
from balancer.fleet.member import Member, ProbeResult, Verdict
from balancer.spec.settings import ReadinessProbe

NOW = 10_000.0
PATIENCE = 180.0
INITIAL_DELAY = 1200.0


def member_with(**facts: Any) -> Member:
    """A member that passes, with other facts. `failing_for`: its /ready has failed that long, in seconds."""
    state = facts.pop("state", State.RUNNING)
    failing_for = facts.pop("failing_for", None)
    age = facts.pop("age", 100.0)
    member = Member(
        1, ReplicaListing("r1", "http://127.0.0.1:8001", state=state), NOW - age, Outlier(10, 300), ReadinessProbe()
    )
    member.has_passed = facts.pop("has_passed", True)
    if member.has_passed:
        member.ready.passed(NOW - 50)
        member.service.passed(NOW - 50)
    if failing_for is not None:
        member.ready.surely_failed(NOW - failing_for)
    for name, value in facts.items():
        setattr(member, name, value)
    return member


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        # The rows of the table, in its order.
        ({"draining": True}, Status.SHUTTING_DOWN),
        ({"draining": True, "in_flight": 1}, Status.DRAINING),
        ({"has_passed": False, "age": INITIAL_DELAY + 1}, Status.FAILED_INITIAL_DELAY),
        ({"failing_for": PATIENCE + 1}, Status.FAILED_PROBING),
        ({"has_passed": False}, Status.STARTING),
        ({"failing_for": 1.0}, Status.NOT_READY),
        ({"refusing": True}, Status.NOT_READY),
        ({"ejected_until": NOW + 1}, Status.EJECTED),
        ({}, Status.READY),
        # The first row that fits, from the top.
        ({"draining": True, "has_passed": False, "age": INITIAL_DELAY + 1}, Status.SHUTTING_DOWN),
        ({"draining": True, "failing_for": PATIENCE + 1}, Status.SHUTTING_DOWN),
        ({"draining": True, "in_flight": 2, "ejected_until": NOW + 1}, Status.DRAINING),
        ({"failing_for": PATIENCE + 1, "refusing": True}, Status.FAILED_PROBING),
        ({"failing_for": 1.0, "ejected_until": NOW + 1}, Status.NOT_READY),
        ({"refusing": True, "ejected_until": NOW + 1}, Status.NOT_READY),
        # At the very limits.
        ({"has_passed": False, "age": INITIAL_DELAY}, Status.STARTING),
        ({"failing_for": PATIENCE}, Status.NOT_READY),
        ({"ejected_until": NOW}, Status.READY),
        # One that never passed has its whole initial delay, however long it refuses.
        ({"has_passed": False, "failing_for": 5 * PATIENCE, "age": INITIAL_DELAY - 1}, Status.STARTING),
        # Full is available: it is the claim that finds no room.
        ({"full_until": NOW + 1}, Status.READY),
        ({"generating": 256, "in_flight": 256}, Status.READY),
        # The engine's words.
        ({"state": State.PROVISIONING}, Status.PROVISIONING),
        ({"state": State.PROVISIONING, "draining": True}, Status.SHUTTING_DOWN),
        ({"state": State.FETCHING, "has_passed": False, "age": 9 * INITIAL_DELAY}, Status.FETCHING),
        ({"state": State.FAILED, "draining": True}, Status.FAILED),
        ({"state": State.FAILED}, Status.FAILED),
        ({"state": State.SHUTTING_DOWN}, Status.SHUTTING_DOWN),
        ({"state": State.SHUTTING_DOWN, "in_flight": 1}, Status.DRAINING),
    ],
)
def test_status_is_the_first_row_that_fits(facts: dict[str, Any], status: Status) -> None:
    member = member_with(**facts)
    assert member.status(NOW) is status
    assert member.is_available(NOW) is (status is Status.READY)


@pytest.mark.parametrize(
    ("ready", "service", "probe"),
    [
        (Verdict.PASSING, Verdict.PASSING, Verdict.PASSING),
        (Verdict.PASSING, Verdict.UNKNOWN, Verdict.UNKNOWN),
        (Verdict.UNKNOWN, Verdict.PASSING, Verdict.UNKNOWN),
        (Verdict.FAILING, Verdict.PASSING, Verdict.FAILING),
        (Verdict.PASSING, Verdict.FAILING, Verdict.FAILING),
        (Verdict.FAILING, Verdict.UNKNOWN, Verdict.FAILING),
    ],
)
def test_a_member_passes_when_both_results_pass(ready: Verdict, service: Verdict, probe: Verdict) -> None:
    member = member_with()
    member.ready.verdict, member.service.verdict = ready, service
    assert member.probe is probe


def test_two_failures_in_a_row_undo_a_pass() -> None:
    result = ProbeResult()
    assert result.passed(1.0)
    assert not result.failed(2.0)
    assert not result.passed(3.0)
    assert not result.failed(4.0)
    assert result.verdict is Verdict.PASSING
    assert result.failed(5.0)
    assert (result.verdict, result.since) == (Verdict.FAILING, 5.0)
    assert not result.failed(6.0)
    assert result.since == 5.0


def test_a_refusal_undoes_a_pass_at_once_and_one_pass_undoes_it() -> None:
    result = ProbeResult()
    result.passed(1.0)
    assert result.surely_failed(2.0)
    assert (result.verdict, result.since) == (Verdict.FAILING, 2.0)
    assert result.passed(3.0)
    assert not result.failed(4.0)


def test_failing_counts_from_whichever_result_failed_first() -> None:
    member = member_with()
    member.service.failed(NOW - 30)
    member.service.failed(NOW - 20)
    member.ready.surely_failed(NOW - 10)
    assert member.is_failing_for(19, NOW)
    assert not member.is_failing_for(20, NOW)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "ftp://h:1", "http://", "http://h:0", "http://h:99999", "http://h:x", "http://u:p@h:1"),
        *("http://h:1/", "http://h:1/v1", "http://h:1?a=b", "http://h:1#a", "http://h\xf6st:1", "http://[::1"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write http://HOST:PORT$") as error:
        ReplicaListing("r1", url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "authority"),
    [
        ("http://h:8000", "h", 8000, b"h:8000"),
        ("http://10.0.0.1", "10.0.0.1", 80, b"10.0.0.1"),
        ("https://h", "h", 443, b"h"),
        ("http://[fd00::5]:8000", "fd00::5", 8000, b"[fd00::5]:8000"),
    ],
)
def test_an_address_is_taken_apart(url: str, host: str, port: int, authority: bytes) -> None:
    member = Member(1, ReplicaListing("r1", url), NOW, Outlier(10, 300), ReadinessProbe())
    assert (member.host, member.port, member.authority) == (host, port, authority)
    assert member.is_https is url.startswith("https")


def test_a_member_shows_its_facts() -> None:
    member = member_with(draining=True, in_flight=3)
    assert repr(member) == (
        "<Member 1 r1 at http://127.0.0.1:8001, RUNNING: ready passing, service passing, in flight 3 of 256, draining>"
    )
    assert repr(member_with(state=State.FAILED, has_passed=False)).endswith(
        ", FAILED: ready unknown, service unknown, in flight 0 of 256>"
    )
