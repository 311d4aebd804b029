"""Prefix-aware routing: to whoever has least to do, what its choice costs the others counted in.

All is told in blocks of prompt. A member would have to compute those of this prompt that it has not cached; it still
computes some for others; its batch counts in flight squared / mean in flight, so that one request more is two blocks
at the mean and a chance difference little. And what another has cached already would be there twice: in a KV pool that
is full such a copy pushes out what others come back for, again and again. So a prefix is shared out early while there
is room; when there is none it leaves its member hardly ever, unless it is used much more than what it would push out:
then a copy soon pays, and a prompt that all share is shared out in full pools too. Among those that have as little to
do, a new prefix goes where the pool has most room.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from balancer.fleet.member import Member
from balancer.routing.policies import Choice, turn
from balancer.routing.popularity import Popularity
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import Prompt

# What a copied block costs on top of its computing where the KV pool is full of what is used as much. With other values
# `make simulate` says: with 0 two H200s whose pools hold all prefixes just so do a fifth less, and eight replicas a
# fifth less of images; with 4 there is a seventeenth less of chat; with 24 nothing is more than a thirtieth worse.
COPY_PRICE = 12.0
# In flight at the mean is no more than this: else one request of two is twice the mean.
LEAST_MEAN = 4.0
# Members that differ by less have as little to do; in blocks. At 1 a prefix was copied for a hair's breadth while pools
# still looked empty, and small ones paid for it: over 100 seeds of `make simulate`'s CPU scenario the mean TTFT was a
# fiftieth longer. Larger fleets cannot tell 1 from 3.
ALIKE = 3.0
# A match below this says little more than that all prompts here begin alike.
LEAST_SHARE = 0.1
# Answers that reuse less than this part of what earlier answers show to be cached, so many in a row, say that the cache
# is gone. Prefixes are evicted early: at two in a row that was taken for a flush. Times the ranks, for one has a prefix
# and any gets the request.
DOUBT = 0.1
FLUSHED_AFTER = 4


class PrefixAware:
    """The policy and what it knows of the caches."""

    name = "prefix_aware"
    reads_prompts = True

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.popularity = Popularity()
        self._doubts: dict[Member, int] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        blocks = prompt.blocks
        size = len(blocks)
        loads = relative_loads(members)
        depths = {member: depth for member, depth in self.index.matched(blocks) if member in loads}
        # Of a replica's ranks one has it, as a rule, and which of them gets the request is the replica's business.
        found = {member: depth / member.ranks for member, depth in depths.items()}
        deepest = max(depths.values(), default=0)
        price = self._copy_prices(blocks, depths, deepest)
        costs = routing_cost(found, size, found, loads, price)
        best = min(costs, key=costs.__getitem__, default=None)
        if best is None or costs[best] > size + ALIKE or found[best] < LEAST_SHARE * size:
            # Who has none of it has all of it to compute: only if that is clearly less are there others to look at.
            costs = routing_cost(members, size, found, loads, price)
            best = self._least_or_roomiest(costs, found, size)
        if not blocks:
            return Choice(best, "room", 0.0)
        depth = depths.get(best, 0)
        coming = self.index.expect(best, blocks, depth)
        if self.popularity.note(best, blocks, depth, deepest, self.index.capacity(best)):
            self.popularity.begin(sum(map(self.index.capacity, self.index.occupancy)))
        share = found.get(best, 0)
        reason = "prefix" if share >= LEAST_SHARE * size else "room"
        return Choice(best, reason, share / size, int(size - share) if prompt.is_streamed else 0, coming)

    def _copy_prices(
        self, blocks: Sequence[int], depths: Mapping[Member, int], deepest: int
    ) -> Callable[[Member], float]:
        """What each block costs, beside computing, that a member lacks of the `deepest` match.

        In a full pool it is `COPY_PRICE`, or less where the blocks are used more than what they would push out.
        """
        occupied, popular, rarities = self.index.occupancy.get, self.popularity.price, dict[int, float]()

        def price(member: Member) -> float:
            if not (share := occupied(member, 0.0)):
                return 0.0
            depth = depths.get(member, 0)
            if (rarity := rarities.get(depth)) is None:
                rarity = rarities[depth] = self.popularity.rarity(blocks, depth, deepest)
            return COPY_PRICE * share * popular(member, rarity)

        return price

    def _least_or_roomiest(self, costs: Mapping[Member, float], found: Mapping[Member, float], size: int) -> Member:
        """Who has least to do, in turn; if that has next to nothing of the prompt, who has most room for it."""
        least = min(costs.values())
        best = min((member for member, cost in costs.items() if cost == least), key=turn)
        if found.get(best, 0) >= LEAST_SHARE * size > 0:
            return best
        occupied = self.index.occupancy
        alike = [member for member, cost in costs.items() if cost < least + ALIKE]
        return min(alike, key=lambda member: (int(occupied.get(member, 0.0) * 10), costs[member], member.turn))

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        member, size = choice.member, len(prompt.blocks)
        self.index.learn(member, size, prompt_tokens)
        known = choice.coming.known if choice.coming else 0  # the rest may have been under way, and missed together
        if not known or cached_tokens is None or member not in self.index.occupancy:
            return  # nothing to judge, or it left meanwhile
        if cached_tokens >= DOUBT * known / size * prompt_tokens:
            self._doubts.pop(member, None)
            return
        doubts = self._doubts[member] = self._doubts.get(member, 0) + 1
        if doubts >= FLUSHED_AFTER * member.ranks:
            self.forget(member)
            self.index.add(member, prompt.blocks)

    def forget(self, member: Member) -> None:
        self._doubts.pop(member, None)
        self.index.forget(member)
        self.popularity.forget(member)


def relative_loads(members: Sequence[Member]) -> dict[Member, float]:
    """In flight; where the members' limits differ, as if all had the mean limit."""
    loads: dict[Member, float] = {member: member.load for member in members}
    limits = {member.limit for member in members}
    if len(limits) > 1:
        mean = sum(member.limit for member in members) / len(members)
        loads = {member: load * mean / member.limit for member, load in loads.items()}
    return loads


def routing_cost(
    members: Iterable[Member],
    size: float,
    found: Mapping[Member, float],
    loads: Mapping[Member, float],
    copy_price: Callable[[Member], float],
) -> dict[Member, float]:
    """What it costs, in blocks, that each of these gets a prompt of `size` blocks of which it has `found` cached.

    `loads` are those of all members; `copy_price` is what a block costs that another has cached already.
    """
    mean = max(LEAST_MEAN, sum(loads.values()) / len(loads))
    deepest = max(found.values(), default=0)
    if not deepest:  # nobody has any of it: the usual case in which all members are compared
        return {member: size + member.computing + loads[member] * loads[member] / mean for member in members}
    costs = {}
    for member in members:
        load, depth = loads[member], found.get(member, 0)
        cost = size - depth + member.computing + load * load / mean
        if depth < deepest:
            cost += copy_price(member) * (deepest - depth)
        costs[member] = cost
    return costs
