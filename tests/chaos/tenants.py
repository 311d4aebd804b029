"""Chaos among models that share a GPU: three services of one balancer, and a lab replica of each on one seat.

`python -m tests.chaos --tenants --steps 1000 --seed 7` plays that many seeded steps: requests to some of the models,
tenants killed in their turn or while they doze, dozes and wakes that hang, fail or are refused, the balancer ended and
started anew, and idle time. After each step it checks what is promised:

- Never are two awake: at each look their turns and pools are counted, and the card has memory for one pool only.
- Nobody who has requests waits longer for its turn than `Turns.bound`, the time of starts not counted.
- Nothing is lost: each answer is whole and right, although its only replica ended amid it. Those at the balancer when
  it ends are told so.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from balancer.app import Balancer
from balancer.config import Config
from balancer.contract.listing import ReplicaListing
from balancer.fleet.member import Member
from balancer.routing.turns import Rules, Turns
from balancer.service import Service
from balancer.spec.settings import Settings
from tests.chaos.client import Got, Wish, ask, text_of
from tests.chaos.load import body_for
from tests.chaos.stage import Violation
from tests.lab.answers import words
from tests.lab.replica import LabReplica
from tests.lab.tenant import Engine, Seat
from tests.support.until import until

MODELS = ("a", "b", "c")
PATHS = ("/v1/chat/completions", "/v1/completions")
BALANCER = "the balancer"
WEIGHTS, POOL = 10.0, 30.0  # GiB
SLICE, TURN_OVER = 0.1, 0.1
LINGERS = 0.2
SETTINGS: dict[str, Any] = {
    "ready_interval": 0.05,
    "gpu_slice": SLICE,
    "max_turn_over": TURN_OVER,
    "drain_grace": 0.0,
    "drain_timeout": 0.0,
    "start_wait": 30.0,
}
# `c` also moves its weights away after so many seconds without a request.
IDLE_AFTER = {"c": 0.5}
# How a request may end that was at the balancer when it ended: told so, or too late to be let in.
BROKEN_OFF = frozenset((("broken", 200, "stream_broken"), ("whole", 503, "shutting_down"), ("no door", 0, "")))
LOOK = 0.005  # seconds between two looks at who is awake
SLACK = 5.0  # seconds that a busy machine may add to a wait
RECOVERY = 30.0
LONGEST = 40.0  # seconds until an answer that does not come counts as hung; all share one event loop


@dataclass(slots=True)
class Fault:
    """Something that went wrong with a model's replica, or with the balancer. Times are CLOCK_MONOTONIC."""

    victim: str
    began: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Report:
    """Requests by how they ended, steps by name, and the longest wait for a turn in seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    longest_wait: float = 0.0
    bound: float = 0.0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return self.ends.total()


class Stage:
    """The tenants by their models, and the balancer in front of them, all in one event loop."""

    def __init__(self, folder: Path) -> None:
        card = len(MODELS) * WEIGHTS + POOL
        self.seat = Seat(
            folder, gpu_slice=0.5, card=card, weights=WEIGHTS, pool=POOL, move=0.05, memory=2.0, lingers=LINGERS
        )
        self.tenants: dict[str, LabReplica] = {}
        self.engines: dict[str, Engine] = {}
        self.complaints: list[str] = []
        self.balancer: Balancer | None = None
        self._log = os.open(folder / "requests.log", os.O_WRONLY | os.O_CREAT)

    @property
    def port(self) -> int:
        assert self.balancer is not None
        return int(urlsplit(self.balancer.endpoint).port or 0)

    def services(self) -> dict[str, Service]:
        """By their models; none while the balancer is away."""
        return {} if self.balancer is None else dict(zip(MODELS, self.balancer.services.all, strict=True))

    def member(self, model: str) -> Member:
        return next(iter(self.services()[model].fleet.members.values()))

    async def start_tenant(self, model: str) -> None:
        """A new process, in effect, at the same address."""
        old = self.tenants.get(model)
        if old is not None:
            await old.stop()
            await asyncio.sleep(LINGERS + 0.05)  # its memory is free by then
        new = LabReplica(served_model=model, token_interval=0.004, seat=self.seat, port=old.port if old else 0)
        self.tenants[model] = new
        async with asyncio.timeout(RECOVERY):
            await new.start()
        assert new.sharing is not None
        self.engines[model] = new.sharing.engine

    async def start_balancer(self) -> None:
        def told(model: str) -> dict[str, Any]:
            listed = ReplicaListing(f"{model}-1", self.tenants[model].url, id=1)
            settings = Settings(**SETTINGS, idle_after=IDLE_AFTER.get(model))
            return {"name": model, "replicas": (listed,), "settings": settings}

        first, *others = MODELS
        config = Config(
            listen=("127.0.0.1", 0),
            admin=("127.0.0.1", 0),
            others=tuple(Config(**told(model)) for model in others),
            **told(first),
        )
        balancer = Balancer(config, asyncio.get_running_loop(), self._log)
        await balancer.start()
        self.balancer = balancer

    async def end_balancer(self) -> None:
        """As SIGTERM does it, with no time to drain: what is in flight is broken off."""
        balancer, self.balancer = self.balancer, None
        if balancer is not None:
            await balancer.leave(asyncio.Event())
            await balancer.stop()

    def is_well(self, model: str) -> bool:
        """Does the balancer know the tenant's model, and that it can answer, if not at once?"""
        service = self.services().get(model)
        if service is None or not service.has_told_models:
            return False
        member = self.member(model)
        is_known = member.tenancy is not None and not member.tenancy.is_lost
        return is_known and self.status(model) in ("READY", "DOZING", "ASLEEP")

    def status(self, model: str) -> str:
        return self.member(model).status(asyncio.get_running_loop().time()).value

    def told(self) -> str:
        """What the replicas and the balancer say of each tenant, for a violation's message."""
        lines = []
        for model, one in self.tenants.items():
            lines.append(f"{model}: {one.sharing and one.sharing.tenant.to_json()}")
            if self.balancer is not None:
                lines.append(
                    f"  by the balancer: {self.status(model)}, {self.services()[model].has_told_models}, "
                    f"{self.member(model)}"
                )
        return "\n".join(lines)

    async def all_well(self) -> None:
        try:
            await until(lambda: all(map(self.is_well, MODELS)), "all can answer", RECOVERY)
        except AssertionError as error:
            raise Violation(str(error)) from None


class Watch:
    """Looks again and again at who is awake, and how long the others have waited. `wrong`: what it saw first."""

    def __init__(self, stage: Stage, chaos: "Chaos") -> None:
        self.wrong = ""
        self.longest_wait = 0.0
        self.longest_swap = 0.0
        self._stage = stage
        self._chaos = chaos
        self._waits: dict[str, float] = {}  # since when, by model

    @property
    def bound(self) -> float:
        return Turns(Rules(SLICE, TURN_OVER)).bound(len(MODELS) - 1, self.longest_swap, 0)

    async def run(self) -> None:
        while True:
            self._look_at_turns()
            self._look_at_waits(time.monotonic())
            await asyncio.sleep(LOOK)

    def _look_at_turns(self) -> None:
        there = {model: one.sharing for model, one in self._stage.tenants.items() if one.sharing is not None}
        for what, who in (
            ("are awake", [model for model, one in there.items() if one.tenant.is_up]),
            ("have the turn", [model for model, one in there.items() if one._turn.is_mine]),
            ("have a pool", [model for model, one in there.items() if "kv_cache" not in one.engine.released]),
        ):
            if len(who) > 1:
                self.wrong = self.wrong or f"{' and '.join(who)} {what} at once"
        for one in there.values():
            swaps = one.tenant.swaps
            self.longest_swap = max(self.longest_swap, swaps.last_doze + swaps.last_wake)

    def _look_at_waits(self, now: float) -> None:
        """A start is no turn, and while one is away or the balancer is, nobody's wait counts."""
        if self._chaos.faults_now:
            self._waits.clear()
            return
        for model, service in self._stage.services().items():
            one = self._stage.tenants[model]
            wants = service.admission.queue_depth or one.generating
            if not wants or (one.sharing is not None and one.sharing.tenant.is_up):
                self._waits.pop(model, None)
                continue
            waited = now - self._waits.setdefault(model, now)
            self.longest_wait = max(self.longest_wait, waited)
            if waited > self.bound + SLACK:
                self.wrong = self.wrong or f"{model} has waited for {waited:.1f} s; the bound is {self.bound:.1f} s"


class Chaos:
    """The steps. Each asks some models for something, disturbs the tenants or not, and ends with all well again."""

    def __init__(self, stage: Stage, chance: random.Random, report: Report) -> None:
        self.faults_now = 0
        self.faults: list[Fault] = []
        self._stage = stage
        self._chance = chance
        self._report = report
        self._asked: list[tuple[str, asyncio.Task[Got]]] = []
        self._number = 0

    def all(self) -> dict[str, tuple[int, Callable[[], Awaitable[None]]]]:
        """Each step with its weight."""
        return {
            "ask one": (5, lambda: self.ask(1)),
            "ask two": (6, lambda: self.ask(2)),
            "ask all": (6, lambda: self.ask(3)),
            "kill in its turn": (4, self.kill_in_turn),
            "kill while it dozes": (2, self.kill_dozing),
            "doze or wake hangs": (4, self.hang),
            "doze refused": (3, self.refuse),
            "doze or wake fails": (3, self.fail),
            "balancer": (3, self.end_balancer),
            "idle": (3, self.idle),
        }

    async def one(self, name: str) -> None:
        """Plays this step, waits for its answers and judges them. Raises Violation."""
        await self.all()[name][1]()
        for model, task in self._asked:
            self._judge(model, await task)
        self._asked.clear()
        self.faults.clear()
        await self._stage.all_well()
        left = {
            model: (service.admission.queue_depth, self._stage.member(model).in_flight)
            for model, service in self._stage.services().items()
        }
        if any(map(any, left.values())):
            raise Violation(f"all is answered, and the balancer says (waiting, in flight): {left}")
        died = {model: engine.died_of for model, engine in self._stage.engines.items() if engine.died_of}
        if died:
            raise Violation(f"a replica died of what it was told: {died}")
        if self._stage.complaints:
            raise Violation("the balancer complains: " + "\n".join(self._stage.complaints))

    # Requests

    async def ask(self, count: int) -> None:
        models = self._chance.sample(MODELS, count)
        for _ in range(self._chance.randint(1, 3)):
            for model in models:
                self._ask(model, self._chance.choice([1, 3, 8, 20, 60]))
            await asyncio.sleep(self._chance.uniform(0, 0.1))

    def _ask(self, model: str, tokens: int) -> None:
        self._number += 1
        path, is_stream = self._chance.choice(PATHS), self._chance.random() < 0.6
        id = f"{model}-{self._number}"
        body = json.loads(body_for(path, f"go {id}", tokens, is_stream)) | {"model": model}
        wish = Wish(id, "POST", path, json.dumps(body).encode(), is_stream, None, "".join(words(tokens)))
        self._asked.append((model, asyncio.ensure_future(ask(self._stage.port, wish, LONGEST))))

    def _judge(self, model: str, got: Got) -> None:
        end = (got.end, got.status, got.code)
        self._report.ends[" ".join(map(str, end)).strip()] += 1
        if (got.end, got.status) == ("whole", 200):
            if (text := text_of(got)) != got.wish.text:
                raise Violation(f"not the right answer: {got}\n  wanted {got.wish.text!r}\n  got {text!r}")
            return
        then = [fault for fault in self.faults if fault.began <= got.ended]
        if not (end in BROKEN_OFF and any(fault.victim == BALANCER for fault in then)):
            when = [f"{fault.victim}, {fault.began - got.began:.2f} s after it was asked" for fault in then]
            raise Violation(
                f"nothing explains {got} {got.body[-200:]!r}, after {got.ended - got.began:.2f} s; "
                f"faults then: {when or 'none'}"
            )

    # Faults

    @contextlib.asynccontextmanager
    async def _fault(self, victim: str) -> AsyncIterator[None]:
        """Lasts until all is well again."""
        self.faults.append(Fault(victim))
        self.faults_now += 1
        try:
            yield
            await self._stage.all_well()
        finally:
            self.faults_now -= 1

    def _awake(self) -> str:
        """The model that has the turn, or one by chance."""
        tenants = self._stage.tenants
        up = [model for model in MODELS if (sharing := tenants[model].sharing) and sharing.tenant.is_up]
        return up[0] if up else self._chance.choice(MODELS)

    async def kill_in_turn(self) -> None:
        victim = self._awake()
        self._ask(victim, 60)
        await self.ask(self._chance.randint(1, 3))
        await self._kill(victim)

    async def kill_dozing(self) -> None:
        victim = self._chance.choice([model for model in MODELS if model != self._awake()])
        await self._kill(victim)

    async def _kill(self, victim: str) -> None:
        async with self._fault(victim):
            self._stage.tenants[victim].fall()
            await self.ask(self._chance.randint(1, 3))
            await self._stage.start_tenant(victim)

    async def hang(self) -> None:
        engine = self._stage.engines[self._chance.choice(MODELS)]
        engine.more = self._chance.uniform(0.05, 0.3)
        await self._ask_in_turn()
        engine.more = 0.0

    async def refuse(self) -> None:
        engine = self._stage.engines[self._awake()]
        engine.is_unruly = True
        await self.ask(3)
        await asyncio.sleep(self._chance.uniform(0.1, 0.4))
        engine.is_unruly = False

    async def fail(self) -> None:
        """It ends then, because nobody knows which memory it holds."""
        victim = self._chance.choice(MODELS)
        async with self._fault(victim):
            engine, tenant = self._stage.engines[victim], self._stage.tenants[victim]
            engine.fails = "the scheduler did not answer"
            logging.getLogger("replica.tenant").setLevel(logging.CRITICAL)
            await self.ask(3)
            asked = [task for _, task in self._asked]
            await until(lambda: tenant.sharing is None or all(map(asyncio.Task.done, asked)), "it ended", LONGEST)
            engine.fails = ""
            if tenant.sharing is None:
                await self._stage.start_tenant(victim)
            logging.getLogger("replica.tenant").setLevel(logging.NOTSET)

    async def _ask_in_turn(self) -> None:
        """Asks all, so that turns change, and waits for their answers."""
        await self.ask(3)
        await asyncio.wait([task for _, task in self._asked])

    async def end_balancer(self) -> None:
        await self.ask(self._chance.randint(1, 3))
        async with self._fault(BALANCER):
            await self._stage.end_balancer()
            await asyncio.sleep(self._chance.uniform(0, 0.3))
            await self._stage.start_balancer()

    async def idle(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.1, 0.9))


async def play(seed: int, steps: int, tell: Callable[[int, str, int], None]) -> Report:
    """Plays that many steps; raises Violation that names the step. Calls `tell` after each step."""
    began, report, chance = time.monotonic(), Report(), random.Random(f"{seed} tenants")
    async with _stage() as here:
        chaos = Chaos(here, chance, report)
        watch = Watch(here, chaos)
        await here.all_well()
        watching = asyncio.ensure_future(watch.run())
        weights = {name: weight for name, (weight, _) in chaos.all().items()}
        try:
            for step in range(1, steps + 1):
                name = chance.choices(list(weights), list(weights.values()))[0]
                try:
                    await chaos.one(name)
                    if watching.done():
                        watching.result()
                    if watch.wrong:
                        raise Violation(watch.wrong)
                except Violation as violation:
                    raise Violation(f"step {step} ({name}): {violation}\n{here.told()}") from None
                report.steps[name] += 1
                tell(step, name, report.requests)
        finally:
            watching.cancel()
    report.longest_wait, report.bound = watch.longest_wait, watch.bound
    report.seconds = time.monotonic() - began
    return report


@contextlib.asynccontextmanager
async def _stage() -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        here = Stage(Path(folder))
        asyncio.get_running_loop().set_exception_handler(lambda _, context: here.complaints.append(repr(context)))
        try:
            for model in MODELS:
                await here.start_tenant(model)
            await here.start_balancer()
            yield here
        finally:
            await here.end_balancer()
            for tenant in here.tenants.values():
                await tenant.stop()
            os.close(here._log)
