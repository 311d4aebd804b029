"""Takes the snapshot of a service, its fleet and its queue, in the types of contract/status.py."""

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import Phase, ServiceStatus, Status
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission
from balancer.service import ServiceFacts


def take_snapshot(facts: ServiceFacts, fleet: Fleet, admission: Admission) -> Snapshot:
    """The service and its replicas as they are now."""
    now = fleet.clock()
    rows = sorted((_row(member, now) for member in fleet.shown()), key=lambda row: row.id)
    service = ServiceRow(
        name=facts.name,
        version=",".join(str(version) for version in sorted({row.version for row in rows})) or facts.version,
        status=_service_status(facts, [row.status for row in rows], bool(fleet.available() or fleet.resting())),
        uptime_seconds=None if fleet.ready_since is None else round(now - fleet.ready_since, 3),
        endpoint=facts.endpoint,
        policy=admission.policy.name,
        ready=sum(row.status.phase is Phase.READY for row in rows),
        total=len(rows),
        queue_depth=admission.queue_depth,
        in_flight=fleet.in_flight,
        arrived_total=admission.arrived_total,
        turned_away_total=admission.turned_away_total,
        generating=fleet.generating,
        generating_queued=admission.generating_queued,
        reason=facts.reason,
    )
    return Snapshot(service, tuple(rows))


def _service_status(facts: ServiceFacts, statuses: list[Status], can_serve: bool) -> ServiceStatus:
    if facts.is_leaving:
        return ServiceStatus.SHUTTING_DOWN
    if facts.status in (ServiceStatus.FAILED, ServiceStatus.SHUTTING_DOWN):
        return ServiceStatus(facts.status)
    if can_serve:
        return ServiceStatus.READY
    staying = [status for status in statuses if status.phase is not Phase.LEAVING]
    if not staying:
        return ServiceStatus(facts.status or ServiceStatus.NO_REPLICA)
    return ServiceStatus.FAILED if all(s.phase is Phase.FAILED for s in staying) else ServiceStatus.REPLICA_INIT


def _row(member: Member, now: float) -> ReplicaRow:
    tenancy = member.tenancy
    turns = tenancy.turns(now) if tenancy else ()
    return ReplicaRow.of(
        member.listing,
        id=member.id,
        launched_seconds=round(now - member.launched_at, 3),
        status=member.status(now),
        in_flight=member.in_flight,
        requests_total=member.requests_total,
        failures_total=member.failures_total,
        ejected_for_seconds=round(max(0.0, member.ejected_until - now), 3),
        cached_tokens_total=member.cached_tokens_total,
        prompt_tokens_total=member.prompt_tokens_total,
        continues=member.continues,
        reason=member.trouble(now),
        gpus=tenancy.gpus if tenancy else (),
        turns=tuple((round(now - began, 3), round(now - ended, 3)) for began, ended in turns),
    )
