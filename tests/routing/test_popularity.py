"""How often prefixes are used, and what a copy of them costs by that."""

import pytest

from balancer.fleet.member import Member
from balancer.routing.popularity import MOST_COUNTED, TURNOVERS, Popularity
from tests.support.fleets import fleet_of

BLOCKS = list(range(100))


def members(count: int) -> list[Member]:
    return list(fleet_of(count).members.values())


def test_what_nobody_used_is_as_rare_as_can_be_and_costs_its_whole_price() -> None:
    (one,) = members(1)
    popularity = Popularity()
    assert popularity.rarity(BLOCKS, 0, 40) == 1.0
    assert popularity.price(one, 100, 1.0) == 1.0


def test_a_prefix_is_the_rarer_the_less_it_is_used_and_its_end_rarer_than_its_beginning() -> None:
    (one,) = members(1)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(9):
        popularity.note(one, BLOCKS, 0, 16)
    popularity.note(one, BLOCKS, 0, 64)
    assert popularity.rarity(BLOCKS, 0, 16) == pytest.approx(1 / 11)
    assert popularity.rarity(BLOCKS, 16, 64) == pytest.approx(1 / 2)
    assert popularity.rarity(BLOCKS, 0, 64) == pytest.approx((16 / 11 + 48 / 2) / 64)


def test_a_copy_costs_the_less_the_less_the_pool_it_goes_to_is_used() -> None:
    busy, idle = members(2)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(50):
        popularity.note(busy, BLOCKS, 40, 40)
    rarity = popularity.rarity(BLOCKS, 0, 40)
    assert popularity.price(idle, 100, rarity) < 0.05
    assert popularity.price(busy, 100, rarity) > 10 * popularity.price(idle, 100, rarity)
    assert popularity.price(busy, 10, rarity) == 1.0


def test_uses_of_long_ago_are_forgotten() -> None:
    (one,) = members(1)
    popularity = Popularity()
    rarities = []
    for _ in range(3):
        for _ in range(TURNOVERS):
            if popularity.note(one, BLOCKS, 100, 100):
                popularity.begin(pools=100)
        rarities.append(popularity.rarity(BLOCKS, 0, 100))
    for _ in range(3 * TURNOVERS):
        if popularity.note(one, [-1] * 100, 0, 0):
            popularity.begin(pools=100)
    assert rarities[0] < 1
    assert popularity.rarity(BLOCKS, 0, 100) == 1.0
    assert popularity.price(one, 100, 0.1) == pytest.approx(0.2)


def test_no_more_is_counted_than_there_is_room_for_however_large_the_pools() -> None:
    (one,) = members(1)
    popularity = Popularity()
    for number in range(3 * MOST_COUNTED):
        if popularity.note(one, [number], 1, 1):
            popularity.begin(pools=1 << 40)
        assert len(popularity._uses) <= MOST_COUNTED + 1
    assert len(popularity._uses_before) <= MOST_COUNTED + 1


def test_a_member_that_left_is_forgotten() -> None:
    (one,) = members(1)
    popularity = Popularity()
    popularity.period = 1e9
    for _ in range(50):
        popularity.note(one, BLOCKS, 40, 40)
    popularity.forget(one)
    assert popularity.price(one, 10, 0.1) == pytest.approx(0.2)
