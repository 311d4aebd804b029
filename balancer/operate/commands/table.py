"""Snapshots as the two tables of `sky serve status`."""

from collections.abc import Iterable, Sequence

from balancer.contract.status import ReplicaRow, Snapshot

_SERVICE = ("NAME", "VERSION", "UPTIME", "STATUS", "REPLICAS", "ENDPOINT")
_SERVICE_MORE = ("LOAD_BALANCING_POLICY", "IN_FLIGHT", "QUEUED")
_REPLICA = ("SERVICE_NAME", "ID", "VERSION", "ENDPOINT", "LAUNCHED", "INFRA", "RESOURCES", "STATUS")
_REPLICA_MORE = ("IN_FLIGHT", "REQUESTS", "FAILURES", "PROMPT_TOKENS", "CACHED_TOKENS")

_UNITS = (("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
_SHORT = {"hour": "hr", "minute": "min", "second": "sec"}


def tables(snapshots: Sequence[Snapshot], verbose: bool = False) -> str:
    """Both tables, and below them why a service or replica failed; `verbose` adds columns of ours."""
    if not snapshots:
        return "No existing services."
    services, replicas, reasons = [], [], []
    for snapshot in snapshots:
        service = snapshot.service
        services.append(
            [service.name, service.version, uptime(service.uptime_seconds), service.status]
            + [f"{service.ready}/{service.total}", service.endpoint or "-"]
            + ([service.policy, service.in_flight, service.queue_depth] if verbose else [])
        )
        if service.reason:
            reasons.append(f"{service.name}: {service.reason}")
        for replica in snapshot.replicas:
            replicas.append([service.name, *_replica(replica, verbose)])
            if replica.reason and replica.reason != service.reason:
                reasons.append(f"{replica.name}: {replica.reason}")
    text = "Services\n" + _aligned(_SERVICE + _SERVICE_MORE * verbose, services)
    text += "\n\nService Replicas\n"
    text += _aligned(_REPLICA + _REPLICA_MORE * verbose, replicas) if replicas else "No existing replicas."
    return "\n\n".join([text, *(["\n".join(reasons)] if reasons else [])])


def uptime(seconds: float | None) -> str:
    """As SkyServe words a span: `8m 16s`, `1d 2h 5s`; `-` before it began."""
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
    """As SkyServe words an age: `16 mins ago`."""
    for unit, length in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {_SHORT.get(unit, unit)}{'s' * (count > 1)} ago"
    return "< 1 sec ago"


def _replica(row: ReplicaRow, verbose: bool) -> list[object]:
    cells = [row.id, row.version, row.endpoint or "-", ago(row.launched_seconds), row.infra, row.resources, row.status]
    if not verbose:
        return cells
    more = [row.in_flight, row.requests_total, row.failures_total, row.prompt_tokens_total, row.cached_tokens_total]
    return cells + more


def _aligned(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
