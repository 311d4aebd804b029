"""Which replica has probably cached which prefix: per member the blocks it saw last, as many as its KV pool holds."""

from collections import OrderedDict

from balancer.fleet.member import Member
from balancer.routing.prompt import BLOCK_BYTES

# Before a member's answers say how many tokens it makes of a block: English has about 4 bytes a token.
TOKENS_PER_BLOCK = BLOCK_BYTES / 4
LEARNING_RATE = 0.05
UNKNOWN_CAPACITY = 65_536  # tokens


class _Cache:
    """One member's blocks, the least recently used first."""

    __slots__ = ("answers", "blocks", "slot", "tokens_per_block")

    def __init__(self, slot: int) -> None:
        self.slot = slot  # its bit in `PrefixIndex._owners`
        self.blocks: OrderedDict[int, None] = OrderedDict()  # a plain dict is slow to lose its oldest key
        self.tokens_per_block = TOKENS_PER_BLOCK
        self.answers = 0  # that told how many tokens their prompts made


class PrefixIndex:
    """Block hashes of all members in one table: each block maps to a bit set of the members that have it.

    Memory is bounded by construction: a member never has more blocks than its KV pool is taken to hold, and a block
    that nobody has is not in the table.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}
        self._caches: dict[Member, _Cache] = {}
        self._members: dict[int, Member] = {}  # by slot
        # The share of its KV pool that is probably in use, from 0 to 1; who is not in it has an empty one.
        self.occupancy: dict[Member, float] = {}

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._owners)

    def capacity(self, member: Member) -> int:
        """How many blocks of prompt this member's KV pool is taken to hold."""
        cache = self._caches.get(member)
        tokens_per_block = cache.tokens_per_block if cache else TOKENS_PER_BLOCK
        return max(1, int((member.capacity_tokens or UNKNOWN_CAPACITY) / tokens_per_block))

    def matched(self, blocks: list[int]) -> list[tuple[Member, int]]:
        """The members that have the first block, and how many of the first blocks each has."""
        owners = self._owners
        found: list[tuple[Member, int]] = []
        if not blocks:
            return found
        depth, having = 0, owners.get(blocks[0], 0)
        for block in blocks:
            still_having = having & owners.get(block, 0)
            if still_having != having:
                self._note(having & ~still_having, depth, found)
                having = still_having
                if not having:
                    return found
            depth += 1
        self._note(having, depth, found)
        return found

    def _note(self, slots: int, depth: int, found: list[tuple[Member, int]]) -> None:
        while slots and depth:
            lowest = slots & -slots
            found.append((self._members[lowest.bit_length() - 1], depth))
            slots ^= lowest

    def add(self, member: Member, blocks: list[int]) -> None:
        """The member gets this prompt: its blocks are the most recently used now, the first one the most of all."""
        cache = self._caches.get(member) or self._new_cache(member)
        owners, held, bit = self._owners, cache.blocks, 1 << cache.slot
        for block in reversed(blocks):  # what is evicted first is the end of a prefix, as in a radix tree
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                owners[block] = owners.get(block, 0) | bit
        capacity = self.capacity(member)
        for _ in range(len(held) - capacity):
            self._disown(held.popitem(last=False)[0], bit)
        self.occupancy[member] = len(held) / capacity

    def learn(self, member: Member, blocks: int, tokens: int) -> None:
        """An answer told how many tokens a prompt of that many blocks made: a running mean, for the capacity.

        The first answers weigh in full: what is forgotten while the capacity is taken for too small does not come back.
        """
        cache = self._caches.get(member)
        if cache and blocks and tokens > 0:
            seen = min(max(tokens / blocks, TOKENS_PER_BLOCK / 8), TOKENS_PER_BLOCK * 8)
            cache.answers += 1
            cache.tokens_per_block += max(LEARNING_RATE, 1 / cache.answers) * (seen - cache.tokens_per_block)

    def forget(self, member: Member) -> None:
        """It left, restarted or flushed its cache."""
        cache = self._caches.pop(member, None)
        self.occupancy.pop(member, None)
        if cache:
            del self._members[cache.slot]
            for block in cache.blocks:
                self._disown(block, 1 << cache.slot)

    def _new_cache(self, member: Member) -> _Cache:
        slot = next(number for number in range(len(self._members) + 1) if number not in self._members)
        self._members[slot] = member
        self._caches[member] = cache = _Cache(slot)
        return cache

    def _disown(self, block: int, bit: int) -> None:
        left = self._owners[block] & ~bit
        if left:
            self._owners[block] = left
        else:
            del self._owners[block]
