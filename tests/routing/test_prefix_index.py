"""The index of cached prefixes: what it matches, what it forgets, and that it cannot grow."""

import math
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from balancer.fleet.member import Member
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import BLOCK_BYTES
from tests.routing.fleets import fleet_of


def members(count: int, capacity_blocks: int) -> list[Member]:
    tokens = math.ceil(capacity_blocks * BLOCK_BYTES / 4)
    return list(fleet_of(count, capacity_tokens=tokens).members.values())


def matched(index: PrefixIndex, blocks: list[int]) -> dict[str, int]:
    return {member.name: depth for member, depth in index.matched(blocks)}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_each_member_matches_as_deep_as_what_it_got() -> None:
    one, two, three = members(3, 100)
    index = PrefixIndex()
    index.add(one, [1, 2, 3, 4])
    index.add(two, [1, 2, 9])
    assert matched(index, [1, 2, 3, 4, 5]) == {"r1": 4, "r2": 2}
    assert matched(index, [7, 2, 3]) == {}
    assert matched(index, []) == {}
    assert index.occupancy[one] == 0.04
    assert three not in index.occupancy


def test_the_end_of_the_oldest_prefix_is_evicted_first() -> None:
    (one,) = members(1, 6)
    index = PrefixIndex()
    index.add(one, [1, 2, 3, 4])
    index.add(one, [11, 12, 13])
    assert matched(index, [1, 2, 3, 4]) == {"r1": 3}
    assert matched(index, [11, 12, 13]) == {"r1": 3}


def test_use_keeps_a_prefix() -> None:
    (one,) = members(1, 6)
    index = PrefixIndex()
    index.add(one, [1, 2, 3])
    index.add(one, [11, 12, 13])
    index.add(one, [1, 2, 3])
    index.add(one, [21, 22])
    assert matched(index, [1, 2, 3]) == {"r1": 3}
    assert matched(index, [11, 12, 13]) == {"r1": 1}


def test_a_member_that_is_forgotten_leaves_nothing_behind_and_its_slot_is_used_again() -> None:
    one, two, three = members(3, 100)
    index = PrefixIndex()
    index.add(one, [1, 2])
    index.add(two, [2, 3])
    index.forget(one)
    assert matched(index, [1, 2]) == {}
    assert len(index) == 2
    index.add(three, [1])
    assert matched(index, [1]) == {"r3": 1}
    index.forget(two)
    index.forget(three)
    assert len(index) == 0
    assert index.occupancy == {}


def test_a_member_that_makes_few_tokens_of_a_block_has_room_for_more_of_them() -> None:
    (one,) = members(1, 100)
    index = PrefixIndex()
    index.add(one, [1])
    before = index.capacity(one)
    for _ in range(200):
        index.learn(one, blocks=30, tokens=30 * BLOCK_BYTES // 8)
    assert before == 100
    assert 195 <= index.capacity(one) <= 200


def test_a_prompt_too_short_for_a_block_says_nothing_of_the_capacity() -> None:
    (one,) = members(1, 100)
    index = PrefixIndex()
    index.add(one, [1])
    index.learn(one, blocks=0, tokens=12)
    index.learn(one, blocks=3, tokens=0)
    assert index.capacity(one) == 100


def growth_over_a_million_prompts(capacity: int) -> tuple[int, int]:
    """(blocks known in the end, bytes of memory that the last 900,000 of a million distinct prompts took)."""
    fleet = members(4, capacity)
    index = PrefixIndex()
    for number in range(1_000_000):
        if number == 100_000:
            settled = resident()
        index.add(fleet[number % 4], [number, number + (1 << 40)])
    return len(index), resident() - settled


def test_a_million_distinct_prompts_leave_the_index_as_small_as_the_pools() -> None:
    # In a process that does nothing else: what other tests left behind comes and goes when it likes.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        known, grown = fresh.submit(growth_over_a_million_prompts, 2_000).result()
    assert known == 4 * 2_000
    assert grown < 1 << 20
