"""A snapshot of a service and its replicas: the answer of `GET /status`, which the tables and the page show."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

from balancer.contract.listing import ReplicaFacts, flat
from balancer.contract.words import ServiceStatus, Status


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """The service as a whole. Time spans are in seconds; counts are current."""

    name: str
    # The versions that have replicas: "1", or "1,2" during a rollout.
    version: str
    status: ServiceStatus
    # Since a replica was first ready; None before that.
    uptime_seconds: float | None
    endpoint: str
    policy: str
    ready: int
    total: int
    queue_depth: int
    in_flight: int
    # Generating requests, by which a service scales: those that arrived since the balancer started, however they ended;
    # those of them refused because everything was full; those at replicas now; those that wait for a replica now.
    arrived_total: int = 0
    turned_away_total: int = 0
    generating: int = 0
    generating_queued: int = 0
    # Why the service is FAILED, in one line; empty otherwise.
    reason: str = ""
    # How many replicas there should be; None if there is no controller to say so.
    wanted: int | None = None

    def came_since(self, before: "ServiceRow") -> tuple[int, int]:
        """How many generating requests arrived since the same balancer said `before`, and how many it turned away."""
        is_new = self.arrived_total < before.arrived_total  # a process that counts from 0
        arrived, turned_away = (0, 0) if is_new else (before.arrived_total, before.turned_away_total)
        return self.arrived_total - arrived, max(0, self.turned_away_total - turned_away)

    def to_json(self) -> dict[str, Any]:
        row = _without_empty(flat(self))
        if self.wanted is None:
            del row["wanted"]
        return row

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError if a required field is missing or the status is unknown; ignores unknown fields."""
        row = cls(**_known(cls, data))
        return replace(row, status=ServiceStatus(row.status))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow(ReplicaFacts):
    """One replica. Time spans are in seconds; totals count from when the balancer first knew this replica."""

    id: int
    launched_seconds: float
    status: Status
    in_flight: int = 0
    requests_total: int = 0
    failures_total: int = 0
    # How much longer the ejection lasts; 0 if it is not ejected.
    ejected_for_seconds: float = 0.0
    cached_tokens_total: int = 0
    prompt_tokens_total: int = 0
    # Can it continue a chat that broke at another replica? None until its chat template has been tried.
    continues: bool | None = None
    # Of a replica that shares its GPUs: their UUIDs, and its turns of the last 15 minutes, as pairs of how long ago one
    # began and how long ago it ended, 0 while it lasts. Empty for any other replica.
    gpus: tuple[str, ...] = ()
    turns: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, facts: ReplicaFacts, **own: Any) -> Self:
        """The row of a replica with these facts; `own` are the fields of the row, and facts that it overrides."""
        return cls(**{field.name: getattr(facts, field.name) for field in fields(ReplicaFacts)} | own)

    def to_json(self) -> dict[str, Any]:
        row = {"id": self.id, **_without_empty(flat(self))}
        if not self.gpus:
            del row["gpus"], row["turns"]
        return row

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError if a required field is missing or the status is unknown; ignores unknown fields."""
        row = cls(**_known(cls, data))
        turns = tuple((float(began), float(ended)) for began, ended in row.turns)
        return replace(row, status=Status(row.status), gpus=tuple(row.gpus), turns=turns)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The answer of `GET /status`."""

    service: ServiceRow
    replicas: tuple[ReplicaRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "service": self.service.to_json(),
            "replicas": [replica.to_json() for replica in self.replicas],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError if the data has not the shape of `GET /status`."""
        service, replicas = data.get("service"), data.get("replicas")
        if not isinstance(service, Mapping) or not isinstance(replicas, list):
            raise ValueError('a status has "service" (an object) and "replicas" (a list)')
        return cls(ServiceRow.from_json(service), tuple(ReplicaRow.from_json(replica) for replica in replicas))


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    """Without what there is only sometimes."""
    rare = {"reason", "leased", "node", "ends_in_seconds"}
    return {name: value for name, value in row.items() if value not in ("", None) or name not in rare}


def _known(row: type[ServiceRow] | type[ReplicaRow], data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"a {row.__name__} is an object, not {type(data).__name__}")
    names = {field.name for field in fields(row)}
    if missing := {field.name for field in fields(row) if field.default is MISSING} - data.keys():
        raise ValueError(f"the status lacks {', '.join(sorted(missing))}")
    return {name: data[name] for name in names & data.keys()}
