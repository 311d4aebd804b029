"""The tables that people read: Markdown, so that they can go into a page as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.figures import Figure, Figures, ratio
from tests.bench.peers import COMPILED, OURS, RUST_ROUTERS, Launch

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


@dataclass(frozen=True)
class Bar:
    """How much CPU one of our builds may take, as a part of a peer's in the same round."""

    build: str
    column: str  # of Figures
    peers: Sequence[str]  # the best of them counts
    most: float

    def text(self, share: float | None) -> str:
        what = {"cpu_per_request_us": "request", "cpu_per_event_us": "relayed event"}[self.column]
        whose = "Envoy's" if self.peers == ENVOY else "the better Rust router's"
        most = whose if self.most == 1 else f"{self.most:g} times {whose}"
        return f"{self.build}: CPU per {what} at most {most}: {times(share)} times"

    def share(self, rows: Mapping[str, Figures]) -> float | None:
        """None where it, or what it is compared with, was not measured."""
        if self.build not in rows:
            return None
        return ratio(
            getattr(rows[self.build], self.column), [getattr(rows[p], self.column) for p in self.peers if p in rows]
        )


ENVOY = ("envoy",)
# What each build keeps. The bars are 7 to 16 % above the ratios of docs/benchmarks.md, which differ by less from run to
# run: a build that breaks one has become dearer.
PROMISES = (
    Bar(OURS, "cpu_per_request_us", ENVOY, 2.0),
    Bar(OURS, "cpu_per_event_us", ENVOY, 1.05),
    Bar(COMPILED, "cpu_per_request_us", ENVOY, 1.12),
    Bar(COMPILED, "cpu_per_request_us", RUST_ROUTERS, 0.85),
    Bar(COMPILED, "cpu_per_event_us", ENVOY, 0.95),
)
# What we want, whether it is reached or not.
GOALS = tuple(
    Bar(build, column, ENVOY, 1.0)
    for build in (OURS, COMPILED)
    for column in ("cpu_per_request_us", "cpu_per_event_us")
)


def verdict(rows: Mapping[str, Figures]) -> list[tuple[bool | None, str]]:
    """Each promise of a build that was measured: kept, broken, or None when there was nothing to compare with."""
    return _judged(PROMISES, rows)


def goals(rows: Mapping[str, Figures]) -> list[tuple[bool | None, str]]:
    """The same of what is not promised."""
    return _judged(GOALS, rows)


def _judged(bars: Sequence[Bar], rows: Mapping[str, Figures]) -> list[tuple[bool | None, str]]:
    found: list[tuple[bool | None, str]] = []
    for bar in bars:
        if bar.build in rows:
            share = bar.share(rows)
            found.append((None if share is None else share <= bar.most, bar.text(share)))
    return found


def label(name: str) -> str:
    return f"**{name}**" if name in (OURS, COMPILED) else name


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
