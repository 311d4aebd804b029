"""One chaos run: faults under load, with all invariants checked after each, and leaks every LEAKS_EVERY steps."""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.faults import Faults
from tests.chaos.judge import Judge
from tests.chaos.load import Load
from tests.chaos.stage import Stage, Violation, stage

REPLICAS = 4
CLIENTS = 5
# Steps between two checks for leaks.
LEAKS_EVERY = 20
# Seconds within which idle descriptors and tasks must be gone. What the balancer asked a silent replica, it asked on a
# connection that the replica closes 5 s later, or when a busy machine comes to it.
SETTLED = 15.0


@dataclass(slots=True)
class Report:
    """The results of a run: requests by how they ended, faults by name, seconds by what was measured."""

    requests: int = 0
    seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    measured: dict[str, list[float]] = field(default_factory=dict)
    sent_again: int = 0
    elsewhere: int = 0
    attempts: int = 0
    descriptors: list[str] = field(default_factory=list)  # what they are
    tasks: list[str] = field(default_factory=list)  # what they run


async def play(seed: int, steps: int, is_dns: bool, tell: Callable[[int, str, int], None]) -> Report:
    """Plays that many steps; raises Violation that names the step and its fault. Calls `tell` after each step."""
    began, report = time.monotonic(), Report()
    chance = random.Random(f"{seed} {'dns' if is_dns else 'list'}")
    async with stage(REPLICAS, is_dns) as here:
        judge, load = Judge(here), Load(here.port, str(seed), CLIENTS)
        faults = Faults(here, load, judge, chance)
        step = 0
        try:
            await faults.all_ready(within=20)
            load.start()
            await asyncio.sleep(1.0)
            await look(here, judge, load, report)
            report.descriptors, report.tasks = await settled(here)
            for step in range(1, steps + 1):
                load.runs.set()
                await faults.hold()  # a fault that comes at once would find no request under way
                name = await faults.one()
                await faults.all_ready()
                await look(here, judge, load, report)
                report.steps[name] += 1
                if step % LEAKS_EVERY == 0 or step == steps:
                    await no_leaks(here, report)
                tell(step, name, report.requests)
            faults.judge_times()
            await here.stop()
        except Violation as violation:
            raise Violation(f"step {step} ({faults.playing}): {violation}") from None
        finally:
            await load.stop()
    report.ends, report.measured, report.sent_again = dict(judge.counts), dict(faults.measured), judge.sent_again
    report.attempts, report.elsewhere = judge.attempts, judge.elsewhere
    report.seconds = time.monotonic() - began
    return report


async def look(here: Stage, judge: Judge, load: Load, report: Report) -> None:
    """Checks the invariants after a step, with nothing in flight; raises Violation."""
    await load.pause()
    gots, load.got = load.got, []
    report.requests += len(gots)
    await judge.until_logged(gots)
    judge.judge(gots)
    service = (await here.status())["service"]
    left = {key: service[key] for key in ("in_flight", "queue_depth") if service[key]}
    if left:
        raise Violation(f"nothing is in flight, and the balancer says {left}")
    if service["status"] != "READY":
        raise Violation(f"all replicas are READY, and the service is {service['status']}")
    if here.complaints:
        raise Violation("the balancer complains: " + "\n".join(here.complaints[-20:]))


async def settled(here: Stage) -> tuple[list[str], list[str]]:
    """The balancer's descriptors and tasks once idle connections have timed out."""
    await asyncio.sleep(2 * here.settings["upstream_keep_alive"])
    return here.descriptors(), await here.tasks() if here.is_dns else []


async def no_leaks(here: Stage, report: Report) -> None:
    began = time.monotonic()
    while True:
        now = await settled(here)
        untried = [row for row in (await here.status())["replicas"] if row["continues"] is None]
        # The chat template of one that did not answer then is tried again after a pause, by a task of its own.
        if len(now[0]) <= len(report.descriptors) and len(now[1]) <= len(report.tasks) + len(untried):
            return
        if time.monotonic() - began > SETTLED:
            told = []
            for before, after in zip((report.descriptors, report.tasks), now, strict=True):
                told += [f"+ {what}" for what in (Counter(after) - Counter(before)).elements()]
                told += [f"- {what}" for what in (Counter(before) - Counter(after)).elements()]
            raise Violation("left behind, beside what there was at the beginning:\n  " + "\n  ".join(told))
