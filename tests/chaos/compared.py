"""Other balancers under the same faults: what their clients got, counted.

The same replicas, load, faults and rules as in tests/chaos/run.py, with these differences, for groundserve too: faults
that only groundserve can have are left out; nobody is asked how the replicas are, so each fault lasts as long as
groundserve may take to notice it; and a fault that costs a request is counted, where otherwise it would end the run.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from tests.bench.install import cache_folder
from tests.bench.peers import Place
from tests.bench.running import started
from tests.chaos.client import Got, Wish, ask, text_of
from tests.chaos.faults import Faults
from tests.chaos.judge import POISON, Judge
from tests.chaos.load import Load, body_for
from tests.chaos.peers import PEERS
from tests.chaos.replica import Ill, Replica
from tests.chaos.run import CLIENTS, REPLICAS
from tests.chaos.stage import Stage, Violation, stage

OURS = "groundserve"
NAMES = (OURS, *PEERS)
PATHS = ("/v1/chat/completions", "/v1/completions")  # those that all of them serve
ONLY_OURS = {"drain", "shrink and grow", "names fail"}
LATE = 6.0  # seconds; time-outs are 5 at most, and an undisturbed answer takes 2
REST = 1.5  # seconds without load after each fault: two checks of those that check once a second
HOLD = 0.2  # seconds from the load's begin to the fault, which would find no request under way if it came at once
WELL = 8  # answers in a row after which the next fault comes


@dataclass(slots=True)
class Count:
    """Requests by what became of them. `late` and `doubled` are counted beside that.

    answered: whole, with the text that one replica makes. lost: an error after a replica had begun to generate, or no
    whole answer. broken: a stream that began and was not whole, or not the text. refused: an error before any replica
    had begun. passed on: a replica's own 500. left: the client went away.
    """

    ends: Counter[str] = field(default_factory=Counter)
    late: int = 0  # that failed, and of which the client learned after more than LATE
    doubled: int = 0
    elsewhere: int = 0  # that a second replica answered or continued
    killed: int = 0  # replicas, by requests that kill them
    why: Counter[str] = field(default_factory=Counter)  # how those ended that were not answered, and during which fault
    steps: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, got: Got, judge: Judge, fault: str) -> None:
        end = ending(got, judge)
        self.ends[end] += 1
        if end not in ("answered", "left"):
            self.why[f"{end}: {got.status or ''} {got.code or got.end} ({fault})"] += 1
        self.late += end in ("lost", "broken", "refused") and got.ended - got.began > LATE
        repeats = judge.repeats(got)
        self.doubled += repeats.doubled is not None
        self.elsewhere += repeats.moved
        if end == "answered" and not judge.generated.get(got.wish.id):
            raise Violation(f"answered, though no replica generated it: {got}")

    @property
    def requests(self) -> int:
        return self.ends.total()


def ending(got: Got, judge: Judge) -> str:
    if got.end == "left":
        return "left"
    if got.end == "whole" and got.status == 200:
        try:
            return "answered" if text_of(got) == got.wish.text else "broken"
        except ValueError:  # an event that is cut, for example
            return "broken"
    if got.status == 200:
        return "broken" if got.wish.stream else "lost"
    if got.status == 500 and judge.ill(got, Ill.ERRING):
        return "passed on"
    return "refused" if got.end == "whole" and got.wish.id not in judge.generated else "lost"


@dataclass(slots=True)
class Unseen(Faults):
    """The faults without a look at the balancer: what would be waited for may take its time, and is not checked."""

    count: Count = field(default_factory=Count)

    def all(self) -> dict[str, tuple[int, Callable[[], Awaitable[None]]]]:
        return {name: fault for name, fault in Faults.all(self).items() if name not in ONLY_OURS}

    async def until(self, replica: Replica, wanted: tuple[str | None, ...], within: float, what: str) -> float:
        await asyncio.sleep(within)
        return within

    async def never(self, replica: Replica, unwanted: tuple[str | None, ...], seconds: float, why: str) -> None:
        await asyncio.sleep(seconds)

    async def all_ready(self, within: float = 5.0) -> None:
        """After each fault, the run waits until all is well."""

    async def until_new(self, replica: Replica, since: float) -> None:
        """Nobody is asked whether he knows it."""

    async def one_more(self, id: str) -> None:
        await self.load.ask(Wish(id, "POST", PATHS[1], body_for(PATHS[1], f"go {id}", 1, False), text=" t00"))

    def poisoned(self, replicas: int, told: list[Got]) -> None:
        self.count.killed += replicas


class PeerStage(Stage):
    """The stage with another balancer, which `started` has started."""

    async def start(self) -> None:
        await asyncio.gather(*(replica.start() for replica in self.replicas))

    async def stop(self) -> None:
        """Its end is not looked at."""


@contextlib.contextmanager
def peer(name: str, here: Stage, log: Path) -> Iterator[None]:
    """Another balancer in front of the stage's replicas, in place of ours."""
    here.port, side = free_ports(2)
    folder = here.folder / name
    folder.mkdir()
    place = Place(here.port, side, tuple(replica.url for replica in here.replicas), folder, cache_folder())
    with started(name, PEERS[name](place), log):
        yield


@contextlib.asynccontextmanager
async def compared(name: str) -> AsyncIterator[Stage]:
    """The stage with the balancer of that name, ours included."""
    async with stage(REPLICAS, False, kind=Stage if name == OURS else PeerStage) as here:
        if name == OURS:
            yield here
            return
        log = here.folder / "peer.log"
        with peer(name, here, log):
            yield here


async def compare(name: str, seed: int, steps: int, tell: Callable[[int, str, int], None]) -> Count:
    """Plays that many steps; raises Violation if the balancer does not come back after one. Calls `tell` after each."""
    began, count = time.monotonic(), Count()
    async with compared(name) as here:
        judge, load = Judge(here), Load(here.port, str(seed), CLIENTS, PATHS, 0.0)
        faults = Unseen(here, load, judge, random.Random(f"{seed} compared"), count=count)
        try:
            await well(here, 60)
            load.start()
            await asyncio.sleep(1.0)
            for step in range(1, steps + 1):
                load.runs.set()
                await asyncio.sleep(HOLD)
                fault = await faults.one()
                await load.pause()
                gots, load.got = load.got, []
                judge.read_journal()
                for got in gots:
                    if not got.wish.id.startswith(POISON):  # nobody can answer those
                        count.add(got, judge, fault)
                    judge.forget(got)
                judge.forget_spells()
                count.steps[fault] += 1
                tell(step, fault, count.requests)
                await asyncio.sleep(REST)
                await well(here, 30)
        finally:
            await load.stop()
    count.seconds = time.monotonic() - began
    return count


async def well(here: Stage, within: float) -> None:
    """Waits until enough requests in a row are answered; these are not counted."""
    until = time.monotonic() + within
    answered = 0
    while answered < WELL:
        got = await ask(here.port, Wish("well", "POST", PATHS[1], body_for(PATHS[1], "go", 1, False)))
        answered = answered + 1 if (got.status, got.end) == (200, "whole") else 0
        if time.monotonic() > until:
            raise Violation(f"not well again after {within:g} s: {got}")
        await asyncio.sleep(0.02)
