"""A replica that shares its GPUs: awake, dozing or asleep, and how it goes from one to another.

    STARTING   loads its model; it has the turn
    AWAKE      serves; it has the turn
    DOZING     its KV cache and graphs are given back, its weights are on the GPU; requests wait
    ASLEEP     its weights are in the host's memory, too
    BROKEN     it could not be told whether its memory was given back, and ends

To doze is always to pause, which takes running answers back into the queue, and then to release; to wake is always to
resume and then to go on. SGLang's scheduler dies of a release while something runs, and of a request after one.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from replica.turn import Turn

logger = logging.getLogger(__name__)

# What a dozing replica gives back; one that is asleep gives WEIGHTS back as well.
LIGHT = ("kv_cache", "cuda_graph")
WEIGHTS = ("weights",)

# Seconds after which a balancer that said nothing gives no orders any more: the tenant takes turns by itself.
HEARD_FOR = 5.0
_LOOK = 0.1  # seconds between two looks at who waits, and for what
_TURN_POLL = 0.01  # seconds between two tries for the turn
_RETRY = 1.0  # seconds after a wake for which there was no memory


class State(StrEnum):
    STARTING = "STARTING"
    AWAKE = "AWAKE"
    DOZING = "DOZING"
    ASLEEP = "ASLEEP"
    BROKEN = "BROKEN"


class Engine(Protocol):
    """SGLang's server, as far as a tenant needs it. What fails raises."""

    def has_started(self) -> bool: ...

    def is_leaving(self) -> bool:
        """Was it told to end, and answers what it still has?"""

    def requests(self) -> int:
        """How many it has, the waiting ones among them."""

    async def pause(self) -> bool:
        """Takes running answers back into the queue; False where something still ran after that."""

    async def release(self, what: Sequence[str]) -> None: ...

    async def resume(self, what: Sequence[str]) -> None: ...

    async def go_on(self) -> None: ...

    def free_memory(self, gpu: str) -> int | None:
        """Bytes; None where nobody knows, as on a CPU."""

    def die(self) -> None:
        """Ends every process of this server at once."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds. gpu_slice: a turn's least length while others wait. give_back, take_back: the longest that a
    doze and a wake may take; sleep: moving the weights, on top. memory: the longest wait for others' memory."""

    gpu_slice: float = 2.0
    give_back: float = 5.0
    take_back: float = 5.0
    sleep: float = 60.0
    memory: float = 5.0


@dataclass
class Swaps:
    """How often it woke, and how long the last and all changes took, in seconds."""

    wakes: int = 0
    last_wake: float = 0.0
    last_doze: float = 0.0
    total: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in vars(self).items()}


@dataclass
class Balancer:
    """Who orders the turns, and when it was last heard."""

    name: str = ""
    heard: float = field(default=-HEARD_FOR)

    def is_heard(self, now: float) -> bool:
        return bool(self.name) and now - self.heard < HEARD_FOR


class Tenant:
    """This replica among those that share its GPUs; all of it on one event loop."""

    def __init__(
        self,
        turn: Turn,
        engine: Engine,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.state = State.STARTING
        self.wanted = State.AWAKE
        self.problem = ""
        self.swaps = Swaps()
        self._turn = turn
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._now = now
        self._balancer = Balancer()
        self._is_own_wish = False
        self._is_pausing = False
        self._since = clock()
        self._released: tuple[str, ...] = ()
        # Bytes on each GPU that a doze gave back and a wake takes, and the same of the weights.
        self._pool: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._retry_at = 0.0
        self._wished = asyncio.Event()
        self._moved = asyncio.Event()

    @property
    def is_up(self) -> bool:
        """May a request reach SGLang's scheduler now?"""
        return self.state in (State.STARTING, State.AWAKE) and not self._is_pausing

    @property
    def is_leaving(self) -> bool:
        return self._engine.is_leaving()

    @property
    def is_ordered(self) -> bool:
        """Does a balancer say when it wakes and dozes? Else it sees to its turns by itself."""
        return self._balancer.is_heard(self._clock())

    def heard(self, balancer: str) -> None:
        """A balancer that calls itself that has asked or ordered something."""
        self._balancer = Balancer(balancer, self._clock())

    async def order(self, wanted: State, within: float) -> bool:
        """Wakes, dozes or sleeps; False where that did not come about within so many seconds.

        A wake that was not its turn in time is taken back: it no longer waits.
        """
        give_up = self._clock() + within
        self._wish(wanted)
        while not self._is_as(wanted):
            left = give_up - self._clock()
            if left <= 0 or self.wanted is not wanted or self.state is State.BROKEN:
                if wanted is State.AWAKE and self.wanted is wanted:
                    self._wish(self.state)
                    self._turn.stop_waiting(self._now())
                return self._is_as(wanted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), min(left, _LOOK))
        return True

    def to_json(self) -> dict[str, Any]:
        """What GET /lease tells; times in seconds."""
        wall = self._now()
        return {
            "state": self.state,
            "wanted": self.wanted,
            "for": round(self._clock() - self._since, 3),
            "gpus": self._turn.gpus,
            "requests": self._engine.requests(),
            "waits": bool(self._turn.waiting_since),
            "ordered_by": self._balancer.name if self.is_ordered else None,
            "pool_bytes": self._pool or None,
            "weights_bytes": self._weights or None,
            "swaps": self.swaps.to_json(),
            "problem": self.problem or None,
            "others": [
                {
                    "gpu": other.gpu,
                    "note": other.note,
                    "state": other.state,
                    "by": other.by or None,
                    "waits_for": round(wall - other.waiting_since, 3) if other.waits(wall) else None,
                }
                for other in self._turn.others()
            ],
        }

    async def live(self) -> None:
        """Goes where it is wanted, for as long as the server lives."""
        while self.state is not State.BROKEN:
            self._wished.clear()
            try:
                await self.step()
            except OSError as error:
                self.problem = f"cannot take turns: {error.strerror}"
                logger.warning("%s", self.problem)
            pause = _TURN_POLL if self._turn.waiting_since else _LOOK
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wished.wait(), pause)

    async def step(self) -> None:
        if self.state is State.STARTING:
            if not self._engine.has_started():
                return
            self._enter(State.AWAKE)
        self._decide()
        if self.wanted is State.AWAKE and not self.is_up:
            await self._wake()
        elif self.wanted in (State.DOZING, State.ASLEEP) and self.state is State.AWAKE:
            await self._doze()
        if self.wanted is State.ASLEEP and self.state is State.DOZING:
            await self._sleep()

    def _wish(self, wanted: State, *, is_own: bool = False) -> None:
        self.wanted = wanted
        self._is_own_wish = is_own
        self._wished.set()

    def _is_as(self, wanted: State) -> bool:
        return self.state is wanted or (wanted is State.DOZING and self.state is State.ASLEEP)

    def _enter(self, state: State) -> None:
        self.state = state
        self._since = self._clock()
        self._turn.say(self._now(), state=state)
        self._moved.set()
        self._moved = asyncio.Event()

    def _decide(self) -> None:
        """What it sees to by itself, beside what a balancer orders."""
        has_requests = self._engine.requests() > 0
        if self.state is State.AWAKE:
            if self.wanted is State.AWAKE and self._is_over(has_requests):
                self._wish(State.DOZING, is_own=True)
        elif self.wanted is not State.AWAKE:
            # One that was told to end answers what it has: nobody orders its turns any more.
            if has_requests and (not self.is_ordered or self._engine.is_leaving()):
                self._wish(State.AWAKE, is_own=True)
        elif self._is_own_wish and not has_requests:
            self._wish(self.state, is_own=True)
            self._turn.stop_waiting(self._now())

    def _is_over(self, has_requests: bool) -> bool:
        """Is its turn over, for somebody that its balancer knows nothing of? One that is idle keeps it for nobody."""
        wall, is_ordered = self._now(), self.is_ordered
        spent = self._clock() - self._since >= self._limits.gpu_slice
        if not spent and (has_requests or is_ordered):
            return False
        waiting = [other for other in self._turn.others() if other.waits(wall)]
        return any(not is_ordered or other.by != self._balancer.name for other in waiting)

    async def _wake(self) -> None:
        if self._clock() < self._retry_at:
            return
        by = self._balancer.name if self.is_ordered and not self._is_own_wish else ""
        if not self._turn.take(self._now(), by, is_ahead=self._engine.is_leaving()):
            return
        began = self._clock()
        if short := await self._lacking():
            self._turn.give_up()
            self._retry_at = self._clock() + _RETRY
            self.problem = f"it cannot wake: {short}"
            logger.warning("%s", self.problem)
            return
        weights = WEIGHTS[0] in self._released
        async with self._within(self._limits.take_back + (self._limits.sleep if weights else 0.0), "wake"):
            await self._engine.resume(self._released)
            await self._engine.go_on()
        self._released = ()
        self.problem = ""
        self.swaps.wakes += 1
        self.swaps.last_wake = self._clock() - began
        self.swaps.total += self.swaps.last_wake
        self._enter(State.AWAKE)

    async def _lacking(self) -> str:
        """Waits until its GPUs have the memory that a wake takes; what is missing after that, in words.

        The one who had the turn may have been killed: its lock was free at once, its memory is some seconds later.
        """
        need = {gpu: self._pool.get(gpu, 0) for gpu in self._turn.gpus}
        if WEIGHTS[0] in self._released:
            need = {gpu: size + self._weights.get(gpu, 0) for gpu, size in need.items()}
        give_up = self._clock() + self._limits.memory
        while True:
            free = {gpu: self._engine.free_memory(gpu) for gpu in need}
            short = [gpu for gpu, size in need.items() if (there := free[gpu]) is not None and there < size]
            if not short:
                return ""
            if self._clock() >= give_up:
                return ", ".join(
                    f"{gpu} has {_gib(free[gpu] or 0)} free and it takes {_gib(need[gpu])}" for gpu in short
                )
            await asyncio.sleep(_TURN_POLL)

    async def _doze(self) -> None:
        began = self._clock()
        before = self._free()
        self._is_pausing = True
        async with self._within(self._limits.give_back, "doze"):
            is_still = await self._engine.pause()
            if is_still:
                await self._engine.release(LIGHT)
            else:
                await self._engine.go_on()
        if not is_still:
            self._is_pausing = False
            self.problem = "it cannot doze: SGLang still had something running after the pause"
            logger.warning("%s", self.problem)
            self._wish(State.AWAKE)
            self._since = self._clock()  # the next try is a slice away
            return
        self._note_freed(self._pool, before)
        self._released = LIGHT
        self.problem = ""
        self.swaps.last_doze = self._clock() - began
        self.swaps.total += self.swaps.last_doze
        if self.wanted is not State.ASLEEP:  # else the next one would find the weights still there
            self._turn.give_up()
        self._enter(State.DOZING)
        self._is_pausing = False

    async def _sleep(self) -> None:
        before = self._free()
        async with self._within(self._limits.give_back + self._limits.sleep, "sleep"):
            await self._engine.release(WEIGHTS)
        self._note_freed(self._weights, before)
        self._released = (*LIGHT, *WEIGHTS)
        self._turn.give_up()
        self._enter(State.ASLEEP)

    def _free(self) -> dict[str, int]:
        return {gpu: free for gpu in self._turn.gpus if (free := self._engine.free_memory(gpu)) is not None}

    def _note_freed(self, sizes: dict[str, int], before: dict[str, int]) -> None:
        """The least that was ever freed: what another frees at the same moment would be counted as ours."""
        for gpu, free in self._free().items():
            if gpu in before and (freed := free - before[gpu]) > 0:
                sizes[gpu] = min(freed, sizes.get(gpu, freed))

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Ends the whole server when that fails or takes longer: nobody can say what memory it has then.

        By a thread, so that a stuck event loop does not keep the turn for ever.
        """

        def end(why: str) -> None:
            self.problem = f"it could not {what}: {why}"
            logger.error("%s; this replica ends, so that others get the GPU", self.problem)
            self._engine.die()

        timer = threading.Timer(seconds, end, [f"not done within {seconds:g} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:
            self.state = State.BROKEN
            end(f"{type(error).__name__}: {error}")
            raise
        finally:
            timer.cancel()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
