"""A replica that shares its GPUs: its states, and how it changes from one to another.

    STARTING   loads its model; has the turn
    AWAKE      serves; has the turn
    DOZING     has released its KV cache and CUDA graphs; its weights stay on the GPU; requests wait
    ASLEEP     has also moved its weights to the host's memory
    BROKEN     may or may not have released its memory, and ends

A doze always pauses first, which puts running requests back into the queue, and then releases memory; a wake always
resumes memory first and then continues. SGLang's scheduler crashes if memory is released while a request runs, or if a
request reaches it after a release.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from replica.turn import Turn

logger = logging.getLogger(__name__)

# What a dozing replica releases; one that is asleep has released WEIGHTS as well.
LIGHT = ("kv_cache", "cuda_graph")
WEIGHTS = ("weights",)

# Bytes of a GPU that CUDA graphs take at most, which the share does not count.
_GRAPHS = 4 << 30

# Once a balancer has been silent for this many seconds, the tenant takes turns by itself.
HEARD_FOR = 5.0
_LOOK = 0.1  # seconds between two checks of what to do next
_TURN_POLL = 0.01  # seconds between two tries for the turn
_RETRY = 1.0  # seconds until the next try after a wake that lacked memory
_ASKED = 0.5  # seconds between two looks whether another that starts lacks memory


class State(StrEnum):
    STARTING = "STARTING"
    AWAKE = "AWAKE"
    DOZING = "DOZING"
    ASLEEP = "ASLEEP"
    BROKEN = "BROKEN"


class Engine(Protocol):
    """What a tenant needs of SGLang's server. A call that fails raises an exception."""

    def has_started(self) -> bool: ...

    def is_leaving(self) -> bool:
        """Is it shutting down, and only answering the requests that it still has?"""

    def requests(self) -> int:
        """The number of its requests, including waiting ones."""

    async def pause(self) -> bool:
        """Puts running requests back into the queue; False if something still ran after that."""

    async def release(self, what: Sequence[str]) -> None: ...

    async def resume(self, what: Sequence[str]) -> None: ...

    async def go_on(self) -> None: ...

    def free_memory(self, gpu: str) -> int | None:
        """In bytes; None if unknown, as on a CPU."""

    def die(self) -> None:
        """Ends every process of this server at once."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds. gpu_slice: minimum length of a busy turn while others wait. give_back, take_back: maximum time
    for a doze and for a wake; sleep: added to either if weights are moved. memory: maximum wait for others' memory.

    share: bytes of each GPU for its weights and KV cache; 0: unknown."""

    gpu_slice: float = 2.0
    give_back: float = 5.0
    take_back: float = 5.0
    sleep: float = 60.0
    memory: float = 5.0
    share: int = 0


@dataclass
class Swaps:
    """The number of wakes, and how long the last wake, the last doze and all of them took, in seconds."""

    wakes: int = 0
    last_wake: float = 0.0
    last_doze: float = 0.0
    total: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in vars(self).items()}


@dataclass
class Balancer:
    """The balancer that orders the turns, and when it was last heard from."""

    name: str = ""
    heard: float = field(default=-HEARD_FOR)

    def is_heard(self, now: float) -> bool:
        return bool(self.name) and now - self.heard < HEARD_FOR


class Tenant:
    """This replica as one of those that share its GPUs. All of it runs on one event loop."""

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
        # Bytes on each GPU that a doze frees and a wake takes, and the same for the weights.
        self._pool: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._retry_at = 0.0
        self._lacked = 0  # how many wakes failed for want of memory
        self._lacks: dict[str, int] = {}  # bytes on each GPU that the last of them lacked
        self._patience = limits.memory  # how long the next wake waits for others' memory
        self._asked_at = 0.0  # when it last looked whether another lacks memory
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
        """Does a balancer decide when it wakes and dozes? If not, it takes turns by itself."""
        return self._balancer.is_heard(self._clock())

    def heard(self, balancer: str) -> None:
        """Notes that the balancer of this name has asked or ordered something."""
        self._balancer = Balancer(balancer, self._clock())

    async def order(self, wanted: State, within: float, memory: float = math.inf) -> bool:
        """Wakes, dozes or sleeps; False if that did not happen within so many seconds.

        A wake that did not get the turn in time, or lacked memory, is cancelled: the replica no longer waits for it.
        One that has the turn is not cancelled, however long it takes. `memory`: it waits at most so many seconds for
        memory that others may be about to give back.
        """
        give_up = self._clock() + within
        lacked = self._lacked
        self._wish(wanted)
        self._patience = min(memory, self._limits.memory)
        self._retry_at = 0.0
        while not self._is_as(wanted):
            left = give_up - self._clock()
            lacks_memory = wanted is State.AWAKE and self._lacked > lacked
            is_late = left <= 0 and not (wanted is State.AWAKE and self._turn.is_mine)
            if is_late or lacks_memory or self.wanted is not wanted or self.state is State.BROKEN:
                if wanted is State.AWAKE and self.wanted is wanted:
                    self._wish(self.state)
                return self._is_as(wanted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), min(left, _LOOK) if left > 0 else _LOOK)
        return True

    def to_json(self) -> dict[str, Any]:
        """The body of GET /lease; times in seconds."""
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
            "lacks_bytes": self._lacks or None,
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
        """Brings the replica into the wanted state, for as long as the server lives."""
        while self.state is not State.BROKEN:
            self._wished.clear()
            try:
                await self.step()
            except Exception as error:
                if self._is_as(State.BROKEN):
                    raise
                # Whatever it is, it is tried again: nothing else would ever wake this replica.
                problem = f"cannot take turns: {getattr(error, 'strerror', None) or repr(error)}"
                if problem != self.problem:
                    logger.warning("%s", problem, exc_info=not isinstance(error, OSError))
                self.problem = problem
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
        self._patience = self._limits.memory
        if wanted is not State.AWAKE:
            self._turn.stop_waiting(self._now())
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
        """Decides what the replica wants by itself, apart from a balancer's orders."""
        has_requests = self._engine.requests() > 0
        if self._may_fall_asleep() and self._is_asked_for_memory():
            self._wish(State.ASLEEP, is_own=True)
        elif self.state is State.AWAKE:
            if self.wanted is State.AWAKE and self._is_over(has_requests):
                self._wish(State.DOZING, is_own=True)
        elif self.wanted is not State.AWAKE:
            # While it shuts down it still answers its requests, but no balancer orders its turns any more.
            if has_requests and (not self.is_ordered or self._engine.is_leaving()):
                self._wish(State.AWAKE, is_own=True)
        elif self._is_own_wish and not has_requests:
            self._wish(self.state, is_own=True)

    def _is_over(self, has_requests: bool) -> bool:
        """Should it yield its turn? At once if it is idle and takes turns by itself, else after a slice.

        Only if another tenant waits, and not for one whose turns the same balancer orders.
        """
        wall, is_ordered = self._now(), self.is_ordered
        spent = self._clock() - self._since >= self._limits.gpu_slice
        if not spent and (has_requests or is_ordered):
            return False
        waiting = [other for other in self._turn.others() if other.waits(wall)]
        return any(not is_ordered or other.by != self._balancer.name for other in waiting)

    def _may_fall_asleep(self) -> bool:
        """Also while it waits for its turn by itself, which the one that starts has: it goes on waiting then."""
        return self.state is State.DOZING and (self.wanted is not State.AWAKE or self._is_own_wish)

    def _is_asked_for_memory(self) -> bool:
        now = self._clock()
        if now - self._asked_at < _ASKED:
            return False
        self._asked_at = now
        return self._turn.is_asked_for_memory(self._now())

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
            self._lacked += 1
            self.problem = f"it cannot wake: {short}"
            # Who let it wait for less sees to the memory.
            is_final = self._patience >= self._limits.memory
            logger.log(logging.WARNING if is_final else logging.INFO, "%s", self.problem)
            return
        weights = WEIGHTS[0] in self._released
        async with self._within(self._limits.take_back + (self._limits.sleep if weights else 0.0), "wake"):
            await self._engine.resume(self._released)
            await self._engine.go_on()
        self._released = ()
        self._lacks = {}
        self.problem = ""
        self.swaps.wakes += 1
        self.swaps.last_wake = self._clock() - began
        self.swaps.total += self.swaps.last_wake
        self._enter(State.AWAKE)

    async def _lacking(self) -> str:
        """Waits until its GPUs have the memory that a wake takes; returns what is missing then, in words.

        The tenant that had the turn may have been killed: its lock is free at once, its memory some seconds later.
        """
        need = {gpu: self._pool.get(gpu, 0) for gpu in self._turn.gpus}
        if WEIGHTS[0] in self._released:
            need = {gpu: size + self._weights.get(gpu, 0) for gpu, size in need.items()}
        if self._limits.share:
            # Sizes measured while a tenant that was killed lost its memory are too large; no wake would correct them.
            need = {gpu: min(size, self._limits.share + _GRAPHS) for gpu, size in need.items()}
        give_up = self._clock() + self._patience
        while True:
            free = self._free()
            short = {gpu: size - free[gpu] for gpu, size in need.items() if gpu in free and free[gpu] < size}
            if not short:
                return ""
            if self._clock() >= give_up:
                self._lacks = short
                return ", ".join(f"{gpu} has {_gib(free[gpu])} free and it takes {_gib(need[gpu])}" for gpu in short)
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
            self._since = self._clock()  # it tries again after a slice
            return
        self._note_freed(self._pool, before)
        self._released = LIGHT
        self.problem = ""
        self.swaps.last_doze = self._clock() - began
        self.swaps.total += self.swaps.last_doze
        if self.wanted is not State.ASLEEP:  # else the next tenant would find the weights still there
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
        """Keeps the minimum ever freed: a figure may include what another tenant freed at the same moment."""
        for gpu, free in self._free().items():
            if gpu in before and (freed := free - before[gpu]) > 0:
                sizes[gpu] = min(freed, sizes.get(gpu, freed))

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Ends the whole server if the block fails or takes longer: it is unknown then which memory it holds.

        A thread does so, so that a stuck event loop cannot keep the turn for ever.
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
