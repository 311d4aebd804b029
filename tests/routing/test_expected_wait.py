"""How long who comes now would wait, measured while others wait; with more and fewer replicas, and long after."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.routing.expected_wait import FADES, ExpectedWait

TICK = 0.25


def measured(
    places: int, takes: float, seconds: float, wait: ExpectedWait | None = None, since: float = 0.0
) -> ExpectedWait:
    """After so many seconds of a queue before so many places that are always in use, each for `takes` seconds."""
    wait = wait or ExpectedWait(since)
    given, now = 0.0, since
    while now < since + seconds:
        now += TICK
        given += places / takes * TICK
        while given >= 1:
            given -= 1
            wait.given()
        wait.passed(now, places)
    return wait


def test_nothing_is_known_before_somebody_who_waited_got_a_place() -> None:
    wait = ExpectedWait(0.0)
    assert wait.likely(5, 4) is None
    wait.passed(10.0, 4)
    assert wait.likely(5, 4) is None
    assert wait.least(1000, 4) == 0, "a long request at first does not mean that the next ones are"


@settings(deadline=None, max_examples=50)
@given(
    places=st.integers(1, 64),
    takes=st.floats(0.1, 20),
    position=st.integers(1, 500),
)
def test_a_steady_service_is_foreseen(places: int, takes: float, position: int) -> None:
    wait = measured(places, takes, 300)
    truth = position * takes / places
    likely = wait.likely(position, places)
    assert likely == pytest.approx(truth, rel=0.15)
    assert truth / (1 + takes / FADES) * 0.8 < wait.least(position, places) <= likely or places / takes * FADES < 9


def test_who_all_began_together_are_not_taken_to_stand_still() -> None:
    """A hundred places, all given at once, each for ten seconds: until then nothing comes free."""
    wait = ExpectedWait(0.0)
    for _ in range(4):
        wait.given()
    for tick in range(1, 40):
        wait.passed(tick * TICK, 100)
    assert wait.likely(100, 100) > 200
    assert 9 < wait.least(100, 100) < 10, "true is: ten more"


def test_a_slow_service_is_known_too() -> None:
    """Four places, each kept for ten minutes: in the time in which much is forgotten hardly one comes free."""
    wait = measured(places=4, takes=600, seconds=3600)
    assert wait.likely(1, 4) == pytest.approx(150, rel=0.25)
    assert wait.least(2, 4) > 100


def test_an_estimate_follows_the_replicas_at_once() -> None:
    wait = measured(places=8, takes=2, seconds=60)
    assert wait.likely(16, 8) == pytest.approx(4, rel=0.1)
    assert wait.likely(16, 4) == pytest.approx(8, rel=0.1)
    assert wait.likely(16, 32) == pytest.approx(1, rel=0.1)


def test_what_changed_long_ago_counts_no_more() -> None:
    wait = measured(places=4, takes=10, seconds=100)
    wait = measured(places=4, takes=1, seconds=5 * FADES, wait=wait, since=100.0)
    assert wait.likely(4, 4) == pytest.approx(1, rel=0.1)


def test_a_time_in_which_nobody_waits_says_nothing_of_the_pace() -> None:
    wait = measured(places=4, takes=1, seconds=60)
    before = wait.likely(8, 4)
    wait.passed(100.0, 0)
    assert wait.likely(8, 4) == pytest.approx(before, rel=0.01)
    wait.passed(10_000.0, 0)
    assert wait.likely(8, 4) is None, "that was hours ago"
    assert wait.least(1000, 4) == 0
