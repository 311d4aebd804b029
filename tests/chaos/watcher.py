"""Observes how the balancer reacts to a fault, and how long that takes."""

import asyncio
import json
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field

from balancer.spec.settings import Settings
from tests.chaos.client import Wish
from tests.chaos.judge import Judge
from tests.chaos.load import Load
from tests.chaos.replica import Replica
from tests.chaos.stage import SLACK, Stage, Violation

LOOK = 0.03  # seconds between two checks of the balancer's status
GONE = ("NOT_READY", "STARTING", "EJECTED", None)


@dataclass(slots=True)
class Watcher:
    """`measured`: how long each thing took, in seconds, by its name."""

    stage: Stage
    load: Load
    judge: Judge
    chance: random.Random
    measured: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
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
        began = time.monotonic()
        said: str | None = "?"
        while time.monotonic() - began < within + SLACK:
            said = (await self.stage.statuses()).get(self.stage.name_of(replica))
            if said in wanted:
                took = time.monotonic() - began
                self.measured[what].append(took)
                return took
            await asyncio.sleep(LOOK)
        probes = await self.stage.probes_of(replica)
        raise Violation(f"{what}: {self.stage.name_of(replica)} is {said} after {within} s and not {wanted}; {probes}")

    async def never(self, replica: Replica, unwanted: tuple[str | None, ...], seconds: float, why: str) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            said = (await self.stage.statuses()).get(self.stage.name_of(replica))
            if said in unwanted:
                raise Violation(f"{self.stage.name_of(replica)} is {said}: {why}")
            await asyncio.sleep(LOOK)

    async def all_ready(self, within: float = 5.0) -> None:
        wanted = {self.stage.name_of(replica): "READY" for replica in self.stage.replicas}
        began = time.monotonic()
        while (said := await self.stage.statuses()) != wanted:
            if time.monotonic() - began > within + SLACK:
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
        return max(asked - row["launched_seconds"] for row in rows if row["name"] == self.stage.name_of(replica))
