"""How often prefixes are used, and what a copy of them costs by that."""

import pytest

from balancer.fleet.member import Member
from balancer.routing.popularity import MOST_COUNTED, TURNOVERS, Popularity
from tests.support.fleets import fleet_of

BLOCKS = list(range(100))


def members(count: int) -> list[Member]:
    return list(fleet_of(count).members.values())


def test_unused_prefix() -> None:
    """A prefix that nobody has used is as rare as possible, and a copy costs its whole price."""
    (one,) = members(1)
    popularity = Popularity()
    assert popularity.rarity(BLOCKS, 0, 40) == 1.0
    assert popularity.price(one, 1.0) == 1.0


def test_rarity_follows_use() -> None:
    """A prefix is rarer the less it is used, and its end is rarer than its beginning."""
    (one,) = members(1)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(9):
        popularity.note(one, BLOCKS, 0, 16, 100)
    popularity.note(one, BLOCKS, 0, 64, 100)
    assert popularity.rarity(BLOCKS, 0, 16) == pytest.approx(1 / 11)
    assert popularity.rarity(BLOCKS, 16, 64) == pytest.approx(1 / 2)
    assert popularity.rarity(BLOCKS, 0, 64) == pytest.approx((16 / 11 + 48 / 2) / 64)


def test_copies_into_idle_pools_are_cheap() -> None:
    """A copy costs less the less its target pool is used."""
    busy, idle = members(2)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(50):
        popularity.note(busy, BLOCKS, 40, 40, 100)
    rarity = popularity.rarity(BLOCKS, 0, 40)
    assert popularity.price(idle, rarity) < 0.05
    assert popularity.price(busy, rarity) > 10 * popularity.price(idle, rarity)
    assert popularity.price(busy, 10 * rarity) == 1.0


def test_uses_of_long_ago_are_forgotten() -> None:
    (one,) = members(1)
    popularity = Popularity()
    rarities = []
    for _ in range(3):
        for _ in range(TURNOVERS):
            if popularity.note(one, BLOCKS, 100, 100, 100):
                popularity.begin(pools=100)
        rarities.append(popularity.rarity(BLOCKS, 0, 100))
    for _ in range(3 * TURNOVERS):
        if popularity.note(one, [-1] * 100, 0, 0, 100):
            popularity.begin(pools=100)
    assert rarities[0] < 1
    assert popularity.rarity(BLOCKS, 0, 100) == 1.0
    assert popularity.price(one, 0.1) == pytest.approx(0.2)


def test_counts_are_bounded() -> None:
    """No more is counted than there is room for, however large the pools are."""
    (one,) = members(1)
    popularity = Popularity()
    for number in range(3 * MOST_COUNTED):
        if popularity.note(one, [number], 1, 1, 100):
            popularity.begin(pools=1 << 40)
        assert len(popularity._uses) <= MOST_COUNTED + 1
    assert len(popularity._uses_before) <= MOST_COUNTED + 1


def test_a_member_that_left_is_forgotten() -> None:
    (one,) = members(1)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(50):
        popularity.note(one, BLOCKS, 40, 40, 100)
    popularity.forget(one)
    assert popularity.price(one, 0.1) == pytest.approx(0.2)
