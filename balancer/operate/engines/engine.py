"""What an engine can do: start a replica, stop it, list what runs, tell what ended. Others decide."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from balancer.contract.listing import ReplicaListing
from balancer.operate.recipe.recipe import Recipe


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
    """One way to run replicas."""

    # What the status tables say under INFRA.
    infra: str
    # Headers by which its replicas let us in.
    fields: Mapping[str, str]

    async def found(self) -> tuple[Survivor, ...]:
        """Takes over what an earlier controller left running. Call it once, before all else."""

    async def start(self, id: int, recipe: Recipe) -> None:
        """Starts a replica under a number that is free; raises CannotStart."""

    async def stop(self, id: int, grace: float) -> None:
        """Returns when the replica is gone: asked first, killed `grace` seconds later."""

    def running(self) -> Mapping[int, ReplicaListing]:
        """What runs now, by number, with all that the engine knows of it: a name, a place and an age at least."""

    def ended(self) -> tuple[Ended, ...]:
        """What ended unasked since the last call."""

    async def close(self) -> None:
        """Removes what is left when all replicas are gone."""
