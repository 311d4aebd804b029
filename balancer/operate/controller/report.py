"""A service as the controller tells it to the balancer, and the balancer's snapshot as it is shown to a person."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.controller.wanted import Wanted
from balancer.operate.engines.engine import Running

# The balancer's contract for where a replica is. That a running one drains is for the balancer to say.
_STATES = {
    Stage.WAITING: "PROVISIONING",
    Stage.RUNNING: "RUNNING",
    Stage.DRAINING: "RUNNING",
    Stage.STOPPING: "SHUTTING_DOWN",
    Stage.REPLACING: "SHUTTING_DOWN",
    Stage.GIVEN_UP: "FAILED",
}


class Report:
    """Remembers what each replica was called and where it listened last."""

    def __init__(self, name: str, endpoint: Callable[[], str], infra: str) -> None:
        self._name = name
        self._endpoint = endpoint
        self._infra = infra
        self._places: dict[int, Running] = {}

    def noted(self, running: Iterable[Running], known: Collection[int]) -> None:
        """Takes note of where replicas are, and forgets those that are not known any more."""
        places = self._places | {one.id: one for one in running}
        self._places = {id: place for id, place in places.items() if id in known}

    def _named(self, id: int) -> str:
        return self._places[id].name if id in self._places else f"{self._name}-{id}"

    def _at(self, id: int) -> str:
        """Empty while it has no place yet."""
        return self._places[id].endpoint if id in self._places else ""

    def service(self, wanted: Wanted, word: str, reason: str) -> dict[str, Any]:
        """`word` overrides what the balancer makes of its replicas; empty: it decides."""
        return {
            "name": self._name,
            "version": str(wanted.newest.version),
            "endpoint": self._endpoint(),
            "status": word,
            "reason": reason,
            "is_asleep": wanted.is_asleep,
        }

    def listing(self, replicas: Collection[Replica], wanted: Wanted, now: float) -> list[dict[str, Any]]:
        return [
            {
                "id": replica.id,
                "name": self._named(replica.id),
                "endpoint": self._at(replica.id),
                "version": replica.version,
                "infra": self._infra,
                "resources": wanted.recipes[replica.version].resources,
                "launched_seconds": _age(replica, now),
                "state": _STATES[replica.stage],
                "restarts": replica.restarts,
                "reason": replica.reason,
            }
            for replica in replicas
            if replica.version != wanted.hidden
        ]

    def shown(self, snapshot: Snapshot, replicas: Collection[Replica], wanted: Wanted, now: float) -> Snapshot:
        """The snapshot with the replicas that the balancer does not know yet."""
        rows = list(snapshot.replicas)
        rows += [self._row(replica, wanted, now) for replica in replicas if replica.version == wanted.hidden]
        service = replace(
            snapshot.service,
            version=",".join(str(version) for version in sorted({row.version for row in rows}))
            or str(wanted.newest.version),
            total=len(rows),
        )
        return Snapshot(service, tuple(sorted(rows, key=lambda row: row.id)))

    def alone(self, replicas: Collection[Replica], wanted: Wanted, now: float) -> Snapshot:
        """What there is to show before the balancer ever answered."""
        service = ServiceRow(
            name=self._name,
            version=str(wanted.newest.version),
            status="CONTROLLER_INIT",
            uptime_seconds=None,
            endpoint=self._endpoint(),
            policy=wanted.newest.spec.policy or "round_robin",
            ready=0,
            total=len(replicas),
            queue_depth=0,
            in_flight=0,
        )
        return Snapshot(service, tuple(self._row(replica, wanted, now) for replica in replicas))

    def _row(self, replica: Replica, wanted: Wanted, now: float) -> ReplicaRow:
        return ReplicaRow(
            id=replica.id,
            name=self._named(replica.id),
            version=replica.version,
            endpoint=self._at(replica.id),
            launched_seconds=_age(replica, now),
            infra=self._infra,
            resources=wanted.recipes[replica.version].resources,
            status=replica.status or "STARTING" if replica.stage is Stage.RUNNING else _STATES[replica.stage],
            in_flight=0,
            requests_total=0,
            failures_total=0,
            ejected_for_seconds=0.0,
            cached_tokens_total=0,
            prompt_tokens_total=0,
            reason=replica.reason,
        )


def _age(replica: Replica, now: float) -> float:
    return max(0.0, now - replica.launched_at) if replica.launched_at else 0.0
