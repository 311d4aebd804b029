"""The list of replicas that the controller sends to the balancer, and the snapshot that the user sees."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from balancer.contract.listing import Listing, ReplicaListing, ServiceListing
from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, State, Status
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.controller.wanted import Wanted

# For the balancer, which decides itself whether a running replica is draining.
_STATES = {
    Stage.WAITING: State.PROVISIONING,
    Stage.RUNNING: State.RUNNING,
    Stage.DRAINING: State.RUNNING,
    Stage.STOPPING: State.SHUTTING_DOWN,
    Stage.REPLACING: State.SHUTTING_DOWN,
    Stage.GIVEN_UP: State.FAILED,
}
# For the user, about replicas that the balancer does not know.
_STATUSES = {
    Stage.WAITING: Status.PROVISIONING,
    Stage.RUNNING: Status.STARTING,
    Stage.DRAINING: Status.DRAINING,
    Stage.STOPPING: Status.SHUTTING_DOWN,
    Stage.REPLACING: Status.SHUTTING_DOWN,
    Stage.GIVEN_UP: Status.FAILED,
}


class Report:
    """Remembers what the engine last reported about each replica: its name, its endpoint, and any other facts."""

    def __init__(self, name: str, endpoint: Callable[[], str], infra: str) -> None:
        self._name = name
        self._endpoint = endpoint
        self._infra = infra
        self._by_engine: dict[int, ReplicaListing] = {}

    def note(self, running: Mapping[int, ReplicaListing], known: Collection[int]) -> None:
        """Remembers what the engine runs, and forgets replicas that are no longer in `known`."""
        by_engine = self._by_engine | dict(running)
        self._by_engine = {id: listing for id, listing in by_engine.items() if id in known}

    def leased(self, id: int) -> str:
        """The GPUs that the replica has or had; empty if none are known."""
        return self._by_engine[id].leased if id in self._by_engine else ""

    def listing(
        self,
        replicas: Collection[Replica],
        wanted: Wanted,
        now: float,
        status: ServiceStatus | None = None,
        reason: str = "",
    ) -> Listing:
        """The list for the balancer. `status`, unless None, overrides the status that follows from the replicas."""
        service = ServiceListing(
            name=self._name,
            version=str(wanted.newest.version),
            endpoint=self._endpoint(),
            status=status or "",
            reason=reason,
            is_asleep=wanted.is_asleep,
        )
        shown = [replica for replica in replicas if replica.version not in wanted.hidden]
        return Listing(tuple(self._replica(replica, wanted, now) for replica in shown), service)

    def _replica(self, replica: Replica, wanted: Wanted, now: float) -> ReplicaListing:
        state, reason = _STATES[replica.stage], replica.reason
        listing = self._by_engine.get(replica.id) or ReplicaListing(
            f"{self._name}-{replica.id}", id=replica.id, infra=self._infra, state=State.PROVISIONING
        )
        if state is State.RUNNING:
            reason = reason or listing.reason
        if state is State.RUNNING and listing.state is State.SHUTTING_DOWN:
            state = listing.state  # its engine has told it to end
        elif state is State.RUNNING and listing.state.is_before_start and listing.reason:
            state, reason = listing.state, listing.reason
        elif state is State.RUNNING and not listing.endpoint:
            state = State.PROVISIONING  # as far as the balancer is concerned
        has_process = replica.stage not in (Stage.WAITING, Stage.GIVEN_UP)
        leased = listing if has_process and listing.leased else None
        return replace(
            listing,
            version=replica.version,
            resources=leased.resources if leased else wanted.recipes[replica.version].resources,
            leased=leased.leased if leased else "",
            launched_seconds=max(0.0, now - replica.launched_at) if replica.launched_at else 0.0,
            state=state,
            reason=reason,
        )

    def shown(self, snapshot: Snapshot, replicas: Collection[Replica], wanted: Wanted, now: float) -> Snapshot:
        """The balancer's snapshot, plus the replicas that the balancer does not know yet."""
        hidden = [replica for replica in replicas if replica.version in wanted.hidden]
        rows = [*snapshot.replicas, *self._rows(hidden, wanted, now)]
        service = replace(
            snapshot.service,
            version=",".join(str(version) for version in sorted({row.version for row in rows}))
            or str(wanted.newest.version),
            total=len(rows),
            endpoint=self._endpoint(),  # a balancer that is about to be replaced may report an old one
            wanted=wanted.target,
        )
        return Snapshot(service, tuple(sorted(rows, key=lambda row: row.id)))

    def alone(self, replicas: Collection[Replica], wanted: Wanted, now: float) -> Snapshot:
        """The snapshot to show before the balancer has answered for the first time."""
        service = ServiceRow(
            name=self._name,
            version=str(wanted.newest.version),
            status=ServiceStatus.CONTROLLER_INIT,
            uptime_seconds=None,
            endpoint=self._endpoint(),
            policy=wanted.newest.spec.policy or "round_robin",
            ready=0,
            total=len(replicas),
            queue_depth=0,
            in_flight=0,
            wanted=wanted.target,
        )
        return Snapshot(service, tuple(self._rows(replicas, wanted, now)))

    def _rows(self, replicas: Collection[Replica], wanted: Wanted, now: float) -> Iterator[ReplicaRow]:
        for replica in replicas:
            status = replica.status if replica.stage is Stage.RUNNING else None
            yield ReplicaRow.of(self._replica(replica, wanted, now), status=status or _STATUSES[replica.stage])


def silent(snapshot: Snapshot, running: Mapping[int, ReplicaListing], seconds: float, reason: str) -> Snapshot:
    """The last snapshot of a balancer that has not answered for some time, and what else is wrong.

    `running` is what the engine says meanwhile: it may be silent, too.
    """
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    service = replace(
        snapshot.service,
        status=ServiceStatus.NO_BALANCER,
        uptime_seconds=None,
        ready=0,
        reason="; ".join(filter(None, (f"its balancer has not answered since {since}", reason))),
    )
    told = {id: listing.reason for id, listing in running.items()}
    rows = (replace(row, reason=told.get(row.id) or row.reason) for row in snapshot.replicas)
    return Snapshot(service, tuple(rows))
