"""`python -m tests.bench.sizes`: what relaying costs by the size of a request, of a fleet, with TLS, and under streams.

Requests of 200 bytes to 1 MiB with answers of 600 bytes, by two policies: round_robin passes bodies on unread,
prefix_aware reads them. Then 1,000 streams at once, 10 events a second each. With one relay and with several: requests
and events a second, and their CPU. Last, with 2 to 1,000 replicas: what their
probes cost, a scrape of the metrics, a request by policy, and a scrape while requests keep the balancer busy, and how
late its event loop is then by what it says itself.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from tests.bench.figures import first_error
from tests.bench.install import Unavailable
from tests.bench.messages import CHAT_PATH
from tests.bench.peers import Place, groundserve
from tests.bench.process_tree import cpu_seconds
from tests.bench.report import markdown
from tests.bench.running import SMALL_REQUEST, Running, fetch, load, replicas, started, stop_on_sigterm, wait
from tests.bench.stats import median
from tests.security.certificates import Authority

SIZES = {"200 B": 200, "16 KiB": 16 << 10, "128 KiB": 128 << 10, "1 MiB": 1 << 20}
FLEETS = (2, 64, 1000)
SCRAPES = 20
_LAG = re.compile(r'groundserve_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)')


@dataclass(frozen=True)
class Ours:
    """One of our balancers: where it answers, and its admin port."""

    running: Running
    admin: str


def start(
    name: str, urls: Sequence[str], policy: str, folder: Path, flags: Sequence[str], stack: contextlib.ExitStack
) -> Ours:
    """Raises Unavailable."""
    place = Place(*free_ports(2), tuple(urls), folder, folder)  # type: ignore[arg-type]
    launch = groundserve(place, policy)
    launch = replace(launch, command=[*launch.command, *flags])
    log = folder / f"{name}.log"
    process = stack.enter_context(started(name, launch, log))
    admin = f"http://127.0.0.1:{place.side_port}"

    def trouble() -> str | None:
        ready = json.loads(fetch(f"{admin}/status")[1])["service"]["ready"]
        return None if ready == len(urls) else f"{ready} replicas ready"

    wait(name, process, log, trouble, max(60.0, 0.2 * len(urls)))
    scheme = "https" if "--tls-cert" in flags else "http"
    return Ours(Running(f"{scheme}://127.0.0.1:{place.port}", process.pid), admin)


def checked(result: dict) -> dict:
    """Raises Unavailable where anything went wrong."""
    if result["errors"]:
        raise Unavailable(first_error(result))
    return result


def bodies(found: dict[str, Ours], seconds: float) -> list[list[str]]:
    """A row for each size: microseconds of CPU a request, and requests a second, by balancer."""
    rows = []
    for words, size in SIZES.items():
        row = [words]
        for ours in found.values():
            count = 32 if size < 1 << 20 else 8
            flags = ("--body-bytes", str(size))
            result = checked(load("requests", ours.running, count, seconds, min(1.0, seconds), 1, *flags))
            each = result["cpu_seconds"] / max(1, result["count"]) * 1e6
            row += [f"{each:,.0f}", f"{result['count'] / (result['end'] - result['start']):,.0f}"]
        rows.append(row)
        print(f"  {words}: {', '.join(row[1::2])} µs", flush=True)
    return rows


def streams(found: dict[str, Ours], count: int, seconds: float) -> list[list[str]]:
    """A row for each balancer, with so many streams at once."""
    rows = []
    for name, ours in found.items():
        result = checked(load("streams", ours.running, count, seconds, 2.0, 1, "--slow"))
        rows.append(
            [
                name,
                f"{result['cpu_seconds'] / result['count'] * 1e6:.1f}",
                f"{result['count'] / (result['end'] - result['start']):,.0f}",
                f"{result['ttft_p99'] * 1e3:.0f}",
                f"{result['gap_p99'] * 1e3:.0f}",
                f"{result['events_per_read']:.2f}",
            ]
        )
        print(f"  {count} streams, {name}: {rows[-1][1]} µs per event", flush=True)
    return rows


@contextlib.contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Programs that this thread starts meanwhile run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def workers(
    options: argparse.Namespace, urls: Sequence[str], generators: int, cores: Sequence[int], folder: Path
) -> list[list[str]]:
    """A row for each number of relays, which all hear from so many load generators.

    `cores`: as many as there are relays are for these alone; empty: they run wherever the rest does. "Own cores" is
    then how many times as much as many cores would carry as one does with one relay, by the CPU time that it took.
    Raises Unavailable.
    """
    rows: list[list[str]] = []
    first: dict[str, tuple[float, float]] = {}
    for count in options.workers:
        row = [f"{count}"]
        with contextlib.ExitStack() as stack:
            with pinned(cores[:count]) if cores else contextlib.nullcontext():
                ours = start(f"workers-{count}", urls, "round_robin", folder, ("--workers", str(count)), stack)
            for mode, at_once in (("requests", 32 * generators), ("streams", options.streams)):
                rate, each = together(ours, mode, at_once, generators, options.seconds)
                rate_of_one, each_of_one = first.setdefault(mode, (rate, each))
                own = count / options.workers[0] * each_of_one / each
                row += [f"{each:.1f}", f"{rate:,.0f}", f"{rate / rate_of_one:.2f}", f"{own:.2f}"]
        rows.append(row)
        print(f"  --workers {count}: {', '.join(row[1:])}", flush=True)
    return rows


def together(ours: Ours, mode: str, count: int, generators: int, seconds: float) -> tuple[float, float]:
    """Several load generators at once: requests or events a second, and microseconds of the balancer's CPU for each."""
    results: list[dict] = []

    def press(seed: int) -> None:
        results.append(load(mode, ours.running, count // generators, seconds, min(2.0, seconds), seed))

    threads = [threading.Thread(target=press, args=(seed,)) for seed in range(generators)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates = [checked(result)["count"] / (result["end"] - result["start"]) for result in results]
    cpu = max(result["cpu_seconds"] / (result["end"] - result["start"]) for result in results)
    return sum(rates), cpu / sum(rates) * 1e6


def lag_buckets(metrics: str) -> list[tuple[float, float]]:
    """The histogram of how late the loop was: bound in seconds, and how often it was no later."""
    return [(float(bound), float(count)) for bound, count in _LAG.findall(metrics)]


def lag_quantile(before: str, after: str, share: float) -> float:
    """The bound, in seconds, that this share of what was seen between two scrapes does not exceed."""
    seen = [
        (bound, now - then) for (bound, now), (_, then) in zip(lag_buckets(after), lag_buckets(before), strict=True)
    ]
    return next(bound for bound, count in seen if count >= share * seen[-1][1])


def scrapes(ours: Ours, seconds: float) -> list[str]:
    """Milliseconds that a scrape took under a closed loop of small requests, median and longest; the loop's lag."""
    result: dict = {}

    def press() -> None:
        result.update(load("requests", ours.running, 32, seconds, 0.5))

    loader = threading.Thread(target=press)
    before = fetch(f"{ours.admin}/metrics")[1].decode()
    loader.start()
    time.sleep(0.5 + seconds / 4)
    took, text = [], ""
    for _ in range(SCRAPES):
        began = time.monotonic()
        text = fetch(f"{ours.admin}/metrics")[1].decode()
        took.append(time.monotonic() - began)
        time.sleep(seconds / 2 / SCRAPES)
    loader.join()
    checked(result)
    lags = [lag_quantile(before, text, share) * 1e3 for share in (0.5, 0.99)]
    return [
        f"{median(took) * 1e3:.0f}",
        f"{max(took) * 1e3:.0f}",
        f"{len(text) / 1024:.0f}",
        *(f"≤ {lag:g}" for lag in lags),
        f"{result['count'] / (result['end'] - result['start']):,.0f}",
    ]


def scrape_cpu(ours: Ours, idle: float) -> float:
    """Seconds of CPU that a scrape takes while nobody asks anything; `idle` is the part of a core without scrapes."""
    assert ours.running.pid is not None
    before, began = cpu_seconds(ours.running.pid), time.monotonic()
    for _ in range(SCRAPES):
        fetch(f"{ours.admin}/metrics")
    used = cpu_seconds(ours.running.pid) - before
    return max(0.0, used - idle * (time.monotonic() - began)) / SCRAPES


def fleet(count: int, folder: Path, seconds: float) -> list[str]:
    """A row of the last table, but for the first cell; each policy in a process of its own."""
    cells, under_load = [], []
    for policy in ("round_robin", "prefix_aware"):
        with contextlib.ExitStack() as stack:
            urls = stack.enter_context(replicas())
            ours = start(f"{policy}-{count}", [*urls] * (count // 2), policy, folder, (), stack)
            assert ours.running.pid is not None
            if policy == "round_robin":
                time.sleep(1.0)  # it has just started
                before, began = cpu_seconds(ours.running.pid), time.monotonic()
                time.sleep(max(2.0, seconds))
                share = (cpu_seconds(ours.running.pid) - before) / (time.monotonic() - began)
                cells += [f"{share:.1%}", f"{scrape_cpu(ours, share) * 1e3:.0f}"]
            result = checked(load("requests", ours.running, 32, seconds, min(1.0, seconds), 1, "--prompt-kib", "4"))
            cells.append(f"{result['cpu_seconds'] / result['count'] * 1e6:,.0f}")
            if policy == "round_robin":
                under_load = scrapes(ours, max(2.0, seconds))
    return [*cells, *under_load]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The tables, by name. Raises Unavailable."""
    tables: dict[str, str] = {}
    if set(options.only) & {"bodies", "streams"}:
        measure_relay(options, folder, tables)
    if "workers" in options.only:
        tables["workers"] = measure_workers(options, folder)
    rows = []
    for count in options.fleets if "fleets" in options.only else ():
        rows.append([f"{count:,}", *fleet(count, folder, options.seconds)])
        print(f"  {count:,} replicas: {', '.join(rows[-1][1:])}", flush=True)
    if rows:
        head = [
            "replicas",
            "probes, % of a core",
            "CPU ms a scrape",
            "CPU µs: round_robin",
            "CPU µs: prefix_aware",
            "scrape, ms",
            "longest",
        ]
        head += ["KiB", "loop lag p50, ms", "p99", "requests/s meanwhile"]
        tables["fleets"] = markdown(head, rows)
    return tables


def measure_workers(options: argparse.Namespace, folder: Path) -> str:
    """The table of workers. With cores of their own, twice as much sends and answers. Raises Unavailable."""
    most, cores = max(options.workers), sorted(os.sched_getaffinity(0))
    generators, pairs, relays = most, 2, []
    with contextlib.ExitStack() as stack:
        if options.own_cores:
            generators, pairs, relays = 2 * most, 2 * most, cores[:most]
            stack.enter_context(pinned(cores[most:]))
        urls = [url for _ in range(pairs) for url in stack.enter_context(replicas())]
        rows = workers(options, urls, generators, relays, folder)
    head = ["`--workers`"]
    for what in ("request", "event"):
        head += [f"CPU µs per {what}", f"{what}s/s", "ratio", "own cores"]
    return markdown(head, rows)


def measure_relay(options: argparse.Namespace, folder: Path, tables: dict[str, str]) -> None:
    """The tables of bodies and of streams. Raises Unavailable."""
    pair = Authority(folder).sign("localhost", "DNS:localhost", "IP:127.0.0.1")
    secure = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(replicas())
        found = {
            name: start(name, urls, policy, folder, flags, stack)
            for name, policy, flags in (
                ("round_robin", "round_robin", ()),
                ("prefix_aware", "prefix_aware", ()),
                ("round_robin, TLS", "round_robin", secure),
            )
        }
        for ours in found.values():
            if not ours.running.url.startswith("https"):
                status, answer = fetch(ours.running.url + CHAT_PATH, SMALL_REQUEST)
                assert status == 200, answer
        if "bodies" in options.only:
            head = ["body", *(f"{name}: {what}" for name in found for what in ("CPU µs", "requests/s"))]
            tables["bodies"] = markdown(head, bodies(found, options.seconds))
        if "streams" in options.only:
            plain = {name: ours for name, ours in found.items() if name != "prefix_aware"}
            head = [f"{options.streams:,} streams", "CPU µs per event", "events/s", "TTFT p99, ms", "gap p99, ms"]
            head.append("events per read")
            tables["streams"] = markdown(head, streams(plain, options.streams, options.seconds))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sizes", description=__doc__.split("\n")[0])
    parts = ("bodies", "streams", "workers", "fleets")
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts], metavar="PART", help=", ".join(parts))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load, default %(default)s")
    parser.add_argument("--streams", type=int, default=1000, help="at once, default %(default)s")
    parser.add_argument(
        "--fleets", nargs="+", type=int, default=[*FLEETS], metavar="N", help="replicas; default 2 64 1000"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[1, 2], metavar="N", help="numbers of relays; default 1 2"
    )
    parser.add_argument(
        "--own-cores", action="store_true", help="keep what sends and what answers off the relays' cores"
    )
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder of the results, default %(default)s")
    options = parser.parse_args(argv)
    if min(options.fleets) < 2 or any(count % 2 for count in options.fleets):
        parser.error("--fleets: even numbers")
    if options.seconds <= 0 or options.streams < 1:
        parser.error("--seconds must be above 0, --streams at least 1")
    if options.own_cores and len(os.sched_getaffinity(0)) <= max(options.workers):
        parser.error("--own-cores: needs more cores than the most relays")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = (options.out / "sizes-logs").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        tables = measure(options, folder)
    except Unavailable as reason:
        print(f"not measured: {reason}; logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    text = "\n\n".join([*tables.values(), f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}."])
    (options.out / "sizes.md").write_text(text + "\n")
    print(f"\n{text}\n\nresults: {options.out}/sizes.md")
    return 0


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
