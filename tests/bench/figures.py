"""From what the load generator saw in each round to the figures of the table: medians over the rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.stats import median

Round = dict[str, dict]  # load ("requests", "streams") to the load generator's result


@dataclass(frozen=True)
class Figure:
    """The median over the rounds, their extremes, and they themselves; or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figures:
    """One balancer's row. `added` is against no balancer at all, in the same round."""

    cpu_per_request_us: Figure
    requests_a_second: Figure
    cpu_per_event_us: Figure
    ttft_p50_added_ms: Figure
    ttft_p99_added_ms: Figure
    gap_p99_added_ms: Figure
    events_per_read: Figure  # above 1 it lagged, and what it relayed in one piece looks cheaper than it is
    idle_mib: Figure
    stream_kib: Figure


def figure(samples: Sequence[float]) -> Figure:
    return Figure(median(samples), min(samples), max(samples), samples=tuple(samples))


def figures(rounds: Sequence[Round], direct: Sequence[Round], memory: dict) -> Figures:
    """One balancer's figures; where anything was wrong, in any round, a reason stands in place of a figure."""

    def over(load: str, value) -> Figure:
        for number, (ours, bare) in enumerate(zip(rounds, direct, strict=True), 1):
            for who, result in (("", ours[load]), ("without a balancer: ", bare[load])):
                if result["errors"]:
                    return Figure(None, reason=f"round {number}: {who}{first_error(result)}")
        return figure([value(ours[load], bare[load]) for ours, bare in zip(rounds, direct, strict=True)])

    def added(name: str) -> Figure:
        return over("streams", lambda ours, bare: (ours[name] - bare[name]) * 1e3)

    def microseconds(ours: dict, _: dict) -> float:
        return ours["cpu_seconds"] / ours["count"] * 1e6

    if memory["errors"]:
        per_stream = Figure(None, reason=first_error(memory))
    else:
        per_stream = figure([(memory["after"] - memory["before"]) / memory["count"] / 1024])
    return Figures(
        cpu_per_request_us=over("requests", microseconds),
        requests_a_second=over("requests", lambda ours, _: ours["count"] / (ours["end"] - ours["start"])),
        cpu_per_event_us=over("streams", microseconds),
        ttft_p50_added_ms=added("ttft_p50"),
        ttft_p99_added_ms=added("ttft_p99"),
        gap_p99_added_ms=added("gap_p99"),
        events_per_read=over("streams", lambda ours, _: ours["events_per_read"]),
        idle_mib=figure([memory["before"] / 2**20]) if "before" in memory else per_stream,
        stream_kib=per_stream,
    )


def first_error(result: dict) -> str:
    """The most frequent error of one load, and how often it came."""
    error, times = next(iter(result["errors"].items()))
    return f"{error} ({times} times)"


def check_counts(result: dict, seen: Sequence[int]) -> dict:
    """The result, with an error when the replicas saw other requests than were sent, or one saw most of them."""
    errors = dict(result["errors"])
    sent = result.get("sent", 0)
    if not errors and sum(seen) != sent:
        errors[f"{sent} requests were sent, the replicas saw {sum(seen)}"] = 1
    if not errors and min(seen) < 0.4 * sum(seen):
        errors[f"round robin gave the replicas {seen[0]} and {seen[1]} requests"] = 1
    return {**result, "errors": errors}


def ratio(ours: Figure, theirs: Sequence[Figure]) -> float | None:
    """Ours to the best of theirs in the same round, the median over the rounds; None when either is missing.

    Within a round, because what drifts on the machine changes the rounds and hits all balancers of one alike.
    """
    known = [figure.samples for figure in theirs if figure.samples]
    if not ours.samples or not known:
        return None
    return max(median([one / other for one, other in zip(ours.samples, them, strict=True)]) for them in known)
