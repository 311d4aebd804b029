"""Snapshots as the two tables that `sky serve status` prints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from balancer.contract.status import Snapshot
from balancer.operate.columns import aligned


@dataclass(frozen=True, slots=True)
class _Column:
    """`of` computes the cell of a row. `is_ours`: SkyServe has no such column, so only --verbose shows it."""

    heading: str
    of: Callable[[Any], object]
    is_ours: bool = False
    # Shown, too, where any row has something to say.
    is_rare: bool = False


_SERVICE = (
    _Column("NAME", lambda service: service.name),
    _Column("VERSION", lambda service: service.version),
    _Column("UPTIME", lambda service: uptime(service.uptime_seconds)),
    _Column("STATUS", lambda service: service.status),
    _Column("REPLICAS", lambda service: f"{service.ready}/{service.total}"),
    _Column("ENDPOINT", lambda service: service.endpoint or "-"),
    _Column("LOAD_BALANCING_POLICY", lambda service: service.policy, is_ours=True),
    _Column("IN_FLIGHT", lambda service: service.in_flight, is_ours=True),
    _Column("QUEUED", lambda service: service.queue_depth, is_ours=True),
)
_REPLICA = (
    _Column("ID", lambda replica: replica.id),
    _Column("VERSION", lambda replica: replica.version),
    _Column("ENDPOINT", lambda replica: replica.endpoint or "-"),
    _Column("LAUNCHED", lambda replica: ago(replica.launched_seconds)),
    _Column("INFRA", lambda replica: replica.infra),
    _Column("RESOURCES", lambda replica: replica.resources),
    _Column("STATUS", lambda replica: replica.status),
    _Column("IN_FLIGHT", lambda replica: replica.in_flight, is_ours=True),
    _Column("REQUESTS", lambda replica: replica.requests_total, is_ours=True),
    _Column("FAILURES", lambda replica: replica.failures_total, is_ours=True),
    _Column("PROMPT_TOKENS", lambda replica: replica.prompt_tokens_total, is_ours=True),
    _Column("CACHED_TOKENS", lambda replica: replica.cached_tokens_total, is_ours=True),
    _Column("GPU", lambda replica: replica.leased or "-", is_ours=True),
    _Column("NODE", lambda replica: replica.node or "-", is_ours=True, is_rare=True),
    _Column("ENDS_IN", lambda replica: uptime(replica.ends_in_seconds), is_ours=True),
)

_UNITS = (("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
_SHORT = {"hour": "hr", "minute": "min", "second": "sec"}


def tables(snapshots: Sequence[Snapshot], verbose: bool = False) -> str:
    """Both tables, and below them the reasons for failures; `verbose` adds our own columns."""
    if not snapshots:
        return "No existing services."
    service_columns = [column for column in _SERVICE if verbose or not column.is_ours]
    rows = [replica for snapshot in snapshots for replica in snapshot.replicas]

    def is_shown(column: _Column) -> bool:
        return verbose or not column.is_ours or (column.is_rare and any(column.of(row) != "-" for row in rows))

    replica_columns = [column for column in _REPLICA if is_shown(column)]
    services, replicas, reasons = [], [], []
    for snapshot in snapshots:
        service = snapshot.service
        services.append([column.of(service) for column in service_columns])
        if service.reason:
            reasons.append(f"{service.name}: {service.reason}")
        for replica in snapshot.replicas:
            replicas.append([service.name, *(column.of(replica) for column in replica_columns)])
            if replica.reason and replica.reason != service.reason:
                reasons.append(f"{replica.name}: {replica.reason}")
    headings = ["SERVICE_NAME", *(column.heading for column in replica_columns)]
    blocks = [
        ["Services", *aligned([column.heading for column in service_columns], services)],
        ["Service Replicas", *(aligned(headings, replicas) if replicas else ["No existing replicas."])],
        *([reasons] if reasons else []),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def uptime(seconds: float | None) -> str:
    """A time span as SkyServe prints it: `8m 16s`, `1d 2h 5s`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return "< 1s"
    words, rest = [], int(seconds)
    for unit, length in _UNITS:
        count, rest = divmod(rest, length)
        if count:
            words.append(f"{count}{unit[0]}")
    return " ".join(words)


def ago(seconds: float) -> str:
    """An age as SkyServe prints it: `16 mins ago`."""
    for unit, length in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {_SHORT.get(unit, unit)}{'s' * (count > 1)} ago"
    return "< 1 sec ago"
