"""The interface of an engine: whether it can run a service, and how it runs one. The controller decides what runs."""

import asyncio
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from balancer.contract.listing import ReplicaListing
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.desired import Desired


class CannotStart(Exception):
    """A replica that could not even be started. The message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A replica that an earlier controller left running; `digest` is that of the recipe it was started from."""

    id: int
    listing: ReplicaListing
    digest: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A replica that ended without being stopped: why, in one line, and whether another start would end likewise."""

    id: int
    reason: str
    is_hopeless: bool = False
    # It did not fail: others hold every GPU that it could use.
    waits_for_gpu: bool = False
    # It did not fail: its engine ended it, for a time limit, a host that failed, or somebody who goes first.
    is_blameless: bool = False
    # But it did fail if it was never ready: a time limit may be too short for it, or a node too small.
    counts_if_never_ready: bool = False

    @classmethod
    def by(cls, id: int, code: int, last_words: str) -> Self:
        """From its exit code (128 + the signal, if one ended it) and the last line that it printed."""
        how = f"killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
        if code == os.EX_TEMPFAIL and last_words.startswith("replica: "):
            return cls(id, last_words.removeprefix("replica: "), waits_for_gpu=True)
        return cls(id, f"{how}: {last_words}" if last_words else how, code in _HOPELESS)


# Exit codes for a command that is wrong in itself: bad usage (2), bad configuration (78 in sysexits.h), and "cannot be
# executed" (126) and "not found" (127) as bash and env report them.
_HOPELESS = {2, 78, 126, 127}


class Engine(Protocol):
    """One way to run a service: its replicas and the balancer in front of them. Each object is for one service.

    `suits`, `fit`, `placement` and `take_down` may be called at any time, in any process. `prepare` must be called
    before any method below it, and `found` before the first `start`.
    """

    # Its name for --on, in what is written down of a service, and in the status tables.
    name: str
    # How many replicas a service can have at most, however little each of them takes.
    most_replicas: int
    # Do its replicas and balancer keep running if the controller is killed?
    outlives_controller: bool
    # Does whoever ends the controller with SIGTERM start another one, with the same file? Then all goes on without it
    # until then, and another version, or an end, has to be asked of him.
    is_kept_up: bool
    # Set whenever a replica or the balancer has ended.
    changed: asyncio.Event

    def suits(self, recipe: Recipe) -> bool:
        """May --on auto choose it for this service on this machine? Starts nothing."""

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        """The recipe, completed with what one replica gets here and how many fit, and warnings.

        `running` replicas of the service are running already. Raises ConfigError if the service cannot run here.
        """

    def placement(self, recipe: Recipe) -> list[str]:
        """For the user: a line for each GPU, saying which replica would get it. `recipe` must be fitted."""

    def take_down(self) -> None:
        """Stops and removes all that is left of a service whose controller is gone; raises ConfigError."""

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None) -> Addresses:
        """Does what must be done before the first start, and returns the addresses of the service.

        `left` describes what an earlier controller left running. May take minutes and print progress. Raises
        ConfigError.
        """

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        """The balancer in front of the replicas, not started yet. Raises ConfigError if its key file is unusable."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The headers that its replicas require in our requests."""

    async def found(self) -> tuple[Survivor, ...]:
        """Takes over what an earlier controller left running."""

    async def start(self, id: int, recipe: Recipe) -> None:
        """Starts a replica with an id that is not in use; raises CannotStart."""

    async def stop(self, id: int, grace: float) -> None:
        """Stops a replica, kills it after `grace` seconds, and returns when it is gone; at once if it is unknown."""

    def running(self) -> Mapping[int, ReplicaListing]:
        """The running replicas by id, with all that the engine knows of each.

        One that waits in the engine's queue is PROVISIONING, has no endpoint, and `reason` is the engine's own word
        for why. One that somebody else has told to end is SHUTTING_DOWN, and ends after `ends_in_seconds` at the
        latest.
        """

    def ended(self) -> tuple[Ended, ...]:
        """The replicas that ended since the last call without being stopped."""

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        """The replicas whose host is gone, or one of whose hosts: a line each that says so. `suspects` are those that
        the balancer does not reach.

        Called twice a second, so it answers from what is known, and finds out more meanwhile. What is lost is replaced
        at once; `stop` then has to take care that it never comes back.
        """

    async def close(self) -> None:
        """Removes what is left after all replicas and the balancer are gone."""
