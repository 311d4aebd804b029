"""A key's part of a round: its weight, by how long its requests keep their places."""

import pytest

from balancer.routing.shares import LEAST_COST, MOST_COST, MOST_KEYS, Shares


def test_who_is_not_known_has_his_weight() -> None:
    shares = Shares()
    assert shares.of("new") == 1.0
    shares.note("old", 3.0)
    assert shares.of("new", 2.5) == 2.5


def test_one_key_alone_is_ordinary() -> None:
    shares = Shares()
    for _ in range(100):
        shares.note("one", 7.0)
    assert shares.of("one") == pytest.approx(1.0)


def test_who_keeps_places_for_long_has_them_less_often() -> None:
    shares = Shares()
    for _ in range(200):
        shares.note("short", 1.0)
        shares.note("long", 3.0)
    assert shares.of("short") / shares.of("long") == pytest.approx(3, rel=0.1)
    assert shares.of("long", 2.0) == pytest.approx(2 * shares.of("long"))


def test_a_few_requests_say_little_and_none_says_all() -> None:
    shares = Shares()
    for _ in range(100):
        shares.note("ordinary", 1.0)
    shares.note("once", 2.0)
    assert 0.75 < shares.of("once") < 1
    for _ in range(100):
        shares.note("endless", 1e6)
    for _ in range(100):
        shares.note("ordinary", 1.0)
    assert shares.of("endless") == 1 / MOST_COST
    for _ in range(100):
        shares.note("endless", 1e6)
    assert shares.of("ordinary") == 1 / LEAST_COST


def test_what_a_key_was_long_ago_is_forgotten() -> None:
    shares = Shares()
    for _ in range(1000):
        shares.note("other", 1.0)
        shares.note("changed", 9.0)
    for _ in range(1000):
        shares.note("other", 1.0)
        shares.note("changed", 1.0)
    assert shares.of("changed") == pytest.approx(1.0, rel=0.01)


def test_remembered_keys_are_bounded() -> None:
    """Keys are remembered within bounds, those in use the longest."""
    shares = Shares()
    shares.note("first", 1.0)
    for _ in range(50):
        shares.note("used", 4.0)
    for number in range(2 * MOST_KEYS):
        shares.note(number, 1.0)
        assert shares.of("used") < 1
    assert len(shares._keys) == MOST_KEYS
    assert "first" not in shares._keys


def test_requests_that_take_no_time_divide_by_nothing() -> None:
    shares = Shares()
    shares.note("quick", 0.0)
    assert shares.of("quick") == 1.0
