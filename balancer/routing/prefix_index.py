"""Which replica has probably cached which prefix: per member the blocks it saw last, as many as its KV pool holds."""

from collections import OrderedDict

from balancer.fleet.member import Member
from balancer.routing.prompt import BLOCK_BYTES

# Before a member's answers say how many bytes of prompt it makes a token of: English is about 4.
BYTES_PER_TOKEN = 4.0
UNKNOWN_CAPACITY = 65_536  # tokens


class _Cache:
    """One member's blocks, the least recently used first."""

    __slots__ = ("blocks", "bytes_per_token", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot  # its bit in `PrefixIndex._owners`
        self.blocks: OrderedDict[int, None] = OrderedDict()  # a plain dict is slow to lose its oldest key
        self.bytes_per_token = BYTES_PER_TOKEN


class PrefixIndex:
    """Block hashes of all members in one table: each block maps to a bit set of the members that have it.

    Memory is bounded by construction: a member never has more blocks than its KV pool could hold, and a block that
    nobody has is not in the table.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}
        self._caches: dict[Member, _Cache] = {}
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._owners)

    def capacity(self, member: Member) -> int:
        """How many blocks of prompt this member's KV pool holds."""
        cache = self._caches.get(member)
        bytes_per_token = cache.bytes_per_token if cache else BYTES_PER_TOKEN
        return max(1, int((member.capacity_tokens or UNKNOWN_CAPACITY) * bytes_per_token) // BLOCK_BYTES)

    def occupancy(self, member: Member) -> float:
        """The share of its KV pool that is probably in use, from 0 to 1."""
        cache = self._caches.get(member)
        return len(cache.blocks) / self.capacity(member) if cache else 0.0

    def matched(self, blocks: list[int]) -> dict[int, int]:
        """By slot: how many of the first blocks that member has. Members without the first block are not in it."""
        owners = self._owners
        depths: dict[int, int] = {}
        if not blocks:
            return depths
        remaining = owners.get(blocks[0], 0)
        depth = 0
        for block in blocks:
            still = remaining & owners.get(block, 0)
            if still != remaining:
                _note(depths, remaining & ~still, depth)
                remaining = still
                if not remaining:
                    return depths
            depth += 1
        _note(depths, remaining, depth)
        return depths

    def slot(self, member: Member) -> int:
        """The member's slot; -1 while nothing is known of it."""
        cache = self._caches.get(member)
        return cache.slot if cache else -1

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
        for _ in range(len(held) - self.capacity(member)):
            self._disown(held.popitem(last=False)[0], bit)

    def learn(self, member: Member, prompt_bytes: int, prompt_tokens: int) -> None:
        """An answer told how many tokens a prompt of that many bytes made: a running mean, for the capacity."""
        cache = self._caches.get(member)
        if cache and prompt_tokens > 0:
            seen = min(max(prompt_bytes / prompt_tokens, 0.5), 32.0)
            cache.bytes_per_token += 0.05 * (seen - cache.bytes_per_token)

    def forget(self, member: Member) -> None:
        """It left, restarted or flushed its cache."""
        cache = self._caches.pop(member, None)
        if cache:
            self._free_slots.append(cache.slot)
            for block in cache.blocks:
                self._disown(block, 1 << cache.slot)

    def _new_cache(self, member: Member) -> _Cache:
        slot = self._free_slots.pop() if self._free_slots else len(self._caches)
        self._caches[member] = cache = _Cache(slot)
        return cache

    def _disown(self, block: int, bit: int) -> None:
        left = self._owners[block] & ~bit
        if left:
            self._owners[block] = left
        else:
            del self._owners[block]


def _note(depths: dict[int, int], slots: int, depth: int) -> None:
    if depth:
        while slots:
            lowest = slots & -slots
            depths[lowest.bit_length() - 1] = depth
            slots ^= lowest
