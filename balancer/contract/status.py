"""One snapshot of a service and its replicas: the source of `GET /status`, the tables, the page and the metrics."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """The service as a whole. Spans are in seconds; counts are of now."""

    name: str
    # The versions that have replicas, "1" or, while a rollout runs, "1,2".
    version: str
    # One of behaviour.md's service words: READY, REPLICA_INIT, NO_REPLICA and so on.
    status: str
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
        return cls(**_known(cls, data))


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica. Spans are in seconds, totals count since the balancer knows this replica."""

    id: int
    name: str
    version: int
    endpoint: str
    launched_seconds: float
    # Where it runs ("local", "compose") and on what ("1x CPU", "1x L4").
    infra: str
    resources: str
    # One of behaviour.md's replica words: STARTING, READY, DRAINING and so on.
    status: str
    in_flight: int
    requests_total: int
    failures_total: int
    # How long the ejection still lasts; 0 when it is not ejected.
    ejected_for_seconds: float
    cached_tokens_total: int
    prompt_tokens_total: int
    # Why it is in this status, in one line; empty when there is nothing to say.
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return _without_empty_reason(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError when a field is missing; fields it does not know are left out."""
        return cls(**_known(cls, data))


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
