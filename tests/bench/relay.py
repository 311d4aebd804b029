"""`python -m tests.bench.relay`: what relaying costs, ours beside the peers', in one run on one machine.

Each round puts the same loads on every balancer, one after the other and in another order each round, so that
what drifts on the machine hits all alike. The figures are medians over the rounds, and so are the ratios, each taken
within a round.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from tests.bench import report
from tests.bench.chart import chart
from tests.bench.figures import Figures, check_counts, figures, first_error
from tests.bench.install import Unavailable, cache_folder
from tests.bench.peers import COMPILED, OURS, PEERS, Launch, Place
from tests.bench.running import Running, counts, load, replicas, running, stop_on_sigterm


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.relay", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*PEERS], default=[*PEERS], metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load in each round, default %(default)s")
    parser.add_argument("--connections", type=int, default=32, help="of the closed loop, default %(default)s")
    parser.add_argument("--streams", type=int, default=100, help="at 50 events a second, default %(default)s")
    parser.add_argument("--idle-streams", type=int, default=1000, help="opened for memory, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder of the results, default %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="of the peers, default %(default)s")
    parser.add_argument("--no-verdict", action="store_true", help="exit 0 even when a promised ratio does not hold")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds above 0")
    return options


def measure_memory(name: str, launch: Launch, port: int, log: Path, options: argparse.Namespace) -> dict:
    """In a process that has relayed one request and nothing else: memory idle, and with idle streams open."""
    with running(name, launch, port, log) as target:
        return load("idle", target, options.idle_streams, seconds=0, warmup=0.5)


def measure_round(target: Running, replica: str, number: int, options: argparse.Namespace) -> dict[str, dict]:
    warmup = min(1.0, options.seconds)  # of the loop; the time over which streams start
    loads = (("requests", options.connections), ("streams", options.streams))
    results = {}
    for mode, count in loads:
        before = counts(replica)
        result = load(mode, target, count, options.seconds, warmup, seed=number)
        seen = [after - had for after, had in zip(counts(replica), before, strict=True)]
        results[mode] = result if target.pid is None else check_counts(result, seen)
    return results


def say(name: str, number: int, results: dict[str, dict]) -> None:
    words = []
    for mode, unit in (("requests", "request"), ("streams", "event")):
        result = results[mode]
        if result["errors"]:
            words.append(f"{mode} FAILED: {first_error(result)}")
        elif result["cpu_seconds"] is not None:
            words.append(f"{result['cpu_seconds'] / result['count'] * 1e6:.1f} µs per {unit}")
    print(f"  round {number}: {name}: {', '.join(words) or 'measured'}", flush=True)


@dataclass
class Outcome:
    """By balancer: how it was started, its figures, what the load generator saw, or why there is nothing."""

    launches: dict[str, Launch] = field(default_factory=dict)
    rows: dict[str, Figures] = field(default_factory=dict)
    memory: dict[str, dict] = field(default_factory=dict)
    rounds: dict[str, list[dict]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def run(options: argparse.Namespace, folder: Path) -> Outcome:
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(replicas())
        print("starting, and memory:", flush=True)
        targets = {"direct": Running(urls[0])}
        for name in options.only:
            try:
                launch, memory, targets[name] = start(name, urls, options, folder, stack)
            except Unavailable as reason:
                outcome.unavailable[name] = str(reason)
                print(f"  {name}: not measured: {reason}", flush=True)
            else:
                outcome.launches[name], outcome.memory[name] = launch, memory
                print(f"  {name} {launch.version}: {memory.get('before', 0) / 2**20:.0f} MiB idle", flush=True)
        outcome.rounds = {name: [] for name in targets}
        names = list(targets)
        for number in range(1, options.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                results = measure_round(targets[name], urls[0], number, options)
                say(name, number, results)
                outcome.rounds[name].append(results)
    for name in outcome.launches:
        outcome.rows[name] = figures(outcome.rounds[name], outcome.rounds["direct"], outcome.memory[name])
    return outcome


def start(
    name: str, urls: tuple[str, str], options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> tuple[Launch, dict, Running]:
    """The balancer, running until the stack ends, after its memory was measured. Raises Unavailable."""
    place = Place(*free_ports(2), urls, folder / name, options.cache)
    place.folder.mkdir()
    log = place.folder / "output.log"
    launch = PEERS[name](place)
    memory = measure_memory(name, launch, place.port, log, options)
    return launch, memory, stack.enter_context(running(name, launch, place.port, log))


def write(options: argparse.Namespace, outcome: Outcome) -> None:
    result = {
        "command": " ".join(["python -m tests.bench.relay", *sys.argv[1:]]),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": {name: launch.version for name, launch in outcome.launches.items()},
        "figures": {name: asdict(row) for name, row in outcome.rows.items()},
        "unavailable": outcome.unavailable,
        "rounds": outcome.rounds,
        "memory": outcome.memory,
    }
    (options.out / "relay.json").write_text(json.dumps(result, indent=1))
    (options.out / "relay.svg").write_text(chart(outcome.rows))
    tables = "\n\n".join(
        [report.cost_table(outcome.rows, outcome.launches), report.delay_table(outcome.rows), report.NOTES]
    )
    (options.out / "relay.md").write_text(tables + "\n")
    print(f"\n{tables}\n")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # Idle streams are two sockets each, in three processes that inherit this limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = (options.out / "relay-logs").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = run(options, folder)
    write(options, outcome)
    problems = report.problems(outcome.rows, outcome.unavailable)
    if not problems:
        shutil.rmtree(folder)  # a line for each of some 100,000 requests, from each balancer
    for problem in problems:
        print(problem)
    print(f"results: {options.out}/relay.json, relay.md and relay.svg")
    ours = [name for name in (OURS, COMPILED) if name in outcome.rows]
    if OURS in options.only and OURS not in ours:
        print(f"{OURS} could not be measured", file=sys.stderr)
        return 1
    failed = [name for name in ours if any(problem.startswith(f"{name}: FAILED") for problem in problems)]
    if failed:
        print(f"not all of {', '.join(failed)} could be measured", file=sys.stderr)
        return 1
    verdicts = report.verdict(outcome.rows)
    for kept, text in verdicts:
        print({True: "kept: ", False: "BROKEN: ", None: "not judged: "}[kept] + text)
    for reached, text in report.goals(outcome.rows):
        print({True: "goal reached: ", False: "goal missed: ", None: "goal not judged: "}[reached] + text)
    return int(not options.no_verdict and any(kept is False for kept, _ in verdicts))


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
