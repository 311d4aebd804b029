"""What a relay knows of the services and their replicas, as the coordinator last told it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from balancer.fleet.address import ReplicaAddress
from balancer.service import answering
from balancer.spec.settings import Settings


@dataclass(slots=True, eq=False)
class KnownReplica:
    """One life of a replica. `number` is the coordinator's for it, -1 once it has left. Times are the loop's."""

    number: int
    service: str
    url: str
    address: ReplicaAddress
    alive_at: float = 0.0
    last_byte_at: float = 0.0
    passed_at: float = 0.0
    is_passing: bool = False
    away_before: float = 0.0  # seconds without a turn on GPUs that it shares, before `away_since`
    away_since: float | None = None
    is_resting: bool = False  # waits for its turn
    is_leaving: bool = False  # is drained, or has left
    reasoning_parser: str | None = None

    @property
    def name(self) -> str:
        return self.address.name

    def take(self, facts: list[Any]) -> None:
        """Takes over the facts of a Told.REPLICA. A coordinator that has just begun knows less than its predecessor."""
        alive_at, last_byte_at, passed_at, is_passing, *away, self.is_leaving, self.reasoning_parser = facts
        self.away_before, self.away_since, self.is_resting = away
        self.alive_at = max(self.alive_at, alive_at)
        self.last_byte_at = max(self.last_byte_at, last_byte_at)
        self.passed_at = max(self.passed_at, passed_at)
        self.is_passing = self.is_passing if is_passing is None else is_passing


class KnownService:
    """One service, which messages call `ident`. `settings` is renewed in place."""

    def __init__(self, ident: str, settings: Settings) -> None:
        self.ident = ident
        self.name = ""
        self.is_told = False  # has the coordinator of now told of all its replicas?
        self.settings = settings
        self.models: Collection[str] = ()
        self.has_replica = False
        self.reads_prompts = False

    def take(self, state: dict[str, Any]) -> None:
        """Takes over the state of a Told.SERVICE. A new coordinator has yet to learn which models there are."""
        self.settings.renew(Settings.model_validate(state["settings"]))
        self.name = state["name"]
        if state["models"] or not self.models:
            self.models, self.has_replica = state["models"], state["has_replica"]
        self.reads_prompts = state["reads_prompts"]

    @property
    def has_told_models(self) -> bool:
        return bool(self.models)

    def names(self) -> Collection[str]:
        return {self.name, *self.settings.aliases, *self.models}

    def model_of(self, asked: object) -> str:
        return answering(asked, self.models, self.settings.aliases, self.name)
