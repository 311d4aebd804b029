"""`python -m tests.bench.features`: what our own features cost, each beside the same balancer without it, in one run.

Metrics and keys against a balancer without either; keys that are issued, with limits of tokens and requests and their
usage kept, against keys of a file; routing by prefix against taking turns, before 64 replicas with
prompts of 4 KiB, and against cutting the prompts and then taking turns: what is left is the choice itself. As in
`tests.bench.relay` the loads are put on one after the other, in another order each round, and the figures are medians
over the rounds of CPU time in microseconds.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import orjson

from balancer.accounts.store import Store
from balancer.contract.account import KeyTerms
from balancer.operate.engines.ports import free_ports
from balancer.routing.prompt import Prompt
from tests.bench.figures import Figure, figure, first_error
from tests.bench.install import Unavailable
from tests.bench.messages import CHAT_PATH
from tests.bench.peers import Launch, Place, groundserve
from tests.bench.report import markdown, ranged
from tests.bench.running import Running, load, replicas, running, stop_on_sigterm
from tests.bench.stats import median

KEY = "sk-bench"
FLEET = 64
PROMPT_KIB = 4
UNMETERED, METERED, KEYED = "no metrics, no keys", "metrics", "metrics and keys"
LIMITED = "metrics, keys with limits"
TURNS, CUT, PREFIX = "64 replicas, in turn", "64 replicas, prompts cut, in turn", "64 replicas, prefix_aware"


@dataclass(frozen=True)
class Variant:
    """One balancer, and what the load generator is told beside what it is told for all."""

    launch: Launch
    flags: tuple[str, ...] = ()
    key: str = ""
    loads: tuple[str, ...] = ("requests", "streams")


def variants(urls: tuple[str, str], folder: Path, cache: Path) -> dict[str, tuple[int, Variant]]:
    """By name: the port and how it is started and loaded."""
    keys = folder / "keys.txt"
    keys.write_text(f"bench:{sha256(KEY.encode()).hexdigest()}\n")
    many = tuple(url for _ in range(FLEET // 2) for url in urls)
    long = ("--prompt-kib", str(PROMPT_KIB))
    ports = iter(free_ports(2 * 7))  # at once: none listens before the last is drawn

    def without(part: str, launch: Launch) -> Launch:
        at = launch.command.index("balancer")
        return replace(launch, command=[*launch.command[:at], "tests.bench.altered", part, *launch.command[at + 1 :]])

    def ours(*flags: str, policy: str = "round_robin", at: tuple[str, ...] = urls) -> tuple[int, Launch]:
        place = Place(next(ports), next(ports), at, folder, cache)  # type: ignore[arg-type]
        launch = groundserve(place, policy)
        return place.port, replace(launch, command=[*launch.command, *flags])

    port, launch = ours()
    found = {UNMETERED: (port, Variant(without("metrics", launch)))}
    port, launch = ours()
    found[METERED] = port, Variant(launch)
    port, launch = ours("--api-keys", str(keys))
    found[KEYED] = port, Variant(launch, ("--key", KEY), KEY)
    issue(folder / "state")
    port, launch = ours("--state", str(folder / "state"))
    found[LIMITED] = port, Variant(launch, ("--key", KEY), KEY)
    for name, policy in ((TURNS, "round_robin"), (CUT, "round_robin"), (PREFIX, "prefix_aware")):
        port, launch = ours(policy=policy, at=many)
        launch = without("choice", launch) if name == CUT else launch
        found[name] = port, Variant(launch, long, loads=("requests",))
    return found


def issue(folder: Path) -> None:
    """Issues the key there with all limits that a key can have, none of which it reaches."""
    store = Store(folder)
    most = 10**12
    terms = KeyTerms(
        max_in_flight=most, requests_per_minute=most, requests_per_day=most, tokens_per_minute=most, tokens_per_day=most
    )
    store.add("bench", sha256(KEY.encode()).digest(), terms, time.time())
    store.close()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Figure]]:
    """By variant and load: CPU per request and per event, in microseconds. Raises Unavailable."""
    samples: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(replicas())
        chosen = variants(urls, folder, folder)
        targets: dict[str, Running] = {}
        for number, (name, (port, variant)) in enumerate(chosen.items()):
            log = folder / f"{number}.log"
            targets[name] = stack.enter_context(running(name, variant.launch, port, log, key=variant.key))
            samples[name] = {mode: [] for mode in variant.loads}
        names = list(chosen)
        for number in range(1, options.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                variant = chosen[name][1]
                for mode in variant.loads:
                    count = 32 if mode == "requests" else 100
                    result = load(
                        mode, targets[name], count, options.seconds, min(1.0, options.seconds), number, *variant.flags
                    )
                    if result["errors"]:
                        raise Unavailable(f"{name}: {first_error(result)}")
                    samples[name][mode].append(result["cpu_seconds"] / result["count"] * 1e6)
                said = ", ".join(f"{found[-1]:.1f} µs a {mode[:-1]}" for mode, found in samples[name].items())
                print(f"  round {number}: {name}: {said}", flush=True)
    return {name: {mode: figure(found) for mode, found in by.items()} for name, by in samples.items()}


def verdict(rows: dict[str, dict[str, Figure]]) -> list[tuple[bool, str]]:
    """Each promise about these costs, and whether it is kept."""

    def cost(name: str, mode: str) -> float:
        return rows[name][mode].value or 0.0

    found = []
    for mode in ("requests", "streams"):
        more = cost(KEYED, mode) / cost(UNMETERED, mode) - 1
        found.append((more <= 0.10, f"{mode}: metrics and keys cost {more:+.0%} of a balancer without, promised +10%"))
        more = cost(LIMITED, mode) / cost(KEYED, mode) - 1
        found.append((more <= 0.10, f"{mode}: keys with limits cost {more:+.0%} of keys without, promised +10%"))
    cut, chosen = (cost(name, "requests") - cost(TURNS, "requests") for name in (CUT, PREFIX))
    choice, whole = (part / cost(TURNS, "requests") for part in (chosen - cut, chosen))
    said = f"a choice by prefix among {FLEET} costs {choice:+.0%} of relaying, promised +30%"
    found.append((choice <= 0.30, f"{said} (cutting the prompt included: {whole:+.0%})"))
    return found


def cutting() -> tuple[float, float]:
    """What cutting a prompt into routing blocks takes: microseconds per KiB of text, and per MiB of embedded image."""

    def body(part: dict[str, object]) -> bytes:
        return orjson.dumps({"model": "bench", "messages": [{"role": "user", "content": [part]}]})

    def microseconds(raw: bytes) -> float:
        times = []
        for _ in range(20):
            prompt = Prompt(CHAT_PATH, [raw])
            began = time.perf_counter()
            assert prompt.blocks
            times.append(time.perf_counter() - began)
        return median(times) * 1e6

    image = "data:image/png;base64," + random.Random(1).randbytes(8 << 20).hex()  # 16 MiB
    text = random.Random(2).randbytes(32 << 10).hex(" ", 4)[: 64 << 10]  # words of eight letters
    per_image = microseconds(body({"type": "image_url", "image_url": {"url": image}})) / 16
    return microseconds(body({"type": "text", "text": text})) / 64, per_image


def table(rows: dict[str, dict[str, Figure]]) -> str:
    head = ["groundserve with", "CPU µs per request", "CPU µs per event"]
    cells = [
        [name, *(ranged(by[mode]) if mode in by else "-" for mode in ("requests", "streams"))]
        for name, by in rows.items()
    ]
    return markdown(head, cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.features", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load in each round, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder of the results, default %(default)s")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds above 0")
    folder = (options.out / "features-logs").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        rows = measure(options, folder)
    except Unavailable as reason:
        print(f"not measured: {reason}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    verdicts = verdict(rows)
    result = {
        "command": " ".join(["python -m tests.bench.features", *sys.argv[1:]]),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "cutting_microseconds": dict(zip(("kib_of_text", "mib_of_image"), cutting(), strict=True)),
        "microseconds": {name: {mode: vars(found) for mode, found in by.items()} for name, by in rows.items()},
    }
    (options.out / "features.json").write_text(json.dumps(result, indent=1))
    print(f"\n{table(rows)}\n")
    text, image = result["cutting_microseconds"].values()
    print(f"cutting a prompt into blocks: {text:.1f} µs per KiB of text, {image:.0f} µs per MiB of image\n")
    for kept, text in verdicts:
        print(("kept: " if kept else "BROKEN: ") + text)
    return int(not all(kept for kept, _ in verdicts))


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
