"""What one process tells the others of deaths, and what it makes of what it is told."""

from balancer.relay.deaths import REMEMBERED
from balancer.workers.told_deaths import MOST_DEATHS, ToldDeaths


def test_each_death_is_news_once() -> None:
    """Alike requests that end at the same time are two; either is told again in vain, even when it is acquitted."""
    teller, told = ToldDeaths(lambda: 1.0), ToldDeaths(lambda: 1.0)
    alike = [teller.new("0", "a", "10.0.0.1:1", "01", 1.0) for _ in range(2)]
    assert [told.learn(died) for died in (*alike, *alike)] == [True, True, False, False]
    assert told.lately() == teller.lately() == alike
    told.acquit("01")
    assert not told.learn(alike[0])
    assert told.lately() == []


def test_few_deaths_are_kept_and_not_for_long() -> None:
    """The oldest are given up first."""
    now = 0.0
    told = ToldDeaths(lambda: now)
    for number in range(MOST_DEATHS + 9):
        told.learn(["0", "a", "10.0.0.1:1", "01", float(number >= MOST_DEATHS), f"id {number}"])
    assert len(told.lately()) == MOST_DEATHS
    now = REMEMBERED
    assert [died[-1] for died in told.lately()] == [f"id {MOST_DEATHS + number}" for number in range(9)]
