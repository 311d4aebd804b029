"""Observes how the balancer reacts to a fault, and how long that takes."""

import asyncio
import json
import random
import signal
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

from balancer.spec.settings import Settings
from tests.chaos.client import Wish
from tests.chaos.judge import Judge
from tests.chaos.load import Load
from tests.chaos.replica import Replica
from tests.chaos.stage import Stage, Violation

LOOK = 0.03  # seconds between two checks of the balancer's status
# Seconds that a single time may be above its limit by a stopwatch: on a busy machine more than one process waits for
# its turn. What takes longer as a rule, `judge_times` finds.
SLACK = 1.0
ENOUGH = 5  # times that something was measured, after which its median counts
GONE = ("NOT_READY", "STARTING", "EJECTED", None)


@dataclass(slots=True)
class Watcher:
    """`measured`: how long each thing took by a stopwatch, in seconds, by its name; `limits`: how long it may take."""

    stage: Stage
    load: Load
    judge: Judge
    chance: random.Random
    measured: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    limits: dict[str, float] = field(default_factory=dict)
    interval: float = 0.0
    timeout: float = 0.0

    def __post_init__(self) -> None:
        settings = Settings(**self.stage.settings)
        self.interval, self.timeout = settings.ready_interval, settings.ready_timeout

    @property
    def detection(self) -> float:
        """Seconds within which the balancer must notice a replica that answers nothing."""
        return 2 * (self.interval + self.timeout)

    @property
    def news(self) -> float:
        """Seconds within which the balancer must learn of a change of the list."""
        return 1.6 if self.stage.is_dns else 0.5

    def recovery(self) -> float:
        """The time of two of our probes and one of the service's."""
        return 2 * self.interval + 0.3

    def victim(self) -> Replica:
        return self.chance.choice(self.stage.replicas)

    async def hold(self, least: float = 0.05, most: float = 0.4) -> None:
        await asyncio.sleep(self.chance.uniform(least, most))

    async def until(self, replica: Replica, wanted: tuple[str | None, ...], within: float, what: str) -> float:
        """Seconds until the balancer gives the replica one of these statuses (None: it does not know the replica)."""
        watch = self.stage.stopwatch()
        said: str | None = "?"
        while watch.seconds() < within + SLACK:
            said = (await self.stage.statuses()).get(self.stage.name_of(replica))
            if said in wanted:
                return self.took(what, watch.seconds(), within)
            await asyncio.sleep(LOOK)
        probes = await self.stage.probes_of(replica)
        raise Violation(f"{what}: {self.stage.name_of(replica)} is {said} after {within} s and not {wanted}; {probes}")

    async def until_new(self, replica: Replica, since: float) -> None:
        """The balancer knows the replica as a new one, begun after `since`: before that it may call it READY."""
        watch = self.stage.stopwatch()
        while await self.born(replica) < since:
            if watch.seconds() > 1.0 + SLACK:
                raise Violation(f"{replica.address} was restarted and is not known as a new member after 1 s")
            await asyncio.sleep(LOOK)
        self.took("restart to new member", watch.seconds(), 1.0)

    def took(self, what: str, seconds: float, limit: float) -> float:
        """Notes how long something took, and how long it may take; returns the first."""
        self.measured[what].append(seconds)
        self.limits[what] = limit
        return seconds

    def judge_times(self) -> None:
        """Raises Violation for what usually takes longer than it may: a single time may be SLACK above its limit."""
        for what, took in self.measured.items():
            usual = statistics.median(took)
            if len(took) >= ENOUGH and usual > self.limits[what]:
                raise Violation(f"{what}: usually {usual:.3f} s, and not {self.limits[what]:g} s as it should be")

    async def never(self, replica: Replica, unwanted: tuple[str | None, ...], seconds: float, why: str) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            said = (await self.stage.statuses()).get(self.stage.name_of(replica))
            if said in unwanted:
                raise Violation(f"{self.stage.name_of(replica)} is {said}: {why}")
            await asyncio.sleep(LOOK)

    async def all_ready(self, within: float = 5.0) -> None:
        wanted = {self.stage.name_of(replica): "READY" for replica in self.stage.replicas}
        watch = self.stage.stopwatch()
        while (said := await self.stage.statuses()) != wanted:
            if watch.seconds() > within + SLACK:
                raise Violation(f"not all are READY {within} s after everything was well again: {said}")
            await asyncio.sleep(LOOK)

    async def one_more(self, id: str) -> None:
        """A request that has to succeed."""
        body = json.dumps({"prompt": "go", "max_tokens": 1}).encode()
        got = await self.load.ask(Wish(id, "POST", "/v1/completions", body))
        if (got.status, got.end) != (200, "whole"):
            raise Violation(f"not saved: {got}")

    async def strike(self, replica: Replica) -> None:
        replica.signal(signal.SIGKILL)

    async def born(self, replica: Replica) -> float:
        """The earliest time at which, for the balancer, this replica began; CLOCK_MONOTONIC."""
        asked = time.monotonic()
        rows = (await self.stage.status())["replicas"]
        named = [row for row in rows if row["name"] == self.stage.name_of(replica)]
        return max((asked - row["launched_seconds"] for row in named), default=0.0)
