"""Policies to compare with, in the simulator only: those of other routers, and one with perfect knowledge."""

import bisect
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import count

import orjson
from xxhash import xxh3_64_intdigest

from balancer.fleet.member import Member
from balancer.routing.policies import Choice
from balancer.routing.popularity import Popularity
from balancer.routing.prefix_aware import ALIKE, COPY_PRICE, LEAST_SHARE, relative_loads, routing_cost
from balancer.routing.prefix_index import TOKENS_PER_BLOCK
from balancer.routing.prompt import Prompt
from tests.lab.model import ReplicaModel
from tests.lab.radix import TOKEN
from tests.lab.workloads import Turn

ModelsOf = Callable[[Member], Sequence[ReplicaModel]]  # one for each of its data-parallel ranks


class _Unaware:
    """A policy that learns nothing from answers."""

    reads_prompts = True

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        pass

    def forget(self, member: Member) -> None:
        pass


class CacheAware(_Unaware):
    """The rules that sglang-router documents for cache_aware, with its published defaults.

    If loads differ much, it picks the shortest queue. Otherwise, if more than CACHE_THRESHOLD of the text is known, it
    picks the member that last got that text; if not, the least loaded. It sees only text, no images. Its tree of
    characters is a tree of blocks here, and is not trimmed: the defaults leave more room than a simulation fills.
    """

    name = "cache_aware"
    CACHE_THRESHOLD = 0.3
    BALANCE_ABS = 64
    BALANCE_REL = 1.5

    def __init__(self) -> None:
        self._owner: dict[int, Member] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        loads = [member.in_flight for member in members]
        shortest = self.least(members)
        blocks = Prompt(prompt.path, [_text_only(prompt.body[0])]).blocks
        depth = next((n for n, block in enumerate(blocks) if block not in self._owner), len(blocks))
        most, least = max(loads), min(loads)
        chosen = shortest
        if (most - least <= self.BALANCE_ABS or most <= self.BALANCE_REL * least) and blocks:
            owner = self._owner[blocks[depth - 1]] if depth else shortest
            if depth / len(blocks) > self.CACHE_THRESHOLD and owner in members:
                chosen = owner
        for block in blocks:
            self._owner[block] = chosen
        return Choice(chosen, "cache aware", depth / len(blocks) if blocks else 0.0)

    def least(self, members: Sequence[Member]) -> Member:
        return min(members, key=lambda member: (member.in_flight, member.id))


def _text_only(body: bytes) -> bytes:
    request = orjson.loads(body)
    for message in request["messages"]:
        message["content"] = [part for part in message["content"] if part["type"] == "text"]
    return orjson.dumps(request)


class BoundedHashing(_Unaware):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016), by the prompt's first block.

    A member that would exceed LOAD_FACTOR times the mean load passes the request on along the ring. The load factor and
    the points per member are KubeAI's defaults. The block is cut from the tokens, since Prompt's differ between runs.
    """

    name = "bounded_hashing"
    LOAD_FACTOR = 1.25
    POINTS = 256

    def __init__(self) -> None:
        self._ring: list[tuple[int, int]] = []
        self._ids: set[int] = set()

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        by_id = {member.id: member for member in members}
        if by_id.keys() != self._ids:
            self._ids = set(by_id)
            self._ring = sorted((xxh3_64_intdigest(b"%d:%d" % (id, n)), id) for id in by_id for n in range(self.POINTS))
        bound = self.LOAD_FACTOR * (sum(member.in_flight for member in members) + 1) / len(members)
        assert isinstance(prompt, Turn)
        first_block = prompt.tokens[: int(TOKENS_PER_BLOCK) * TOKEN]
        start = bisect.bisect(self._ring, (xxh3_64_intdigest(first_block), 0))
        for step in count(start):  # some member is at most at the mean, hence below the bound
            member = by_id[self._ring[step % len(self._ring)][1]]
            if member.in_flight < bound:
                return Choice(member, "hashed")
        raise AssertionError


class Smg(CacheAware):
    """The rules that smg documents for cache_aware, with its published defaults.

    As in sglang-router, except that if little is known or loads differ much, a request goes to the shortest expected
    wait: waiting tokens divided by a nominal throughput, plus a barrier before a full KV pool. The real one reads what
    replicas report every ten seconds and guesses in between; here the reports are fresh.
    """

    name = "smg"
    KV_PRESSURE = 0.15
    THROUGHPUT = 2000.0

    def __init__(self, models_of: ModelsOf) -> None:
        super().__init__()
        self._models_of = models_of

    def least(self, members: Sequence[Member]) -> Member:
        return min(members, key=lambda member: (self._expected_wait(member), member.in_flight, member.turn))

    def _expected_wait(self, member: Member) -> float:
        models = self._models_of(member)
        waiting = sum(len(request.tokens) // TOKEN for model in models for request in model.waiting)
        used = min(0.999, _used(models))
        return waiting / self.THROUGHPUT + self.KV_PRESSURE * used / (1 - used)


class LlmD(_Unaware):
    """llm-d's scheduler as its guides set it up: the highest weighted sum of three scores from 0 to 1.

    The scores are the share of the prompt that is known at the replica, the free share of its KV pool, and how short
    its queue is between the longest and the shortest. For each replica it keeps the KNOWN most recently used blocks,
    whatever the size of the pool, and it compares at most COMPARED; sizes are in our blocks. Here it sees queues and
    pools as they are at that moment.
    """

    name = "llm-d"
    PREFIX, QUEUE, KV = 3.0, 2.0, 2.0
    KNOWN = 3906
    COMPARED = 32

    def __init__(self, models_of: ModelsOf) -> None:
        self._models_of = models_of
        self._known: dict[Member, OrderedDict[int, None]] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        blocks = prompt.blocks[: self.COMPARED]
        queues = {member: sum(len(model.waiting) for model in self._models_of(member)) for member in members}
        longest, shortest = max(queues.values()), min(queues.values())
        range_ = longest - shortest
        shares = {member: self._share(member, blocks) for member in members}

        def score(member: Member) -> float:
            queue = (longest - queues[member]) / range_ if range_ else 1.0
            free = 1 - _used(self._models_of(member))
            return self.PREFIX * shares[member] + self.QUEUE * queue + self.KV * free

        best = max(members, key=lambda member: (score(member), -member.turn))
        known = self._known.setdefault(best, OrderedDict())
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self.KNOWN:
            known.popitem(last=False)
        return Choice(best, "scored", shares[best])

    def _share(self, member: Member, blocks: list[int]) -> float:
        known = self._known.get(member, {})
        depth = next((n for n, block in enumerate(blocks) if block not in known), len(blocks))
        return depth / len(blocks) if blocks else 0.0


def _used(models: Sequence[ReplicaModel]) -> float:
    """The share of the KV pools that requests hold."""
    return sum(model.used_tokens for model in models) / sum(model.settings.max_total_tokens for model in models)


class Oracle(_Unaware):
    """Sees what the replicas really have cached, and what they are about to compute.

    It counts each member's work as prefix_aware does, but by the tokens that are really cached. It does not know what a
    copy costs either, so each workload is played three times and the best result is the oracle's: with expensive
    copies, with free ones, and with copies that get cheaper the more a prefix is used.
    """

    name = "oracle"

    def __init__(self, models_of: ModelsOf, copy_price: float = COPY_PRICE, by_popularity: bool = False) -> None:
        self._models_of = models_of
        self._copy_price = copy_price
        self._popularity = Popularity() if by_popularity else None
        self._coming: dict[Member, Counter[int]] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        assert isinstance(prompt, Turn)
        blocks, tokens = prompt.blocks, len(prompt.tokens) // TOKEN
        found = {member: self._found(member, prompt) for member in members}
        occupied = {member: self._occupied(member) for member in members}
        in_blocks = {member: tokens_there * len(blocks) // tokens for member, tokens_there in found.items()}
        deepest = max(in_blocks.values())

        def price(member: Member) -> float:
            if self._popularity is None or in_blocks[member] == deepest:
                return self._copy_price * occupied[member]
            rarity = self._popularity.rarity(blocks, in_blocks[member], deepest)
            return self._copy_price * occupied[member] * self._popularity.price(member, rarity)

        depths = {member: tokens_there / TOKENS_PER_BLOCK for member, tokens_there in found.items()}
        costs = routing_cost(members, tokens / TOKENS_PER_BLOCK, depths, relative_loads(members), price)
        best = min(members, key=lambda member: (costs[member], member.turn))
        if found[best] < LEAST_SHARE * tokens:
            alike = [member for member in members if costs[member] < costs[best] + ALIKE]
            best = min(alike, key=lambda member: (int(10 * occupied[member]), costs[member], member.turn))
        self._coming.setdefault(best, Counter()).update(blocks)
        if self._popularity and self._popularity.note(best, blocks, in_blocks[best], deepest, self._pool(best)):
            self._popularity.begin(sum(map(self._pool, members)))
        return Choice(best, "seen", found[best] / tokens, round((tokens - found[best]) / TOKENS_PER_BLOCK))

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        coming = self._coming[choice.member]
        for block in prompt.blocks:
            coming[block] -= 1
            if not coming[block]:
                del coming[block]

    def _pool(self, member: Member) -> int:
        """What its KV pools hold, in blocks."""
        return int(sum(model.settings.max_total_tokens for model in self._models_of(member)) / TOKENS_PER_BLOCK)

    def _occupied(self, member: Member) -> float:
        """The share of the KV pools that is not free."""
        models = self._models_of(member)
        free = sum(model.free_tokens for model in models)
        return 1 - free / sum(model.settings.max_total_tokens for model in models)

    def _found(self, member: Member, prompt: Turn) -> int:
        """Tokens that are cached or coming; averaged over its ranks, since any of them may get the request."""
        models = self._models_of(member)
        found = sum(model.cache.predict(prompt.tokens) for model in models) // len(models)
        coming = self._coming.get(member)
        if coming and len(models) == 1 and prompt.blocks:
            blocks = prompt.blocks
            depth = next((n for n, block in enumerate(blocks) if block not in coming), len(blocks))
            found = max(found, depth * len(prompt.tokens) // TOKEN // len(blocks))
        return found
