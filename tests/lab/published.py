"""Workloads that others publish routing results for, in the same shape: as many groups and requests per replica."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from tests.lab.model import ModelSettings
from tests.lab.scenario import Scenario
from tests.lab.trace import Line, Played
from tests.lab.workloads import Writer

# Roughly a model of 32 billion parameters on two H100s, and one of 8 billion on an H200.
LARGE = ModelSettings(
    prefill_rate=10_000,
    itl_base=0.012,
    itl_per_request=0.0002,
    max_total_tokens=270_000,
    chunk_tokens=8192,
    max_running_requests=256,
)
SMALL = dataclasses.replace(LARGE, prefill_rate=25_000, itl_base=0.005, max_total_tokens=800_000)
PLENTY = 1_000_000  # requests at once: no limit


def shared_prefixes(replicas: int, seed: int) -> Scenario:
    """llm-d's guide: 150 groups of five requests on eight replicas; 6,000 tokens shared, 1,200 own, 1,000 out."""
    return _grouped("150 prefixes", replicas, seed, 150 / 8, 5, (6000, 1200, 1000), 1.1)


def repeated_prefixes(replicas: int, seed: int) -> Scenario:
    """smg's comparison, vllm bench's prefix_repetition: 600 prefixes of 1,000 tokens, 3 replicas, 1,800 requests."""
    return _grouped("600 prefixes", replicas, seed, 600 / 3, 3, (1000, 256, 128), 32 / 3)


def one_prefix(replicas: int, seed: int) -> Scenario:
    """A report to SGLang: one prefix of 2,548 tokens, 7,252 own, 430 out; two replicas, three a second, 36 at once."""
    one = _grouped("one prefix", replicas, seed, 1 / replicas, 200 * replicas, (2548, 7252, 430), 3 / 2)
    return dataclasses.replace(one, at_once=18 * replicas)


def _grouped(
    name: str, replicas: int, seed: int, a_replica: float, each: int, tokens: tuple[int, int, int], rate: float
) -> Scenario:
    """`a_replica` groups and `rate` requests a second per replica, `each` requests per group, in random order.

    `tokens` are shared, own and generated ones.
    """
    writer = Writer(random.Random(seed))
    shared, own, out = tokens
    prefixes = [writer.text(shared) for _ in range(round(a_replica * replicas))] * each
    writer.chance.shuffle(prefixes)
    conversations = [[writer.turn(prefix, writer.text(own), answer_tokens=out)] for prefix in prefixes]
    arrivals, at = [], 0.0
    for _ in conversations:
        at += writer.chance.expovariate(rate * replicas)
        arrivals.append(at)
    return Scenario(name, replicas, conversations, PLENTY, LARGE, arrivals)


def trace(lines: Sequence[Line], replicas: int) -> Scenario:
    """A trace of requests: at its own speed for two replicas, four times as fast for eight, and so on.

    For more than eight, copies of it run side by side: played faster, users would come back before they are answered.
    """
    copies = max(1, replicas // 8)
    played = Played(lines[: min(1500 * replicas, 24_000) // copies], copies, replicas / 2 / copies)
    return Scenario("trace", replicas, played, PLENTY, SMALL, played.arrivals)


PUBLISHED: dict[str, Callable[[int, int], Scenario]] = {
    "150 prefixes": shared_prefixes,
    "600 prefixes": repeated_prefixes,
    "one prefix": one_prefix,
}
