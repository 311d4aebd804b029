"""Takes the snapshot of a service: what the fleet and the queue are, put into the words of status.py."""

from dataclasses import dataclass

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member, Status
from balancer.routing.admission import Admission

HOPELESS = (Status.FAILED, Status.FAILED_INITIAL_DELAY, Status.FAILED_PROBING)
LEAVING = (Status.DRAINING, Status.SHUTTING_DOWN)


@dataclass(slots=True)
class ServiceFacts:
    """What the balancer was told of the service."""

    name: str = "groundserve"
    version: str = "1"
    endpoint: str = ""
    # The controller's word where it has one (FAILED, SHUTTING_DOWN, CONTROLLER_INIT), and its reason.
    status: str = ""
    reason: str = ""
    is_leaving: bool = False

    def untold(self) -> None:
        """The controller is gone, and its word with it."""
        self.status = self.reason = ""


def take_snapshot(facts: ServiceFacts, fleet: Fleet, admission: Admission) -> Snapshot:
    """The service and its replicas as they are now."""
    now = fleet.clock()
    members = fleet.shown()
    statuses = [member.status(now) for member in members]
    service = ServiceRow(
        name=facts.name,
        version=",".join(str(v) for v in sorted({m.listed.version for m in members})) or facts.version,
        status=_service_status(facts, statuses, bool(fleet.available())),
        uptime_seconds=None if fleet.ready_since is None else round(now - fleet.ready_since, 3),
        endpoint=facts.endpoint,
        policy=admission.policy.name,
        ready=statuses.count(Status.READY),
        total=len(members),
        queue_depth=admission.queue_depth,
        in_flight=fleet.in_flight,
        arrived_total=admission.arrived_total,
        turned_away_total=admission.turned_away_total,
        generating=fleet.generating,
        generating_queued=admission.generating_queued,
        reason=facts.reason,
    )
    rows = sorted((_row(member, now) for member in members), key=lambda row: row.id)
    return Snapshot(service, tuple(rows))


def _service_status(facts: ServiceFacts, statuses: list[Status], can_serve: bool) -> str:
    if facts.is_leaving:
        return "SHUTTING_DOWN"
    if facts.status in ("FAILED", "SHUTTING_DOWN"):
        return facts.status
    if can_serve:
        return "READY"
    staying = [status for status in statuses if status not in LEAVING]
    if not staying:
        return facts.status or "NO_REPLICA"
    return "FAILED" if all(status in HOPELESS for status in staying) else "REPLICA_INIT"


def _row(member: Member, now: float) -> ReplicaRow:
    listed = member.listed
    return ReplicaRow(
        id=member.id,
        name=member.name,
        version=listed.version,
        endpoint=member.url,
        launched_seconds=round(now - member.launched_at, 3),
        infra=listed.infra,
        resources=listed.resources,
        status=member.status(now).value,
        in_flight=member.in_flight,
        requests_total=member.requests_total,
        failures_total=member.failures_total,
        ejected_for_seconds=round(max(0.0, member.ejected_until - now), 3),
        cached_tokens_total=member.cached_tokens_total,
        prompt_tokens_total=member.prompt_tokens_total,
        reason=member.trouble(now),
    )
