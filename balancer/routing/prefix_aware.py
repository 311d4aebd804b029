"""Prefix-aware routing: where most of a prompt is cached, unless that member is so far ahead in load that it is slower.

For each member: locality - LOAD_WEIGHT x relative load - ROOM_WEIGHT x occupancy, the highest wins. Locality is the
share of the prompt's blocks that the member has; relative load is (in flight - least in flight) / max(4, mean in
flight), so that with few requests in flight one more is no reason to leave a cache, and no member runs away (the form
is vLLM production-stack's, the window around the least load is SGLang's answer to pile-ups). Occupancy spreads new
prefixes over the pools that still have room for them; it only speaks where nothing of a prompt is cached.
"""

from collections.abc import Sequence

from balancer.fleet.member import Member
from balancer.routing.policies import Choice, turn
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import Prompt

LOAD_WEIGHT = 1.0
ROOM_WEIGHT = 0.25
LEAST_MEAN = 4.0
# An answer that reuses less than this part of what was predicted, twice in a row, says that the cache is gone.
DOUBT = 0.1
FLUSHED_AFTER = 2


class PrefixAware:
    """The policy and what it knows of the caches."""

    name = "prefix_aware"

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self._doubts: dict[Member, int] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        blocks = prompt.blocks
        loads = _loads(members)
        least = min(loads)
        spread = max(LEAST_MEAN, sum(loads) / len(loads))
        best = self._best_without_match(members, loads, least, bool(blocks))
        best_score = -LOAD_WEIGHT * (loads[members.index(best)] - least) / spread
        matched = 0
        depths = self.index.matched(blocks)
        if depths:
            best_score -= ROOM_WEIGHT * self.index.occupancy(best)
            for member, load in zip(members, loads, strict=True):
                depth = depths.get(self.index.slot(member), 0)
                if not depth:
                    continue
                score = depth / len(blocks) - LOAD_WEIGHT * (load - least) / spread
                if score > best_score or (score == best_score and member.turn < best.turn):
                    best, best_score, matched = member, score, depth
        if blocks:
            self.index.add(best, blocks)
        share = matched / len(blocks) if blocks else 0.0
        return Choice(best, "prefix" if matched else "room", share)

    def _best_without_match(
        self, members: Sequence[Member], loads: Sequence[float], least: float, has_prompt: bool
    ) -> Member:
        """The least loaded member; among those the one whose pool has most room for a new prefix, then in turn."""
        idle = [member for member, load in zip(members, loads, strict=True) if load - least < 1]
        if has_prompt:
            return min(idle, key=lambda member: (round(self.index.occupancy(member), 1), member.turn))
        return min(idle, key=turn)

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        self.index.learn(choice.member, sum(map(len, prompt.body)), prompt_tokens)
        if not choice.matched or cached_tokens is None:
            return
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


def _loads(members: Sequence[Member]) -> list[float]:
    """Requests in flight; where the members' limits differ, as if all had the mean limit."""
    limits = [member.limit for member in members]
    if min(limits) == max(limits):
        return [member.in_flight for member in members]
    mean = sum(limits) / len(limits)
    return [member.in_flight * mean / member.limit for member in members]
