"""Prefix-aware routing: to the member with the least work, counting what the choice costs the other requests.

Costs are in blocks of prompt. A member would have to compute the blocks of this prompt that it has not cached, after
those that it still computes for others. Its batch counts as in flight squared / mean in flight, so that at the mean one
more request costs two blocks and a chance difference costs little. Blocks that another member has cached would be held
twice: in a full KV pool such a copy pushes out what other requests come back for, again and again. So a prefix spreads
early while there is room. In full pools it hardly ever leaves its member, unless it is used much more than what it
would push out: then a copy soon pays, so a prompt that all requests share spreads there too. Among members with about
equal work, a new prefix goes to the pool with the most room.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from balancer.fleet.member import Member
from balancer.routing.policies import Choice, turn
from balancer.routing.popularity import Popularity
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import Prompt

# What a copied block costs beyond computing it if the KV pool is full of blocks that are used as much. Other values in
# `make simulate`: with 0, two H200s whose pools just hold all prefixes do a fifth less, and so do eight replicas with
# images; with 4, chat does a seventeenth less; with 24, nothing is more than a thirtieth worse.
COPY_PRICE = 12.0
# The mean in flight counts as at least this: otherwise one request more or less is a large part of a small mean.
LEAST_MEAN = 4.0
# Members whose costs differ by less than this, in blocks, count as equal. With 1, a tiny difference made a copy of a
# prefix while pools still looked empty, which small pools paid for: over 100 seeds of `make simulate`'s CPU scenario
# the mean TTFT was a fiftieth longer. In larger fleets 1 and 3 do equally well.
ALIKE = 3.0
# A match of less than this share of the prompt says little more than that all prompts here begin alike.
LEAST_SHARE = 0.1
# An answer is doubtful if it reuses less than the DOUBT part of what earlier answers show to be cached; FLUSHED_AFTER
# in a row mean that the cache is gone. With two in a row, early evictions were taken for a flush. The number is
# multiplied by the ranks, since one of them has a prefix and any of them may get the request.
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
        # As a rule one of a replica's ranks has it, and the replica decides which of them gets the request.
        found = {member: depth / member.ranks for member, depth in depths.items()}
        deepest = max(depths.values(), default=0)
        price = self._copy_prices(blocks, depths, deepest)
        costs = routing_cost(found, size, found, loads, price)
        best = min(costs, key=costs.__getitem__, default=None)
        if best is None or costs[best] > size + ALIKE or found[best] < LEAST_SHARE * size:
            # A member without a match costs at least `size`: compare all only if the best is worse or negligible.
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
        """What each block of the `deepest` match that a member lacks costs beyond computing it.

        In a full pool it is `COPY_PRICE`, or less if the blocks are used more than what they would push out.
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
        """The cheapest member, ties in turn; if it has next to nothing of the prompt, the roomiest of the cheapest."""
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
        known = choice.coming.known if choice.coming else 0  # other blocks may still have been under way
        if not known or cached_tokens is None or member not in self.index.occupancy:
            return  # there is nothing to judge, or the member left meanwhile
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
    """Requests in flight; if the members' limits differ, scaled as if all had the mean limit."""
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
    """The cost, in blocks, of giving each of these members a prompt of `size` blocks, `found` of them cached there.

    `loads` are those of all members; `copy_price` is the extra cost of a block that another member has cached already.
    """
    mean = max(LEAST_MEAN, sum(loads.values()) / len(loads))
    deepest = max(found.values(), default=0)
    if not deepest:  # no member has any of it: the usual case when all are compared
        return {member: size + member.computing + loads[member] * loads[member] / mean for member in members}
    costs = {}
    for member in members:
        load, depth = loads[member], found.get(member, 0)
        cost = size - depth + member.computing + load * load / mean
        if depth < deepest:
            cost += copy_price(member) * (deepest - depth)
        costs[member] = cost
    return costs
