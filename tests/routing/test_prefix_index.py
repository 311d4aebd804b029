"""The index of cached prefixes: what it matches, what it forgets, and that it cannot grow."""

import math
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balancer.fleet.member import Member
from balancer.routing.prefix_index import MOST_BLOCKS, Coming, PrefixIndex
from balancer.routing.prompt import BLOCK_BYTES
from tests.support.fleets import fleet_of


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


def test_forgotten_member_leaves_nothing() -> None:
    """A forgotten member leaves nothing behind, and its slot is used again."""
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


def test_few_tokens_per_block() -> None:
    """A member that makes few tokens of a block has room for more blocks."""
    (one,) = members(1, 100)
    index = PrefixIndex()
    index.add(one, [1])
    before = index.capacity(one)
    for _ in range(200):
        index.learn(one, blocks=30, tokens=30 * BLOCK_BYTES // 8)
    assert before == 100
    assert 195 <= index.capacity(one) <= 200


def test_short_prompts_say_nothing_of_capacity() -> None:
    """A prompt that is too short for a block says nothing about the capacity."""
    (one,) = members(1, 100)
    index = PrefixIndex()
    index.add(one, [1])
    index.learn(one, blocks=0, tokens=12)
    index.learn(one, blocks=3, tokens=0)
    assert index.capacity(one) == 100


def test_ranks_come_to_hold_the_same_so_one_pool_counts() -> None:
    (one,) = members(1, 100)
    one.ranks = 4
    assert PrefixIndex().capacity(one) == 25


def test_answers_without_token_counts() -> None:
    """A member whose answers have no token counts is assumed to be like the others."""
    one, two = members(2, 100)
    index = PrefixIndex()
    index.add(one, [1])
    index.add(two, [1])
    for _ in range(20):
        index.learn(one, blocks=30, tokens=30 * BLOCK_BYTES // 8)
    assert index.capacity(one) == index.capacity(two) == 200
    index.learn(two, blocks=30, tokens=30 * BLOCK_BYTES // 2)
    assert (index.capacity(one), index.capacity(two)) == (200, 50), "its own answers tell more"


def test_blocks_are_bounded() -> None:
    """Prompts of almost no tokens do not give a member blocks without end."""
    small, huge = members(2, 1_000)
    huge.capacity_tokens = 1 << 40
    index = PrefixIndex()
    for member in (small, huge):
        index.add(member, [1])
        for _ in range(100):
            index.learn(member, blocks=1_000, tokens=1)
    assert index.capacity(small) == 4_000
    assert index.capacity(huge) == MOST_BLOCKS


def test_new_prompts_match_at_once() -> None:
    """A prompt matches as soon as it comes, and stays only if its answer begins."""
    (one,) = members(1, 6)
    index = PrefixIndex()
    index.add(one, [1, 2, 3])
    coming = index.expect(one, [1, 2, 3, 4, 5, 6, 7, 8], 3)
    again = index.expect(one, [1, 2, 3, 4, 5, 9], 5)
    assert (coming.known, again.known) == (3, 3)
    assert matched(index, [1, 2, 3, 4, 5, 6, 7, 8]) == {"r1": 8}
    coming.over()
    assert matched(index, [1, 2, 3, 4, 5, 6]) == {"r1": 5}, "the other one would still bring those"
    again.begun()
    again.over()
    coming.begun()
    assert matched(index, [1, 2, 3, 4, 5, 9]) == {"r1": 6}
    assert len(index) == 6
    assert index.expect(one, [1, 2, 3, 4, 5, 9], 6).known == 6


def test_forgotten_member_with_requests_in_flight() -> None:
    """Prompts on their way to a forgotten member are forgotten as well."""
    one, two = members(2, 100)
    index = PrefixIndex()
    coming = [index.expect(member, [1, 2], 0) for member in (one, two, one)]
    index.forget(one)
    assert matched(index, [1, 2]) == {"r2": 2}
    coming[0].begun()
    coming[2].over()
    assert matched(index, [1, 2]) == {"r2": 2}
    assert one not in index.occupancy


class Play(RuleBasedStateMachine):
    """Prompts of a few letters come, begin and leave, and members are forgotten. Blocks chain on, as hashes do."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.fleet = members(3, 8)
        self.under_way: list[tuple[Member, list[int], Coming]] = []

    @rule(which=st.integers(0, 2), prompt=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def comes(self, which: int, prompt: list[int]) -> None:
        blocks = [hash(tuple(prompt[: size + 1])) for size in range(len(prompt))]
        member = self.fleet[which]
        depth = dict(self.index.matched(blocks)).get(member, 0)
        self.under_way.append((member, blocks, self.index.expect(member, blocks, depth)))
        assert dict(self.index.matched(blocks))[member] == len(blocks)

    @rule(which=st.integers(0, 100), begins=st.booleans())
    def ends(self, which: int, begins: bool) -> None:
        if self.under_way:
            _, _, coming = self.under_way.pop(which % len(self.under_way))
            if begins:
                coming.begun()
            coming.over()

    @rule(which=st.integers(0, 2))
    def is_forgotten(self, which: int) -> None:
        self.index.forget(self.fleet[which])
        assert self.fleet[which] not in self.index.occupancy

    @invariant()
    def nobody_has_more_than_its_pool_and_what_is_under_way(self) -> None:
        on_the_way = sum(len(blocks) for _, blocks, _ in self.under_way)
        assert len(self.index) <= 3 * 8 + on_the_way
        assert all(0 <= share <= 1 for share in self.index.occupancy.values())

    def teardown(self) -> None:
        for _, _, coming in self.under_way:
            coming.over()
        for member in self.fleet:
            self.index.forget(member)
        assert len(self.index) == 0


TestPlay = Play.TestCase


def growth_over_a_million_prompts(capacity: int) -> tuple[int, int]:
    """(blocks known in the end, bytes of memory that the last 900,000 of a million distinct prompts took)."""
    fleet = members(4, capacity)
    index = PrefixIndex()
    for number in range(1_000_000):
        if number == 100_000:
            settled = resident()
        index.add(fleet[number % 4], [number, number + (1 << 40)])
    return len(index), resident() - settled


def test_index_is_as_small_as_the_pools() -> None:
    """After a million distinct prompts the index is no larger than the pools."""
    # In a process that does nothing else: what other tests left behind comes and goes when it likes.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        known, grown = fresh.submit(growth_over_a_million_prompts, 2_000).result()
    assert known == 4 * 2_000
    assert grown < 1 << 20
