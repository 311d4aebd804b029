"""One snapshot of a service and its replicas: the source of `GET /status`, the tables, the page and the metrics."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Self

from balancer.contract.listing import ReplicaFacts
from balancer.contract.words import ServiceStatus, Status


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """The service as a whole. Spans are in seconds; counts are of now."""

    name: str
    # The versions that have replicas, "1" or, while a rollout runs, "1,2".
    version: str
    status: ServiceStatus
    # Since the service first could answer; None before that.
    uptime_seconds: float | None
    endpoint: str
    policy: str
    ready: int
    total: int
    queue_depth: int
    in_flight: int
    # Generating requests, by which a service scales: those that came through the door since the balancer began, however
    # they ended; of them those refused because all was full; those that are at replicas now; those that wait for one.
    arrived_total: int = 0
    turned_away_total: int = 0
    generating: int = 0
    generating_queued: int = 0
    # Why the service is FAILED, in one line; empty otherwise.
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return _without_empty_reason(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when a field without a default is missing; fields it does not know are left out."""
        row = cls(**_known(cls, data))
        return replace(row, status=ServiceStatus(row.status))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow(ReplicaFacts):
    """One replica. Spans are in seconds, totals count since the balancer knows this replica."""

    id: int
    launched_seconds: float
    status: Status
    in_flight: int = 0
    requests_total: int = 0
    failures_total: int = 0
    # How long the ejection still lasts; 0 when it is not ejected.
    ejected_for_seconds: float = 0.0
    cached_tokens_total: int = 0
    prompt_tokens_total: int = 0

    @classmethod
    def of(cls, facts: ReplicaFacts, **seen: Any) -> Self:
        """The row of a replica with these facts; `seen` are the row's own fields, and facts that are known better."""
        return cls(**{field.name: getattr(facts, field.name) for field in fields(ReplicaFacts)} | seen)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, **_without_empty_reason(asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when a field without a default is missing; fields it does not know are left out."""
        row = cls(**_known(cls, data))
        return replace(row, status=Status(row.status))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What `GET /status` answers."""

    service: ServiceRow
    replicas: tuple[ReplicaRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "service": self.service.to_json(),
            "replicas": [replica.to_json() for replica in self.replicas],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when the shape is not that of `GET /status`."""
        service, replicas = data.get("service"), data.get("replicas")
        if not isinstance(service, Mapping) or not isinstance(replicas, list):
            raise ValueError('a status has "service" (an object) and "replicas" (a list)')
        return cls(ServiceRow.from_json(service), tuple(ReplicaRow.from_json(replica) for replica in replicas))


def _without_empty_reason(row: dict[str, Any]) -> dict[str, Any]:
    if not row["reason"]:
        del row["reason"]
    return row


def _known(row: type[ServiceRow] | type[ReplicaRow], data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"a {row.__name__} is an object, not {type(data).__name__}")
    names = {field.name for field in fields(row)}
    if missing := {field.name for field in fields(row) if field.default is MISSING} - data.keys():
        raise ValueError(f"the status lacks {', '.join(sorted(missing))}")
    return {name: data[name] for name in names & data.keys()}
