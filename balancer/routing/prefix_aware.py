"""Prefix-aware routing: where most of a prompt is cached, unless that member is so far ahead in load that it is slower.

Each member that has some of it scores locality - LOAD_WEIGHT x relative load. The highest wins if it is above
LEAST_SHARE, else the least loaded member does. Locality is the share of the prompt's blocks that the member has;
relative load is (in flight - least in flight) / (max(4, mean in flight) + least in flight). So a difference that is
chance is no reason to leave a cache, nor is one request more where few are in flight; but when a member is nearly
idle, a prefix that all others are busy with goes there too. (vLLM's production-stack divides by the mean alone.) Among
the least loaded, a new prefix goes where the KV pool has most room.
"""

from collections.abc import Mapping, Sequence

from balancer.fleet.member import Member
from balancer.routing.policies import Choice, turn
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import Prompt

# `make simulate` with other values here: below 0.8 a prefix that all share leaves members idle (0.7: 4 % less goodput
# on 8 members; 0.5 with the mean alone as divisor: 15 %). Above 1.0 requests leave their prefix by chance (1.2: 11 %
# less on two CPU replicas, and 4 % less where two pools hold all prefixes just so).
LOAD_WEIGHT = 0.9
LEAST_MEAN = 4.0
# A match below this says little more than that all prompts here begin alike.
LEAST_SHARE = 0.1
# Answers that reuse less than this part of what was predicted, so many in a row, say that the cache is gone. Requests
# that are prefilled together miss together, and prefixes are evicted early: at two in a row that was taken for a flush.
DOUBT = 0.1
FLUSHED_AFTER = 4


class PrefixAware:
    """The policy and what it knows of the caches."""

    name = "prefix_aware"

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self._doubts: dict[Member, int] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        blocks = prompt.blocks
        load_of = _loads(members)
        loads = load_of.values()
        least = min(loads)
        weight = LOAD_WEIGHT / (max(LEAST_MEAN, sum(loads) / len(loads)) + least)
        best: Member | None = None
        best_score, matched = LEAST_SHARE, 0
        for member, depth in self.index.matched(blocks):
            share = depth / len(blocks)
            if share < best_score or (load := load_of.get(member)) is None:
                continue  # no load would make it the best; or it is full, or tried already
            score = share - weight * (load - least)
            if score > best_score or (best and score == best_score and member.turn < best.turn):
                best, best_score, matched = member, score, depth
        if best is None:
            best = self._roomiest(load_of, least)
        if blocks:
            self.index.add(best, blocks)
        return Choice(best, "prefix" if matched else "room", matched / len(blocks) if blocks else 0.0)

    def _roomiest(self, load_of: Mapping[Member, float], least: float) -> Member:
        """Among the least loaded members the one whose pool has most room for a new prefix; then in turn."""
        lightest = [member for member, load in load_of.items() if load - least < 1]
        occupied = self.index.occupancy
        tenths = [int(occupied.get(member, 0.0) * 10) for member in lightest]
        roomiest = min(tenths)
        return min((one for one, tenth in zip(lightest, tenths, strict=True) if tenth == roomiest), key=turn)

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        self.index.learn(choice.member, len(prompt.blocks), prompt_tokens)
        if not choice.matched or cached_tokens is None or choice.member not in self.index.occupancy:
            return  # nothing to judge, or it left meanwhile
        if cached_tokens >= DOUBT * choice.matched * prompt_tokens:
            self._doubts.pop(choice.member, None)
            return
        doubts = self._doubts[choice.member] = self._doubts.get(choice.member, 0) + 1
        if doubts >= FLUSHED_AFTER:
            self.forget(choice.member)
            self.index.add(choice.member, prompt.blocks)

    def forget(self, member: Member) -> None:
        self._doubts.pop(member, None)
        self.index.forget(member)


def _loads(members: Sequence[Member]) -> dict[Member, float]:
    """Requests in flight; where the members' limits differ, as if all had the mean limit."""
    limits = {member.limit for member in members}
    if len(limits) == 1:
        return {member: member.in_flight for member in members}
    mean = sum(member.limit for member in members) / len(members)
    return {member: member.in_flight * mean / member.limit for member in members}
