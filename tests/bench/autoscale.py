"""Autoscaling in virtual time: SkyServe's own autoscaler and ours, with the same rule under the same loads.

    python -m tests.bench.autoscale [--only step jitter]

A replica takes START seconds to become ready, and ready ones are to get TARGET requests a second each. Counted are what
a load costs (replica-hours), how long and by how many requests it was beyond what the ready replicas are to get, how
often replicas were launched or ended, and how long the load was beyond them from the moment that asked for more.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from balancer.operate.controller.autoscale import Autoscaler, Rule
from tests.bench.install import Unavailable, cache_folder
from tests.bench.skyserve import skyserve

# Seconds until a replica is ready, and requests a second that one should get.
START = 60
TARGET = 2.0
HOUR = 3600


@dataclass(frozen=True)
class Load:
    """`rate(second)` is in requests a second; what arrives is drawn from it, by a fixed seed."""

    name: str
    about: str
    seconds: int
    rate: Callable[[int], float]
    # When more is asked for all at once, in seconds: from there the reaction is counted.
    rises_at: int | None = None
    least: int = 1

    @property
    def rule(self) -> Rule:
        """SkyServe's own defaults for the delays."""
        return Rule(self.least, 10, requests_per_second=TARGET, upscale_delay=300, downscale_delay=1200)

    def arrivals(self) -> Iterator[int]:
        draw = random.Random(self.name)
        return (poisson(draw, self.rate(second)) for second in range(self.seconds))


def poisson(draw: random.Random, mean: float) -> int:
    """Knuth's way, which is quick where the mean is small."""
    limit, product, count = math.exp(-mean), draw.random(), 0
    while product > limit:
        product *= draw.random()
        count += 1
    return count


def daily(second: int) -> float:
    return 5 - 4.5 * math.cos(second / (24 * HOUR) * math.tau)


LOADS = (
    Load("steady", "5 requests a second", 2 * HOUR, lambda _: 5),
    Load("ramp", "0.5 to 16 in two hours, and as slowly back", 4 * HOUR, lambda s: 16 - 15.5 * abs(1 - s / 2 / HOUR)),
    Load("step", "1, then 7 from the half hour on", 2 * HOUR, lambda s: 7 if s >= 1800 else 1, rises_at=1800),
    Load("burst", "1, and 15 in two minutes of each half hour", 4 * HOUR, lambda s: 15 if s % 1800 >= 1680 else 1),
    Load("diurnal", "0.5 at night, 9.5 at noon", 24 * HOUR, daily),
    Load("jitter", "3.5, then 4.2, where chance asks for 2 or 3", 6 * HOUR, lambda s: 4.2 if s >= HOUR else 3.5, HOUR),
    Load("dips", "7, and 1 for half a minute of each five", 4 * HOUR, lambda s: 1 if s % 300 >= 270 else 7),
    Load("on-off", "9 for four minutes, nothing for four", 4 * HOUR, lambda s: 9 if s % 480 < 240 else 0),
    Load("wake", "nothing for an hour, then 1", 2 * HOUR, lambda s: 1 if s >= HOUR else 0, rises_at=HOUR, least=0),
)


class Scaler(Protocol):
    """Decides once a second."""

    def look(self, second: int, arrived: int, replicas: Sequence[tuple[int, bool]]) -> tuple[int, Sequence[int]]:
        """How many replicas to launch, and which to end, after a second in which so many requests arrived.

        `replicas` are (id, is ready).
        """


class Ours:
    """controller/autoscale.py; the replicas that go first are those not ready yet, then the youngest."""

    def __init__(self, rule: Rule) -> None:
        self._autoscaler = Autoscaler(rule)

    def look(self, second: int, arrived: int, replicas: Sequence[tuple[int, bool]]) -> tuple[int, Sequence[int]]:
        target = self._autoscaler.target(second + 1.0, len(replicas), arrived, in_flight=0, queued=0)
        first_to_go = sorted(replicas, key=lambda replica: (replica[1], -replica[0]))
        return max(0, target - len(replicas)), [id for id, _ in first_to_go[: max(0, len(replicas) - target)]]


@dataclass
class Seen:
    """What a load cost and what it met. `reaction` is None where it never came, or nothing rises."""

    replica_seconds: int = 0
    seconds_over: int = 0
    requests_over: float = 0.0
    changes: int = 0
    reaction: int | None = None


def run(load: Load, scaler: Scaler) -> Seen:
    """Plays a load, second by second, from its least replicas, all ready."""
    seen, ready_at = Seen(), dict.fromkeys(range(1, load.least + 1), 0)
    next_id = load.least + 1
    for second, arrived in enumerate(load.arrivals()):
        rate, ready = load.rate(second), sum(at <= second for at in ready_at.values())
        seen.replica_seconds += len(ready_at)
        over = max(0.0, rate - ready * TARGET)
        seen.seconds_over += over > 0
        seen.requests_over += over
        if load.rises_at is not None and seen.reaction is None and second >= load.rises_at and over == 0:
            seen.reaction = second - load.rises_at
        launch, end = scaler.look(second, arrived, [(id, at <= second) for id, at in ready_at.items()])
        for id in end:
            del ready_at[id]
        for _ in range(launch):
            ready_at[next_id] = second + 1 + START
            next_id += 1
        seen.changes += bool(end) + bool(launch)
    return seen


def needed(load: Load) -> float:
    """Replica-seconds that one takes who knows the load beforehand and starts replicas in no time."""
    return sum(max(load.least, math.ceil(load.rate(second) / TARGET)) for second in range(load.seconds))


Maker = Callable[[Rule], AbstractContextManager[Scaler]]


def ours(rule: Rule) -> AbstractContextManager[Scaler]:
    return nullcontext(Ours(rule))


def rows(loads: Sequence[Load], makers: dict[str, Maker]) -> Iterator[list[str]]:
    yield ["load", "autoscaler", "replica-hours", "minutes over", "requests over", "changes", "reaction, s"]
    for load in loads:
        yield [load.name, "(who knows it beforehand)", f"{needed(load) / HOUR:.1f}", "0", "0", "", ""]
        for name, make in makers.items():
            with make(load.rule) as scaler:
                seen = run(load, scaler)
            reaction = "" if load.rises_at is None else "never" if seen.reaction is None else str(seen.reaction)
            figures = [
                f"{seen.replica_seconds / HOUR:.1f}",
                f"{seen.seconds_over / 60:.0f}",
                f"{seen.requests_over:,.0f}",
            ]
            yield [load.name, name, *figures, str(seen.changes), reaction]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[load.name for load in LOADS], help="these loads only")
    parser.add_argument("--ours", action="store_true", help="without SkyServe, whose package is installed on first use")
    options = parser.parse_args()
    makers: dict[str, Maker] = {"groundserve": ours}
    if not options.ours:
        makers["SkyServe"] = partial(skyserve, cache=cache_folder())
    loads = [load for load in LOADS if not options.only or load.name in options.only]
    for load in loads:
        print(f"{load.name}: {load.about}")
    print()
    try:
        for number, row in enumerate(rows(loads, makers)):
            print(f"| {' | '.join(row)} |", flush=True)
            if number == 0:
                print("|" + "---|" * len(row))
    except Unavailable as reason:
        print(f"SkyServe cannot be installed: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
