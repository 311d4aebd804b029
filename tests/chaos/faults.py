"""The faults. Each disturbs some replicas for a moment, checks how the balancer reacts, and ends the disturbance."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos.client import Got, Wish
from tests.chaos.judge import POISON
from tests.chaos.load import body_for
from tests.chaos.replica import DRAIN_GRACE
from tests.chaos.stage import Violation
from tests.chaos.watcher import GONE, Watcher


@dataclass(slots=True)
class Faults(Watcher):
    playing: str = "nothing yet"

    def all(self) -> dict[str, tuple[int, Callable[[], Awaitable[None]]]]:
        """Each fault with its weight."""
        return {
            "kill": (6, self.kill),
            "kill and restart at once": (6, self.kill_and_restart_at_once),
            "stop": (4, self.stop),
            "terminate": (4, self.terminate),
            "swap": (2, self.swap),
            "black hole": (3, self.black_hole),
            "slow": (4, self.slow),
            "long prefill": (3, self.long_prefill),
            "flap": (6, self.flap),
            "refuse": (6, self.refuse),
            "cut": (12, self.cut),
            "hang": (3, self.hang),
            "errors": (4, self.errors),
            "busy": (5, self.busy),
            "keep-alive race": (5, self.race),
            "drop idle connections": (5, self.drop),
            "drain": (5, self.drain),
            "shrink and grow": (5 if not self.stage.is_dns else 3, self.shrink_and_grow),
            "names fail": (4 if self.stage.is_dns else 0, self.names_fail),
            "poison": (3, self.poison),
            "all refuse": (2, self.all_refuse),
            "all killed": (2, self.all_killed),
        }

    async def one(self) -> str:
        """Plays a random fault and returns its name."""
        faults = self.all()
        self.playing = self.chance.choices(list(faults), [weight for weight, _ in faults.values()])[0]
        await faults[self.playing][1]()
        return self.playing

    # Processes

    async def kill(self) -> None:
        victim = self.victim()
        await self.strike(victim)
        await self.until(victim, GONE, 0.2, "kill -9 to not ready")
        await victim.ended()
        await self.hold(0.0, 0.3)
        await victim.start()
        await self.until(victim, ("READY",), self.recovery(), "listening to ready")

    async def kill_and_restart_at_once(self) -> None:
        """Starts another process at the address before anybody can have noticed that the first is gone."""
        victim = self.victim()
        killed = time.monotonic()
        await self.strike(victim)
        await victim.ended()
        await victim.start()
        await self.until_new(victim, killed)
        await self.until(victim, ("READY",), self.recovery(), "listening to ready")

    async def stop(self) -> None:
        victim = self.victim()
        victim.signal(signal.SIGSTOP)
        await self.until(victim, GONE, self.detection, "SIGSTOP to not ready")
        await self.hold()
        victim.signal(signal.SIGCONT)
        await self.until(victim, ("READY",), self.recovery(), "SIGCONT to ready")

    async def terminate(self) -> None:
        """The replica's own drain, as our plug-in does it: nothing is lost."""
        victim = self.victim()
        victim.signal(signal.SIGTERM)
        await self.until(victim, GONE, DRAIN_GRACE, "SIGTERM to not ready")
        await victim.ended()
        await victim.start()
        await self.until(victim, ("READY",), self.recovery(), "listening to ready")

    async def swap(self) -> None:
        """Two replicas come back at each other's address, one after the other."""
        pair = self.chance.sample(self.stage.replicas, 2)
        killed = time.monotonic()
        for replica in pair:
            await self.strike(replica)
        await asyncio.gather(*(replica.ended() for replica in pair))
        for replica in reversed(pair):
            await replica.start()
        for replica in pair:
            await self.until_new(replica, killed)
        await self.all_ready()

    # Sockets

    async def black_hole(self) -> None:
        victim = self.victim()
        await victim.tell("set", black_hole=True)
        await victim.tell("drop")
        await self.until(victim, GONE, self.detection, "black hole to not ready")
        await victim.tell("set", black_hole=False)
        await self.until(victim, ("READY",), self.recovery() + self.timeout, "hole to ready")

    async def refuse(self) -> None:
        """Nothing listens any more, but open connections go on: only a new connection reveals it."""
        victim = self.victim()
        await victim.tell("refuse")
        for number in range(3):
            await self.one_more(f"refuse-{time.monotonic_ns()}-{number}")
        await self.hold()
        await victim.tell("accept")

    async def drop(self) -> None:
        victim = self.victim()
        await victim.tell("drop")
        await self.hold(0.0, 0.2)

    async def cut(self) -> None:
        where = ["before_head", "mid_head", "after_head", "after_tokens", "mid_event", "mid_chunk", "after_bytes"]
        victim = self.victim()
        by, after = self.chance.choice(["reset", "close"]), self.chance.choice([1, 2, 5])
        await victim.tell("set", cut=self.chance.choice(where), cut_by=by, cut_after=after)
        await self.hold()
        await victim.tell("set", cut="")
        await self.load.pause()  # an answer that began during the fault keeps the fault
        self.load.runs.set()

    async def race(self) -> None:
        """A reused connection ends just before its next request arrives: that request must be resent and succeed."""
        victim = self.victim()
        await victim.tell("set", race=True)
        await self.hold()
        await victim.tell("set", race=False)

    # Behaviour

    async def slow(self) -> None:
        victim = self.victim()
        delay = self.chance.uniform(0.05, 0.5)
        await victim.tell("set", head_delay=delay, ready_delay=0.1, health_delay=0.1)
        await self.never(victim, GONE, self.chance.uniform(0.2, 0.6), "it is only slow")
        await victim.tell("set", head_delay=0.0, ready_delay=0.0, health_delay=0.0)

    async def long_prefill(self) -> None:
        """No byte for longer than any probe's timeout, while requests that wait for the scheduler hang."""
        victim = self.victim()
        await victim.tell("set", first_token_delay=0.7, service_status="hang")
        await self.never(victim, GONE, 0.8, "a long prefill takes no member out")
        await victim.tell("set", first_token_delay=0.0, service_status=200)
        await self.hold(0.0, 0.1)

    async def flap(self) -> None:
        victim = self.victim()
        for _ in range(self.chance.randint(1, 3)):
            await victim.tell("set", ready=self.chance.choice([503, 503, 500, "reset"]))
            await self.hold(0.02, 0.3)
            await victim.tell("set", ready=200)
            await self.hold(0.02, 0.2)

    async def hang(self) -> None:
        victim = self.victim()
        where = self.chance.choice(["before_head", "after_head", "after_tokens"])
        await victim.tell("set", hang=where, hang_after=self.chance.choice([1, 3]))
        await self.hold()
        await victim.tell("set", hang="")
        await self.load.pause()
        self.load.runs.set()

    async def errors(self) -> None:
        """500s are passed on unchanged, and eject a replica if others do not answer so."""
        victim = self.victim()
        await victim.tell("set", status=500)
        await self.hold(0.1, 0.6)
        await victim.tell("set", status=0)

    async def busy(self) -> None:
        victim = self.victim()
        await victim.tell("set", status=503, retry_after=self.chance.choice(["", "1"]))
        await self.never(victim, GONE, self.chance.uniform(0.1, 0.4), "busy is not broken")
        await victim.tell("set", status=0, retry_after="")

    # The list

    async def drain(self) -> None:
        victim = self.victim()
        number = await self.stage.id_of(victim)
        await self.stage.post(f"/replicas/{number}/drain")
        await self.until(victim, ("SHUTTING_DOWN",), self.stage.settings["first_byte_timeout"], "drain to empty")
        empty = time.monotonic()
        restarts = self.chance.random() < 0.3
        if restarts:
            await victim.kill()
            await victim.start()
        await self.hold()
        if late := self.judge.generated_at(victim, since=empty):
            raise Violation(f"a drained replica was given a request: {late}")
        await self.stage.post(f"/replicas/{number}/undrain")
        await self.until(victim, ("READY",), self.recovery(), "undrain to ready")

    async def shrink_and_grow(self) -> None:
        leaves = self.chance.sample(self.stage.replicas, self.chance.randint(1, len(self.stage.replicas) - 1))
        await self.stage.list_replicas([replica for replica in self.stage.replicas if replica not in leaves])
        for replica in leaves:
            await self.until(replica, (None,), self.news, "shrink to gone")
        await self.hold(0.0, 0.2)
        await self.stage.list_replicas(self.stage.replicas)
        for replica in leaves:
            await self.until(replica, ("READY",), self.news + self.recovery(), "grow to ready")

    async def names_fail(self) -> None:
        self.stage.answer_names(error=self.chance.choice(["nxdomain", "servfail", "timeout"]))
        for replica in self.stage.replicas:
            await self.never(replica, (*GONE, None), 0.4, "the name server fails, and it does not")
        await self.stage.list_replicas(self.stage.replicas)

    # Requests that kill

    async def poison(self) -> None:
        """A request that kills each replica that gets it kills at most two, however often it is sent."""
        text = f"deadly {time.monotonic_ns()}"
        replicas = self.stage.replicas
        await self.load.pause()
        began = time.monotonic()
        for replica in replicas:
            await replica.tell("set", poison=text)
        stream = self.chance.random() < 0.5
        path = self.chance.choice(self.load.paths)
        told = []
        for number in range(4):
            body = body_for(path, text, 8, stream)
            told.append(
                await self.load.ask(Wish(f"{POISON}{time.monotonic_ns()}-{number}", "POST", path, body, stream))
            )
        dead = []
        for replica in replicas:
            try:
                await replica.tell("set", poison="")
            except (ConnectionError, EOFError):
                dead.append(replica)
        self.poisoned(len(dead), told)
        for replica in dead:
            await replica.ended()
            await replica.start()
        self.load.runs.set()
        for replica in dead:
            await self.until_new(replica, began)
        await self.all_ready()

    def poisoned(self, replicas: int, told: list[Got]) -> None:
        """So many died of one request, and this is what those who sent it were told."""
        if replicas > 2:
            raise Violation(f"{replicas} replicas died of one request: {', '.join(map(str, told))}")

    # All of them

    async def all_refuse(self) -> None:
        await asyncio.gather(*(replica.tell("refuse") for replica in self.stage.replicas))
        await asyncio.gather(*(replica.tell("drop") for replica in self.stage.replicas))
        await self.hold()
        await asyncio.gather(*(replica.tell("accept") for replica in self.stage.replicas))
        await self.all_ready()

    async def all_killed(self) -> None:
        killed = time.monotonic()
        for replica in self.stage.replicas:
            await self.strike(replica)
        await asyncio.gather(*(replica.ended() for replica in self.stage.replicas))
        await self.hold()
        await asyncio.gather(*(replica.start() for replica in self.stage.replicas))
        for replica in self.stage.replicas:
            await self.until_new(replica, killed)
        await self.all_ready()
