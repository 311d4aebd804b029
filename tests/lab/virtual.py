"""Many replica models under one virtual clock: the discrete-event loop of a simulator.

python -m tests.lab.virtual     prints how many simulated requests a second of CPU time it manages
"""

import heapq
import math
import random
import time
from collections.abc import Iterator, Sequence

from tests.lab.model import ModelSettings, ReplicaModel
from tests.lab.radix import TOKEN
from tests.lab.request import Request


class VirtualReplicas:
    """Replicas whose steps end in the order of virtual time. `now` is in seconds and never goes back."""

    def __init__(self, models: Sequence[ReplicaModel]) -> None:
        self.models = models
        self.now = 0.0
        self._due: list[tuple[float, int]] = []  # may be out of date: a model's own next_time() decides

    def submit(self, index: int, request: Request) -> None:
        """A request reaches a replica now. Raises QueueFull or TooLong."""
        try:
            self.models[index].submit(request, self.now)
        finally:
            self._note(index)

    def abort(self, index: int, request: Request) -> None:
        """The client of a request leaves now."""
        self.models[index].abort(request, self.now)
        self._note(index)

    def run(self, until: float = math.inf) -> Iterator[tuple[int, Request]]:
        """Let time pass. Yields each request that finishes or leaves, with its replica; `now` is that moment.

        What the caller does before the next one, such as a new `submit`, happens at that moment.
        """
        due = self._due
        while due and due[0][0] <= until:
            at, index = heapq.heappop(due)
            model = self.models[index]
            if model.next_time() != at:
                continue
            self.now = at
            over = model.advance(at)
            self._note(index)
            for request in over:
                yield index, request
        if until < math.inf:
            self.now = until

    def _note(self, index: int) -> None:
        due = self.models[index].next_time()
        if due < math.inf:
            heapq.heappush(self._due, (due, index))


def measure(replicas: int, requests: int, seed: int = 0) -> tuple[float, float]:
    """Simulated requests a second of CPU time, and the cached share.

    Prompts have 600 tokens, 500 of them shared by a group, with as many groups as fit the pools; answers have 75 to 225
    tokens. Each replica gets six requests a second, and the group decides the replica.
    """
    chance = random.Random(seed)
    fleet = VirtualReplicas([ReplicaModel(ModelSettings()) for _ in range(replicas)])
    groups = [chance.randbytes(500 * TOKEN) for _ in range(4 * replicas)]
    began = time.process_time()
    at = 0.0
    finished = 0
    for _ in range(requests):
        at += chance.expovariate(6.0 * replicas)
        finished += sum(1 for _ in fleet.run(at))
        group = chance.randrange(len(groups))
        request = Request(groups[group] + chance.randbytes(100 * TOKEN), chance.randrange(75, 226))
        fleet.submit(group % replicas, request)
    finished += sum(1 for _ in fleet.run())
    assert finished == requests
    cached = sum(model.cached_tokens_total for model in fleet.models)
    prompted = sum(model.prompt_tokens_total for model in fleet.models)
    return requests / (time.process_time() - began), cached / prompted


if __name__ == "__main__":
    for count in (2, 8, 64, 256):
        rate, share = measure(count, 20_000)
        print(f"{count:4} replicas: {rate:8,.0f} simulated requests a second of CPU time, {share:.0%} cached")
