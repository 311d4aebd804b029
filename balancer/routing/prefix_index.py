"""Which replica has probably cached which prefix: the last blocks each member saw, as many as its KV pool holds."""

from collections import OrderedDict

from balancer.fleet.member import Member
from balancer.routing.prompt import BLOCK_BYTES

# Used until an answer says how many tokens a member makes of a block: English has about 4 bytes a token.
TOKENS_PER_BLOCK = BLOCK_BYTES / 4
# The learned value stays within these limits, so that prompts made for the purpose cannot grow the index without end.
FEWEST, MOST = TOKENS_PER_BLOCK / 4, TOKENS_PER_BLOCK * 8
LEARNING_RATE = 0.05
UNKNOWN_CAPACITY = 65_536  # tokens
# The maximum number of blocks kept for a member: 13 MB of memory, 32 MiB of prompt, more than any KV pool holds today.
MOST_BLOCKS = 65_536


class TokensPerBlock:
    """How many tokens are made of a block: a running mean over answers."""

    __slots__ = ("answers", "mean")

    def __init__(self) -> None:
        self.answers = 0
        self.mean = TOKENS_PER_BLOCK

    def learn(self, blocks: int, tokens: int) -> None:
        """The first answers weigh fully: blocks forgotten while a pool is thought too small do not come back."""
        seen = min(max(tokens / blocks, FEWEST), MOST)
        self.answers += 1
        self.mean += max(LEARNING_RATE, 1 / self.answers) * (seen - self.mean)


class _Cache:
    """One member's blocks."""

    __slots__ = ("blocks", "coming", "slot", "tokens")

    def __init__(self, slot: int) -> None:
        self.slot = slot  # its bit in `PrefixIndex._owners`
        # Least recently used first; a plain dict is slow to lose its oldest key.
        self.blocks: OrderedDict[int, None] = OrderedDict()
        self.coming: dict[int, int] = {}  # blocks of prompts not yet being answered: in how many prompts each is
        self.tokens = TokensPerBlock()


class Coming:
    """A prompt that a member was given. Its blocks match from then on, and stay there if its answer begins.

    `known` is how many of its first blocks earlier answers show to be there already. Call `over` in the end.
    """

    __slots__ = ("_blocks", "_cache", "_index", "_member", "known")

    def __init__(self, index: "PrefixIndex", member: Member, cache: _Cache, blocks: list[int], known: int) -> None:
        self._index = index
        self._member = member
        self._cache: _Cache | None = cache
        self._blocks = blocks
        self.known = known

    def begun(self) -> None:
        """The member has computed the prompt."""
        if self._cache is not None:
            self._index.arrived(self._member, self._cache, self._blocks, self.known, True)
            self._cache = None

    def over(self) -> None:
        """If the answer did not begin, the prompt leaves no trace."""
        if self._cache is not None:
            self._index.arrived(self._member, self._cache, self._blocks, self.known, False)
            self._cache = None


class PrefixIndex:
    """Block hashes of all members in one table: each block maps to a bit set of the members that have it.

    Memory is bounded by construction: a member never has more blocks than its KV pool is thought to hold plus those of
    the prompts that it has not begun to answer, and a block that no member has is not in the table.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}
        self._caches: dict[Member, _Cache] = {}
        self._members: dict[int, Member] = {}  # by slot
        self._tokens = TokensPerBlock()  # of all members
        # The share of a member's KV pool that is probably in use, from 0 to 1; a missing member's pool is empty.
        self.occupancy: dict[Member, float] = {}

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._owners)

    def capacity(self, member: Member) -> int:
        """How many blocks of prompt this member's KV pool is thought to hold.

        A member whose answers do not report their tokens, as most streams do not, is assumed to be like the others.
        Ranks that share a replica's requests come to hold the same, so only one of their pools counts.
        """
        cache = self._caches.get(member)
        tokens = cache.tokens if cache and cache.tokens.answers else self._tokens
        pool = (member.capacity_tokens or UNKNOWN_CAPACITY) / member.ranks
        return min(max(1, int(pool / tokens.mean)), MOST_BLOCKS)

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

    def expect(self, member: Member, blocks: list[int], matched: int) -> Coming:
        """The member is given this prompt, of which it matched `matched` blocks. New blocks push nothing out yet."""
        cache = self._caches.get(member) or self._new_cache(member)
        held, coming, owners, bit = cache.blocks, cache.coming, self._owners, 1 << cache.slot
        known = matched
        while known and blocks[known - 1] not in held:
            known -= 1  # this block is only expected from prompts that are under way
        for block in reversed(blocks[:known]):
            held.move_to_end(block)
        for block in blocks[known:]:
            count = coming.get(block, 0)
            coming[block] = count + 1
            if not count:
                owners[block] = owners.get(block, 0) | bit
        self._measure(member, cache, self.capacity(member))
        return Coming(self, member, cache, blocks, known)

    def arrived(self, member: Member, cache: _Cache, blocks: list[int], known: int, has_come: bool) -> None:
        """The blocks that `expect` announced have come (`has_come`), or will not come."""
        if known == len(blocks) or self._caches.get(member) is not cache:
            return  # no block is new, or the member left or was forgotten meanwhile
        held, coming, bit = cache.blocks, cache.coming, 1 << cache.slot
        for block in blocks[known:]:
            if (count := coming[block]) > 1:
                coming[block] = count - 1
                continue
            del coming[block]
            if not has_come and block not in held:
                self._disown(block, bit)
        if has_come:
            self.add(member, blocks)
        else:
            self._measure(member, cache, self.capacity(member))

    def add(self, member: Member, blocks: list[int]) -> None:
        """The member has this prompt: its blocks are now the most recently used, the first one most recently."""
        cache = self._caches.get(member) or self._new_cache(member)
        owners, held, bit = self._owners, cache.blocks, 1 << cache.slot
        for block in reversed(blocks):  # the end of a prefix is evicted first, as in a radix tree
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                owners[block] = owners.get(block, 0) | bit
        capacity = self.capacity(member)
        for _ in range(len(held) - capacity):
            block, _ = held.popitem(last=False)
            if block not in cache.coming:
                self._disown(block, bit)
        self._measure(member, cache, capacity)

    def learn(self, member: Member, blocks: int, tokens: int) -> None:
        """An answer reported how many tokens a prompt of that many blocks has; the capacity depends on it."""
        cache = self._caches.get(member)
        if cache and blocks and tokens > 0:
            cache.tokens.learn(blocks, tokens)
            self._tokens.learn(blocks, tokens)

    def forget(self, member: Member) -> None:
        """The member left, restarted or flushed its cache."""
        cache = self._caches.pop(member, None)
        self.occupancy.pop(member, None)
        if cache:
            del self._members[cache.slot]
            for block in cache.blocks.keys() | cache.coming.keys():
                self._disown(block, 1 << cache.slot)

    def _new_cache(self, member: Member) -> _Cache:
        slot = next(number for number in range(len(self._members) + 1) if number not in self._members)
        self._members[slot] = member
        self._caches[member] = cache = _Cache(slot)
        return cache

    def _measure(self, member: Member, cache: _Cache, capacity: int) -> None:
        self.occupancy[member] = min(1.0, (len(cache.blocks) + len(cache.coming)) / capacity)

    def _disown(self, block: int, bit: int) -> None:
        left = self._owners[block] & ~bit
        if left:
            self._owners[block] = left
        else:
            del self._owners[block]
