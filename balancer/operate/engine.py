"""What an engine can do: start a replica, stop it, list what runs, show its log. Others decide."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from balancer.operate.recipe import Recipe


class CannotStart(Exception):
    """A replica that could not even be started. The message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A replica that the engine runs. `launched_seconds` is its age."""

    id: int
    endpoint: str
    launched_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A replica that ended unasked, why in one line, and whether another start would end the same way."""

    id: int
    reason: str
    is_hopeless: bool = False


class Engine(Protocol):
    """One way to run replicas."""

    # What the status tables say under INFRA.
    infra: str

    async def start(self, id: int, recipe: Recipe) -> None:
        """Starts a replica under a number that is free; raises CannotStart."""

    async def stop(self, id: int, grace: float) -> None:
        """Returns when the replica is gone: asked first, killed `grace` seconds later."""

    def running(self) -> tuple[Running, ...]:
        """What runs now."""

    def ended(self) -> tuple[Ended, ...]:
        """What ended unasked since the last call."""

    def log(self, id: int) -> Path:
        """The file with what this replica prints; it need not exist yet."""
