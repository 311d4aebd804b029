"""`python -m tests.bench.routing`: what prefix-aware routing brings on two real SGLang replicas, beside its peers.

Eight groups of requests share a long beginning each, and a replica's KV pool holds only four of them. Each round sends
the same requests through every balancer, one after the other and in another order each round; before each run the
replicas' caches are flushed and the balancer starts anew, knowing nothing. The figures are medians over the rounds.
Balancers are compared within each round, and the ratio is the median of those: a machine that grows slower from round
to round slows all of a round alike, while the medians of two balancers may come from different rounds.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from tests.bench.ask import Run, ask
from tests.bench.install import Unavailable, cache_folder
from tests.bench.peers import ONE_THREAD, Launch, Place, groundserve, nginx, sglang_router, smg
from tests.bench.report import markdown
from tests.bench.running import fetch, running, started, stop_on_sigterm, wait
from tests.bench.stats import median, quantile
from tests.bench.workload import FORMS, Form, hello, workload

PREFIX_AWARE, ROUND_ROBIN, ROUTER = "prefix_aware", "round_robin", "smg"
BALANCERS: dict[str, Callable[[Place], Launch]] = {
    PREFIX_AWARE: partial(groundserve, policy="prefix_aware"),
    ROUND_ROBIN: partial(groundserve, policy="round_robin"),
    # With its published defaults.
    ROUTER: partial(smg, settings=ONE_THREAD, policy="cache_aware"),
    "sglang-router": partial(sglang_router, settings=ONE_THREAD, policy="cache_aware"),
    "nginx": nginx,
}
GROUPS = 8
AT_ONCE = 4
REPLICA_START_LIMIT = 600.0  # seconds; on a busy machine, and when the models are still to be made


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.routing", description=__doc__.split("\n")[0])
    usual = [PREFIX_AWARE, ROUND_ROBIN, ROUTER]
    names = ", ".join(BALANCERS)
    parser.add_argument("--only", nargs="+", choices=[*BALANCERS], default=usual, metavar="NAME", help=names)
    parser.add_argument("--form", nargs="+", choices=[*FORMS], default=[*FORMS], help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--requests", type=int, default=40, help="in each run, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder of the results, default %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="of the peers, default %(default)s")
    parser.add_argument("--no-verdict", action="store_true", help="exit 0 even when a promised ratio does not hold")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.requests < GROUPS:
        parser.error(f"--rounds must be at least 1, --requests at least {GROUPS}")
    return options


@contextlib.contextmanager
def sglang_replicas(form: Form, folder: Path) -> Iterator[tuple[str, str]]:
    """The URLs of two real SGLang servers on the CPU, started side by side."""
    with contextlib.ExitStack() as stack:
        urls, waits = [], []
        for number, port in enumerate(free_ports(2), 1):
            log = folder / f"replica-{number}.log"
            command = [sys.executable, "-m", "replica", "--device", "cpu", "--model", form.model, "--port", str(port)]
            launch = Launch([*command, "--", "--max-total-tokens", str(form.pool_tokens)])
            name = f"replica {number} of {form.model}"
            process = stack.enter_context(started(name, launch, log))
            urls.append(f"http://127.0.0.1:{port}")
            waits.append(partial(wait, name, process, log, partial(trouble, urls[-1]), REPLICA_START_LIMIT))
        for until_ready in waits:
            until_ready()
        yield urls[0], urls[1]


def trouble(url: str) -> str | None:
    """Why the replica is not ready."""
    status, body = fetch(url + "/ready")
    return None if status == 200 else f"{status} {body[:120]!r}"


def flush(urls: Sequence[str]) -> None:
    """Empties the replicas' prefix caches once nothing runs on them. Raises Unavailable when they will not."""
    for url in urls:
        status, body = fetch(f"{url}/flush_cache?timeout=20", b"{}")
        if status != 200:
            raise Unavailable(f"{url} did not flush its cache: {status} {body[:200]!r}")


def measure(form: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """(runs by balancer, reasons by balancer that could not be measured). Raises Unavailable without replicas."""
    runs: dict[str, list[Run]] = {name: [] for name in options.only}
    unavailable: dict[str, str] = {}
    print(f"{form}: starting two replicas of {FORMS[form].model}", flush=True)
    with sglang_replicas(FORMS[form], folder) as urls:
        for number in range(1, options.rounds + 1):
            requests = workload(form, GROUPS, options.requests, seed=number)
            turn = number % len(options.only)
            for name in options.only[turn:] + options.only[:turn]:
                if name in unavailable:
                    continue
                try:
                    run = measure_run(name, FORMS[form], urls, requests, options.cache, folder)
                except Unavailable as reason:
                    unavailable[name] = str(reason)
                    del runs[name]
                    words = f"not measured: {reason}"
                else:
                    runs[name].append(run)
                    words = (
                        f"FAILED: {run.errors[0]}" if run.errors else f"{run.seconds:.1f} s, cached {share(run):.2f}"
                    )
                print(f"  {form} round {number}: {name}: {words}", flush=True)
    return runs, unavailable


def measure_run(name: str, form: Form, urls: tuple[str, str], requests: list, cache: Path, folder: Path) -> Run:
    place = Place(*free_ports(2), urls, folder / name, cache)
    place.folder.mkdir(exist_ok=True)
    log = place.folder / "output.log"
    with running(name, BALANCERS[name](place), place.port, log, hello(form), expected=None) as target:
        flush(urls)
        return asyncio.run(ask(target.url, form.model, requests, AT_ONCE))


def share(run: Run) -> float:
    """Of all prompt tokens, those that a replica had cached."""
    return run.cached_tokens / max(1, sum(run.prompt_tokens))


def figures(run: Run) -> dict[str, float]:
    """In seconds and as a share."""
    return {
        "total": run.seconds,
        "ttft_mean": sum(run.ttft) / len(run.ttft),
        "ttft_p50": quantile(run.ttft, 0.5),
        "cached": share(run),
    }


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """The figures' medians over the rounds."""
    found = [figures(run) for run in runs]
    return {column: median([row[column] for row in found]) for column in found[0]}


def ratio(column: str, runs: Sequence[Run], others: Sequence[Run]) -> float:
    """Of one balancer's figure to another's in the same round, the median over the rounds."""
    return median([figures(one)[column] / figures(other)[column] for one, other in zip(runs, others, strict=True)])


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    head = ["balancer", "total, s", "mean TTFT, s", "TTFT p50, s", "cached share", "total to round robin's"]
    base = runs.get(ROUND_ROBIN)
    lines = []
    for name, found in runs.items():
        row = medians(found)
        cells = [f"{row['total']:.1f}", f"{row['ttft_mean']:.2f}", f"{row['ttft_p50']:.2f}", f"{row['cached']:.2f}"]
        lines.append([name, *cells, f"{ratio('total', found, base):.2f}" if base else "-"])
    return markdown(head, lines)


def verdict(form: str, runs: Mapping[str, Sequence[Run]]) -> list[tuple[bool | None, str]]:
    """Each promise about prefix_aware: kept, broken, or None when there was nothing to compare with."""
    promises = (("total", ROUTER, 1.05), ("ttft_mean", ROUTER, 1.0), ("total", ROUND_ROBIN, 0.7))
    found: list[tuple[bool | None, str]] = []
    for column, other, limit in promises:
        if PREFIX_AWARE not in runs or other not in runs:
            found.append((None, f"{form}: {column} against {other}: one of them was not measured"))
            continue
        part = ratio(column, runs[PREFIX_AWARE], runs[other])
        kept = part < limit if other == ROUND_ROBIN else part <= limit
        found.append((kept, f"{form}: {PREFIX_AWARE}'s {column} is {part:.2f} of {other}'s, promised {limit:.2f}"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    folder = options.out / "routing-logs"
    shutil.rmtree(folder, ignore_errors=True)
    result: dict[str, dict] = {}
    verdicts: list[tuple[bool | None, str]] = []
    problems: list[str] = []
    for form in options.form:
        (folder / form).mkdir(parents=True)
        try:
            runs, unavailable = measure(form, options, (folder / form).resolve())
        except Unavailable as reason:
            print(f"{form}: the replicas are not there: {reason}", file=sys.stderr)
            return 1
        problems += [f"{form}: {name}: not measured: {reason}" for name, reason in unavailable.items()]
        for name, found in runs.items():
            problems += [f"{form}: {name}: FAILED: {run.errors[0]}" for run in found if run.errors]
        whole = {name: found for name, found in runs.items() if not any(run.errors for run in found)}
        rows = {name: medians(found) for name, found in whole.items()}
        raw = {name: [dataclasses.asdict(run) for run in found] for name, found in runs.items()}
        result[form] = {"figures": rows, "runs": raw, "unavailable": unavailable}
        verdicts += verdict(form, whole)
        print(f"\n{table(whole)}\n", flush=True)
    head = {"command": " ".join(["python -m tests.bench.routing", *sys.argv[1:]]), "cpus": os.cpu_count()}
    (options.out / "routing.json").write_text(json.dumps({**head, **result}, indent=1))
    for line in problems:
        print(line)
    for kept, text in verdicts:
        print({True: "kept: ", False: "BROKEN: ", None: "not judged: "}[kept] + text)
    print(f"results: {options.out}/routing.json")
    ours = any(f" {name}: " in problem for problem in problems for name in (PREFIX_AWARE, ROUND_ROBIN))
    return int(ours or (not options.no_verdict and any(kept is False for kept, _ in verdicts)))


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
