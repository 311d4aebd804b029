"""python -m tests.chaos: many seeded steps, then how soon the balancer notices faults with default settings.

With --peer, the same faults at replicas behind another balancer, and a row of counts of what clients got. With
--tenants, steps among models that share a GPU (tests/chaos/tenants.py).
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time

import uvloop

from tests.bench.install import Unavailable
from tests.chaos import tenants
from tests.chaos.compared import NAMES, compare
from tests.chaos.faults import Faults
from tests.chaos.judge import Judge
from tests.chaos.load import Load
from tests.chaos.run import Report, play
from tests.chaos.stage import Violation, stage
from tests.chaos.watcher import GONE


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.partition(":")[2].strip().partition("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--by", choices=("both", "list", "dns"), default="both", help="how replicas are discovered")
    parser.add_argument("--peer", choices=NAMES, help="count what becomes of requests behind this balancer instead")
    parser.add_argument("--tenants", action="store_true", help="play among models that share a GPU instead")
    parser.add_argument("--workers", type=int, default=1, help="relays of the balancer (with --by list)")
    flags = parser.parse_args()
    if flags.workers > 1 and flags.by != "list":
        parser.error("--workers goes with --by list")
    os.environ["BALANCER_WORKERS"] = str(flags.workers)
    if flags.tenants:
        return _play_tenants(flags.seed, flags.steps)
    if flags.peer:
        return _compare(flags.peer, flags.seed, flags.steps)
    half = flags.steps // 2
    shares = {"both": {"list": flags.steps - half, "dns": half}}.get(flags.by, {flags.by: flags.steps})
    print(f"seed {flags.seed}: " + " beside ".join(f"{share} steps by {way}" for way, share in shares.items()))
    try:
        reports = asyncio.run(_play(flags.seed, shares))
    except ExceptionGroup as group:
        violations, others = group.split(Violation)
        if violations is None or others is not None:
            raise
        print(f"\n{violations.exceptions[0]}")
        return 1
    for way, report in reports.items():
        _print(way, report)
    print("\nHow long it takes with the default settings (probe each 1 s, time-out 5 s), in seconds:")
    try:
        noticed = asyncio.run(_noticing())
    except Violation as violation:
        print(f"  {violation}")
        return 1
    for name, took, bound in noticed:
        print(f"  {name:42} {took:7.3f}   at most {bound:g}")
    return 0


def _play_tenants(seed: int, steps: int) -> int:
    print(f"seed {seed}: {steps} steps among tenants")
    try:
        report = uvloop.run(tenants.play(seed, steps, Teller("tenants", steps)))
    except Violation as violation:
        print(f"\n{violation}\n\nagain: python -m tests.chaos --tenants --seed {seed} --steps {steps}")
        return 1
    print(f"\n{steps} steps, {report.requests} requests in {report.seconds:.0f} s, clean")
    print("  steps: " + ", ".join(f"{name} {count}" for name, count in sorted(report.steps.items())))
    print("  answers: " + ", ".join(f"{end} {count}" for end, count in sorted(report.ends.items())))
    print(f"  longest wait for a turn: {report.longest_wait:.2f} s; the bound: {report.bound:.2f} s")
    return 0


def _compare(name: str, seed: int, steps: int) -> int:
    try:
        count = asyncio.run(compare(name, seed, steps, Teller(name, steps)))
    except (Violation, Unavailable) as why:
        print(f"\n{name}: {why}")
        return 1
    ends = " | ".join(str(count.ends[end]) for end in ("answered", "lost", "broken"))
    beside = " | ".join(str(number) for number in (count.doubled, count.late, count.ends["refused"]))
    print(f"\nseed {seed}, {steps} steps, {count.requests} requests in {count.seconds:.0f} s")
    print("faults: " + ", ".join(f"{fault} {times}" for fault, times in sorted(count.steps.items())))
    print("not answered: " + ", ".join(f"{why} {times}" for why, times in sorted(count.why.items())))
    print(f"a second replica took over: {count.elsewhere}; left by the client: {count.ends['left']}")
    print(
        "\n| balancer | answered | lost | broken | doubled | told late | refused | 500s passed on | replicas killed |"
    )
    print(f"| {name} | {ends} | {beside} | {count.ends['passed on']} | {count.killed} |")
    return 0


async def _play(seed: int, shares: dict[str, int]) -> dict[str, Report]:
    """One run per way of discovery, in parallel; the first violation ends them all."""

    async def one(way: str, steps: int) -> Report:
        try:
            return await play(seed, steps, way == "dns", Teller(way, steps))
        except Violation as violation:
            again = f"python -m tests.chaos --by {way} --seed {seed} --steps {steps}"
            raise Violation(f"by {way}, {violation}\n\nagain: {again}") from None

    async with asyncio.TaskGroup() as group:
        runs = {way: group.create_task(one(way, steps)) for way, steps in shares.items()}
    return {way: run.result() for way, run in runs.items()}


class Teller:
    """Shows the progress of a run: on a terminal one line that is overwritten, elsewhere a line every 50 steps.

    `way`: how the replicas are discovered, or whose run it is.
    """

    def __init__(self, way: str, steps: int) -> None:
        self.way = way
        self.steps = steps
        self.began = time.monotonic()

    def __call__(self, step: int, name: str, requests: int) -> None:
        took = time.monotonic() - self.began
        line = f"by {self.way}: step {step}/{self.steps}, {requests} requests, {took:.0f} s: {name}"
        if sys.stdout.isatty():
            print(f"\r{line:100}", end="\n" if step == self.steps else "", flush=True)
        elif step % 50 == 0 or step == self.steps:
            print(line, flush=True)


def _print(way: str, report: Report) -> None:
    print(
        f"\nby {way}: {sum(report.steps.values())} steps, {report.requests} requests in {report.seconds:.0f} s, clean"
    )
    print("  faults: " + ", ".join(f"{name} {count}" for name, count in sorted(report.steps.items())))
    print("  answers: " + ", ".join(f"{end} {count}" for end, count in sorted(report.ends.items())))
    print(f"  attempts beyond the first: {report.attempts}; sent again after the keep-alive race: {report.sent_again}")
    print(f"  answers that a second replica continued, or made: {report.elsewhere}")
    tasks = len(report.tasks) or "uncounted"
    print(f"  left behind: nothing beyond {len(report.descriptors)} descriptors and {tasks} tasks")
    print("  seconds                                     times   median      max")
    for name, took in sorted(report.measured.items()):
        print(f"    {name:40} {len(took):6} {statistics.median(took):8.3f} {max(took):8.3f}")


async def _noticing() -> list[tuple[str, float, float]]:
    """Rows of what was measured, how long it took, and its limit, in seconds; raises Violation beyond that."""
    async with stage(2, False, has_defaults=True) as here:
        judge, load = Judge(here), Load(here.port, "", 0)
        load.runs.set()
        faults = Faults(here, load, judge, random.Random(0))
        first = here.replicas[0]
        found = []
        await faults.all_ready(20)

        async def noticed(name: str, bound: float, *wanted: str | None) -> None:
            found.append((name, await faults.until(first, wanted, bound, name), bound))

        await asyncio.sleep(2.5)
        first.signal(signal.SIGKILL)
        await noticed("kill -9, without traffic, to not ready", 1.0, *GONE)
        await first.ended()
        await first.start()
        await noticed("listening again to ready", 3.0, "READY")
        first.signal(signal.SIGSTOP)
        await noticed("SIGSTOP to not ready", 12.0, *GONE)
        first.signal(signal.SIGCONT)
        await noticed("SIGCONT to ready", 2.0, "READY")
        await first.tell("refuse")
        for number in range(10):
            await faults.one_more(f"refused-{number}")
        await judge.until_logged(load.got)
        judge.judge(load.got)
        if judge.attempts > 1:
            raise Violation(f"{judge.attempts} requests of 10 met a refusal, and the first should have been the last")
        found.append(("requests of 10 that met a refusal", float(judge.attempts), 1.0))
        await here.stop()
        return found


if __name__ == "__main__":
    raise SystemExit(main())
