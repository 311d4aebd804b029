"""The interface of an engine: whether it can run a service, and how it runs one. The controller decides what runs."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from balancer.contract.listing import ReplicaListing
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.service_folder import DetachedRecord


class CannotStart(Exception):
    """A replica that could not even be started. The message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A replica that an earlier controller left running; `digest` is that of the recipe it was started by."""

    id: int
    listing: ReplicaListing
    digest: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A replica that ended unasked: why in one line, and whether another start would end the same way."""

    id: int
    reason: str
    is_hopeless: bool = False
    # It did not fail: all GPUs that would do are held by others.
    waits_for_gpu: bool = False

    @classmethod
    def by(cls, id: int, code: int, last_words: str) -> Self:
        """By its exit code (128 + the signal, where one ended it) and the last line that it printed."""
        how = f"killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
        if code == os.EX_TEMPFAIL and last_words.startswith("replica: "):
            return cls(id, last_words.removeprefix("replica: "), waits_for_gpu=True)
        return cls(id, f"{how}: {last_words}" if last_words else how, code in _HOPELESS)


# Exit codes that mean that the command itself is wrong: bad usage (2), a bad configuration (sysexits' 78), and bash's
# and env's "cannot be executed" (126) and "not found" (127).
_HOPELESS = {2, 78, 126, 127}


class Engine(Protocol):
    """One way to run a service: its replicas and the balancer in front of them. Each object is for one service.

    `suits`, `fit`, `placement` and `take_down` may be called at any time, in any process. `prepare` comes before all
    that follows it here, and `found` before the first `start`.
    """

    # What --on, the detached record and the status tables call it.
    name: str
    # Does what it runs go on when its controller is killed? Then a detached record says where.
    outlives_controller: bool
    # Set whenever a replica or the balancer ended.
    changed: asyncio.Event

    def suits(self, recipe: Recipe) -> bool:
        """May --on auto choose it for this service on this machine? Starts nothing."""

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        """The recipe, completed with what one replica gets here and how many fit; and warnings.

        `running` replicas of the service are running already. Raises ConfigError if the service cannot run here.
        """

    def placement(self, recipe: Recipe) -> list[str]:
        """For people: a line for each GPU, saying which replica would get it. `recipe` is a fitted one."""

    def take_down(self) -> None:
        """Ends and removes all that is left of a service whose controller is gone; raises ConfigError."""

    def prepare(self, recipe: Recipe, flags: AddressFlags, record: DetachedRecord | None) -> Addresses:
        """Does what must be done before the first start, and says where the service will be found.

        `record` is what an earlier controller left, if it was killed. May take minutes and print. Raises ConfigError.
        """

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        """The balancer in front of the replicas, not started yet. Raises ConfigError for a key that is none."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The headers that its replicas require of us."""

    async def found(self) -> tuple[Survivor, ...]:
        """Takes over what an earlier controller left running."""

    async def start(self, id: int, recipe: Recipe) -> None:
        """Starts a replica under a number that is free; raises CannotStart."""

    async def stop(self, id: int, grace: float) -> None:
        """Returns when the replica is gone: asked first, killed `grace` seconds later. Unknown ones are gone."""

    def running(self) -> Mapping[int, ReplicaListing]:
        """What runs now, by number, with all that the engine knows of it: a name, a place and an age at least."""

    def ended(self) -> tuple[Ended, ...]:
        """What ended unasked since the last call."""

    async def close(self) -> None:
        """Removes what is left when all replicas and the balancer are gone."""
