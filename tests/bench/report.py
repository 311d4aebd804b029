"""The tables that people read: Markdown, so that they can go into a page as they are."""

from collections.abc import Mapping, Sequence

from tests.bench.figures import Figure, Figures, ratio
from tests.bench.peers import OURS, RUST_ROUTERS, Launch

NOTES = """Medians over the rounds, with the smallest and largest in brackets; ratios are taken within each round. One
worker each; *-default: as the Rust routers come, with a worker thread for each core. "Added" is against the same load
without a balancer. Events per read above 1: it lagged, and what it passed on in one piece looks cheaper than it is."""


def cost_table(rows: Mapping[str, Figures], launches: Mapping[str, Launch]) -> str:
    """CPU per request and per event, each with its ratio to the better Rust router and to Envoy."""
    lines = []
    for name, row in rows.items():
        cells = [label(name), launches[name].version, launches[name].access_log]
        for column in ("cpu_per_request_us", "cpu_per_event_us"):
            figure = getattr(row, column)
            rust = ratio(figure, [getattr(rows[peer], column) for peer in RUST_ROUTERS if peer in rows])
            envoy = ratio(figure, [getattr(rows["envoy"], column)] if "envoy" in rows else [])
            cells += [ranged(figure), times(rust), times(envoy)]
        lines.append([*cells, plain(row.requests_a_second, ",.0f")])
    return markdown(
        [
            "balancer",
            "version",
            "access log",
            "CPU µs per request",
            "to better Rust router",
            "to Envoy",
            "CPU µs per event",
            "to better Rust router",
            "to Envoy",
            "requests/s",
        ],
        lines,
    )


def delay_table(rows: Mapping[str, Figures]) -> str:
    """What a stream waits longer than without a balancer, and memory."""
    lines = [
        [
            label(name),
            plain(row.ttft_p50_added_ms, "+.2f"),
            plain(row.ttft_p99_added_ms, "+.2f"),
            plain(row.gap_p99_added_ms, "+.2f"),
            plain(row.events_per_read, ".2f"),
            plain(row.idle_mib, ".0f"),
            plain(row.stream_kib, ".1f"),
        ]
        for name, row in rows.items()
    ]
    head = ["balancer", "TTFT p50 added, ms", "TTFT p99 added, ms", "gap p99 added, ms"]
    head += ["events per read", "MiB idle", "KiB per open stream"]
    return markdown(head, lines)


def problems(rows: Mapping[str, Figures], unavailable: Mapping[str, str]) -> list[str]:
    """One line for each peer that is not there and each figure that failed."""
    lines = [f"{name}: not measured: {reason}" for name, reason in unavailable.items()]
    for name, row in rows.items():
        reasons = {figure.reason: None for figure in vars(row).values() if figure.reason}
        lines += [f"{name}: FAILED: {reason}" for reason in reasons]
    return lines


def verdict(rows: Mapping[str, Figures]) -> list[tuple[bool | None, str]]:
    """Each promise about the relay's cost: kept, broken, or None when there was nothing to compare with."""
    found: list[tuple[bool | None, str]] = []
    for column, what in (("cpu_per_request_us", "request"), ("cpu_per_event_us", "relayed event")):
        theirs = [getattr(rows[peer], column) for peer in RUST_ROUTERS if peer in rows]
        share = ratio(getattr(rows[OURS], column), theirs)
        text = f"CPU per {what} at most the better Rust router's: {times(share)} of it"
        if share is None:
            text = f"CPU per {what}: no Rust router was measured beside it"
        found.append((None if share is None else share <= 1.0, text))
    return found


def label(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def ranged(figure: Figure) -> str:
    if figure.value is None:
        return "failed"
    digits = 0 if figure.value >= 1000 else 1
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"


def plain(figure: Figure, style: str) -> str:
    return "failed" if figure.value is None else format(figure.value, style)


def times(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
