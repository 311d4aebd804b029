"""Policies to compare with, in the simulator only: what other routers do, and what perfect knowledge would bring."""

import bisect
from collections.abc import Callable, Sequence
from itertools import count

import orjson
from xxhash import xxh3_64_intdigest

from balancer.fleet.member import Member
from balancer.routing.policies import Choice
from balancer.routing.prefix_aware import ALIKE, LEAST_SHARE, relative_loads, work
from balancer.routing.prefix_index import TOKENS_PER_BLOCK
from balancer.routing.prompt import Prompt
from tests.lab.model import ReplicaModel
from tests.lab.radix import TOKEN
from tests.lab.workloads import Turn


class _Unaware:
    """A policy that learns nothing from answers."""

    reads_prompts = True

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        pass

    def forget(self, member: Member) -> None:
        pass


class CacheAware(_Unaware):
    """The rules that sglang-router documents for cache_aware, with its published defaults.

    When the loads differ much: the shortest queue. Else, if more than CACHE_THRESHOLD of the text is known: whoever
    got that last; if not, the least loaded. It sees text alone, no images. Its tree of characters is one of blocks
    here, and is not trimmed: the defaults leave more room than a simulation fills.
    """

    name = "cache_aware"
    CACHE_THRESHOLD = 0.3
    BALANCE_ABS = 64
    BALANCE_REL = 1.5

    def __init__(self) -> None:
        self._owner: dict[int, Member] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        loads = [member.in_flight for member in members]
        shortest = min(members, key=lambda member: (member.in_flight, member.id))
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


def _text_only(body: bytes) -> bytes:
    request = orjson.loads(body)
    for message in request["messages"]:
        message["content"] = [part for part in message["content"] if part["type"] == "text"]
    return orjson.dumps(request)


class BoundedHashing(_Unaware):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016), by the prompt's first block.

    Nobody gets more than LOAD_FACTOR times the mean; who would, passes the request on along the ring. Load factor and
    points a member are KubeAI's defaults. The block is cut from the tokens here, for Prompt's differ from run to run.
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
        for step in count(start):  # somebody is below the mean, hence below the bound
            member = by_id[self._ring[step % len(self._ring)][1]]
            if member.in_flight < bound:
                return Choice(member, "hashed")
        raise AssertionError


class Oracle(_Unaware):
    """Sees what the replicas really have cached, and what they are about to compute.

    It counts what each member has to do as prefix_aware does, but by the tokens that are there, so that what is between
    the two is the price of not seeing the caches.
    """

    name = "oracle"

    def __init__(self, model_of: Callable[[Member], ReplicaModel]) -> None:
        self._model_of = model_of
        self._coming: dict[Member, list[bytes]] = {}

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        assert isinstance(prompt, Turn)
        tokens = len(prompt.tokens) // TOKEN
        found = {member: self._found(member, prompt.tokens) for member in members}
        occupied = {member: self._occupied(member) for member in members}
        blocks = {member: found[member] / TOKENS_PER_BLOCK for member in members}
        costs = work(members, tokens / TOKENS_PER_BLOCK, blocks, relative_loads(members), occupied)
        best = min(members, key=lambda member: (costs[member], member.turn))
        if found[best] < LEAST_SHARE * tokens:
            alike = [member for member in members if costs[member] < costs[best] + ALIKE]
            best = min(alike, key=lambda member: (int(10 * occupied[member]), costs[member], member.turn))
        self._coming.setdefault(best, []).append(prompt.tokens)
        return Choice(best, "seen", found[best] / tokens, round((tokens - found[best]) / TOKENS_PER_BLOCK))

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        assert isinstance(prompt, Turn)
        self._coming[choice.member].remove(prompt.tokens)

    def _occupied(self, member: Member) -> float:
        """The share of the KV pool that holds something."""
        model = self._model_of(member)
        return 1 - model.free_tokens / model.settings.max_total_tokens

    def _found(self, member: Member, tokens: bytes) -> int:
        found = self._model_of(member).cache.predict(tokens)
        for coming in self._coming.get(member, ()):
            if coming[: (found + 1) * TOKEN] == tokens[: (found + 1) * TOKEN]:
                found = max(found, _common(coming, tokens))
        return found


def _common(one: bytes, other: bytes) -> int:
    """Tokens that both begin with."""
    low, high = 0, min(len(one), len(other)) // TOKEN
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN] == other[: middle * TOKEN]:
            low = middle
        else:
            high = middle - 1
    return low
