"""Several balancers of one service, as if they were one: what all of them together say. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import Phase, Status


def shares(loads: Sequence[int | None]) -> list[float]:
    """Which part of each limit each balancer may use, by how many requests each has: its equal part, or more where the
    others have fewer. So one that has all requests may use all of a limit, and none has less than its equal part.

    None stands for one that says nothing: the others have its part among them, and it has its equal part once it is
    back. In eighths, so that they seldom change.
    """
    heard = [load for load in loads if load is not None]
    parts = [
        1 / len(loads) if load is None else max(1 / len(heard), load / sum(heard) if sum(heard) else 0.0)
        for load in loads
    ]
    return [part if part * len(loads) == 1 else math.ceil(part * 8) / 8 for part in parts]


def merged(snapshots: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of all: counts summed; a replica has left its requests only where all say so.

    The service's totals, each since its balancer's start, are those of one of them.
    """
    if len(snapshots) == 1:
        return snapshots[0]
    rows: dict[int, list[ReplicaRow]] = {}
    for snapshot in snapshots:
        for row in snapshot.replicas:
            rows.setdefault(row.id, []).append(row)
    replicas = tuple(_replica(rows[id]) for id in sorted(rows))
    return Snapshot(_service([snapshot.service for snapshot in snapshots], replicas), replicas)


def _service(rows: Sequence[ServiceRow], replicas: Sequence[ReplicaRow]) -> ServiceRow:
    best = max(rows, key=lambda row: (row.status.phase is Phase.READY, row.uptime_seconds or 0.0))
    return replace(
        best,
        ready=sum(row.status.phase is Phase.READY for row in replicas),
        queue_depth=sum(row.queue_depth for row in rows),
        in_flight=sum(row.in_flight for row in rows),
        generating=sum(row.generating for row in rows),
        generating_queued=sum(row.generating_queued for row in rows),
    )


def _replica(rows: Sequence[ReplicaRow]) -> ReplicaRow:
    shown = min(rows, key=lambda row: _ORDER[row.status.phase])
    status, in_flight = shown.status, sum(row.in_flight for row in rows)
    if status.phase is Phase.LEAVING:
        # SHUTTING_DOWN says that it drains and has nothing left: all have to say so.
        is_idle = all(row.status is Status.SHUTTING_DOWN for row in rows)
        status = Status.SHUTTING_DOWN if is_idle else Status.DRAINING
    return replace(
        shown,
        status=status,
        in_flight=in_flight,
        requests_total=sum(row.requests_total for row in rows),
        failures_total=sum(row.failures_total for row in rows),
        cached_tokens_total=sum(row.cached_tokens_total for row in rows),
        prompt_tokens_total=sum(row.prompt_tokens_total for row in rows),
    )


# One balancer that drains a replica decides, then one that reaches it; it has failed where all say so.
_ORDER = {Phase.LEAVING: 0, Phase.READY: 1, Phase.UNAVAILABLE: 2, Phase.PENDING: 3, Phase.FAILED: 4}
