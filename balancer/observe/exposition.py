"""Families of metrics as text, for Prometheus' own format and for OpenMetrics.

prometheus-client makes several objects of each line, and looks at each name again: 15 us a line. A scrape of 1,000
replicas has 105,000 lines, most of them of histograms, whose lines cost a fiftieth of that here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from balancer.observe.tally import Histogram


@dataclass(frozen=True, slots=True)
class Family:
    """A family of metrics. `name` comes without the suffix of its kind, which is counter, gauge, histogram or info.

    Each of `lines` is a whole line, or several that belong together, and is only made when it is asked for.
    """

    name: str
    kind: str
    said: str
    lines: Iterable[str]

    def heading(self, *, is_openmetrics: bool) -> str:
        name, kind = self.name, self.kind
        if not is_openmetrics:  # the older format names a counter as its lines do, and has no info
            name += {"counter": "_total", "info": "_info"}.get(kind, "")
            kind = "gauge" if kind == "info" else kind
        return f"# HELP {name} {self.said}\n# TYPE {name} {kind}\n"


def counter(name: str, said: str, lines: Iterable[str]) -> Family:
    return Family(name, "counter", said, lines)


def gauge(name: str, said: str, lines: Iterable[str]) -> Family:
    return Family(name, "gauge", said, lines)


def label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{escaped}"'


def line(name: str, labels: Iterable[str], value: float) -> str:
    """One sample; `labels` as `label` gives them."""
    said = ",".join(labels)
    return f"{name}{{{said}}} {value}\n" if said else f"{name} {value}\n"


def histogram(name: str, said: str, members: Iterable[tuple[str, Histogram]]) -> Family:
    """`members`: a label, empty for none, and the histogram with that label. All have the same bounds."""
    return Family(name, "histogram", said, _histogram_lines(name, members))


def _histogram_lines(name: str, members: Iterable[tuple[str, Histogram]]) -> Iterator[str]:
    begins: list[str] = []
    for labelled, values in members:
        if not begins:
            begins = [f'{name}_bucket{{le="{bound}"' for bound in (*map(float, values.bounds), "+Inf")]
        ending, braced = (f",{labelled}}} ", f"{{{labelled}}}") if labelled else ("} ", "")
        counts = [*accumulate(values.counts)]  # cumulative, as Prometheus wants them
        buckets = "".join([f"{begin}{ending}{count}\n" for begin, count in zip(begins, counts, strict=True)])
        yield f"{buckets}{name}_count{braced} {counts[-1]}\n{name}_sum{braced} {values.total}\n"
