"""A lab replica that shares its GPUs: the shipped tenant, its routes and locks, with a simulated SGLang behind them.

    async with LabReplica(seat=Seat(tmp_path)) as one, LabReplica(seat=Seat(tmp_path)) as two:
        ...                                  # `two` starts once `one` has given it the turn

States, answers and turns are those of replica/tenant.py, tenant_api.py and turn.py, also among processes. What is
simulated here is the server behind them, and it dies of what SGLang's scheduler dies of: a release while something
runs, a request after a release without a pause, a resume for which the card lacks memory.
"""

import asyncio
import os
import time
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replica import lock_file
from replica.machine import MEMORY_WAIT
from replica.tenant import WEIGHTS, Limits, Tenant
from replica.tenant_api import Alive, Gate
from replica.turn import Turn
from tests.lab.card import Held, OutOfMemory
from tests.lab.exchange import Exchange, standard_headers
from tests.lab.pace import Pace

if TYPE_CHECKING:
    from tests.lab.replica import LabReplica

GIB = 1 << 30
_POLL = 0.01
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a lab replica shares GPUs, and what it takes there. Times in seconds; memory in GiB on each card."""

    directory: Path  # of the leases
    gpus: tuple[str, ...] = ("GPU-a",)
    note: str = ""  # empty: its model and port
    gpu_slice: float = 2.0
    start: float = 0.0  # with the turn, before it listens
    doze: float = 0.01
    wake: float = 0.01
    move: float = 0.1  # of the weights, either way
    memory: float = 5.0  # longest wait of a wake for others' memory
    card: float = 80.0
    weights: float = 13.5
    pool: float = 30.0
    lingers: float = 0.0  # after `fall`, how long its memory stays taken (a killed SGLang: up to 3)


class Engine:
    """The simulated SGLang as replica/tenant.py asks it. On one event loop."""

    def __init__(self, replica: "LabReplica", seat: Seat, cards: dict[str, Held]) -> None:
        self._replica, self._seat, self._cards = replica, seat, cards
        self._loop = asyncio.get_running_loop()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self.released: set[str] = set()
        self.died_of = ""
        # What a test asks for: seconds that a doze or wake takes more, whether something still runs after a pause, and
        # what the next release or resume fails with.
        self.more = 0.0
        self.is_unruly = False
        self.fails = ""

    @property
    def is_paused(self) -> bool:
        return not self._goes_on.is_set()

    def has_started(self) -> bool:
        return self._replica.is_listening and not self._replica.is_warming

    def is_leaving(self) -> bool:
        return self._replica.exiting

    def requests(self) -> int:
        return self._replica.generating

    async def pause(self) -> bool:
        if self._replica.knobs.stuck:
            await asyncio.Event().wait()
        self._goes_on.clear()
        if self._replica.live is not None:
            self._replica.live.pause()
        await asyncio.sleep(self._seat.doze + self.more)
        return not self.is_unruly

    async def release(self, what: Sequence[str]) -> None:
        if not self.is_paused and self.requests():
            self._crash("release_memory_occupation should be called only when server is idle")
        self._fail()
        if WEIGHTS[0] in what:
            await asyncio.sleep(self._seat.move)
        self.released |= set(what)
        for card in self._cards.values():
            card.give_back(self._size(what))

    async def resume(self, what: Sequence[str]) -> None:
        self._fail()
        await asyncio.sleep(self._seat.wake + self.more + (self._seat.move if WEIGHTS[0] in what else 0.0))
        try:
            for card in self._cards.values():
                card.take(self._size(what))
        except OutOfMemory as error:
            self._crash(str(error))
        self.released -= set(what)

    async def go_on(self) -> None:
        self._goes_on.set()
        if self._replica.live is not None:
            self._replica.live.go_on()

    def free_memory(self, gpu: str) -> int | None:
        return self._cards[gpu].free()

    def die(self) -> None:
        # A timer's thread may be the caller.
        self._loop.call_soon_threadsafe(self._replica.die)

    async def runs(self) -> None:
        """Returns when the scheduler may run a request, which kills it if its memory is gone."""
        await self._goes_on.wait()
        if self.released:
            self._crash("CUDA error: an illegal memory access was encountered")
            await asyncio.Event().wait()

    def _fail(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)

    def _crash(self, why: str) -> None:
        self.died_of = self.died_of or why
        self.die()

    def _size(self, what: Sequence[str]) -> int:
        gib = self._seat.pool * ("kv_cache" in what) + self._seat.weights * (WEIGHTS[0] in what)
        return round(gib * GIB)


class SharedPace:
    """A pace of tests/lab/pace.py that stands still while the scheduler is paused."""

    def __init__(self, pace: Pace, engine: Engine) -> None:
        self._pace, self._engine = pace, engine

    @property
    def prompt_tokens(self) -> int:
        return self._pace.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self._pace.cached_tokens

    async def token(self, position: int) -> None:
        await self._pace.token(position)
        await self._engine.runs()

    def abort(self) -> bool:
        return self._pace.abort()


class Sharing:
    """A replica's part in sharing from its start to its end: locks, memory, the tenant and its routes."""

    def __init__(self, replica: "LabReplica", seat: Seat, residence: list[int], turn: Turn) -> None:
        self._seat = seat
        self._residence = residence
        self._turn = turn
        self._cards = {gpu: Held(seat.directory, gpu, round(seat.card * GIB)) for gpu in turn.gpus}
        self.engine = Engine(replica, seat, self._cards)
        share = round((seat.pool + seat.weights) * GIB)
        self.tenant = Tenant(turn, self.engine, Limits(seat.gpu_slice, memory=seat.memory, share=share))
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, replica: "LabReplica", seat: Seat) -> "Sharing":
        """Joins the seat, waits for the turn, loads: the order of python -m replica and SGLang's start."""
        note = seat.note or f"{replica.knobs.served_model} on port {replica.port}"
        residence = [lock_file.lock(seat.directory / f"{gpu}.lock", is_shared=True) for gpu in sorted(seat.gpus)]
        if None in residence:
            raise AssertionError(f"somebody has {seat.gpus} alone")
        turn = Turn.join(seat.directory, seat.gpus, note, time.time())
        sharing = cls(replica, seat, [one for one in residence if one is not None], turn)
        try:
            while not sharing._turn.take(time.time()):  # noqa: ASYNC110 - another process gives it up
                await asyncio.sleep(_POLL)
            await sharing._wait_for_memory(round((seat.weights + seat.pool) * GIB))
            await asyncio.sleep(seat.start)
        except BaseException:
            sharing.end()
            raise
        sharing._life = asyncio.create_task(sharing.tenant.live())
        return sharing

    async def _wait_for_memory(self, size: int) -> None:
        """Takes it, as soon as it is there. Raises OutOfMemory if it does not come: see replica/machine.py."""
        give_up, most = time.monotonic() + MEMORY_WAIT, 0
        while (free := min(card.free() for card in self._cards.values())) < size and time.monotonic() < give_up:
            if free > most:
                give_up, most = time.monotonic() + MEMORY_WAIT, free
            self._turn.say(
                time.time(), lacks={gpu: time.time() for gpu, card in self._cards.items() if card.free() < size}
            )
            await asyncio.sleep(_LOOK)
        self._turn.say(time.time(), lacks={})
        for card in self._cards.values():
            card.take(size)

    async def answer(self, exchange: Exchange, inner: Callable[[], Awaitable[None]], *, is_keyed: bool) -> None:
        """Through the shipped routes to `inner`. `is_keyed`: it has passed the check of the key, else only /alive."""

        async def app(*_: Any) -> None:
            await inner()

        outer = Gate(app, self.tenant) if is_keyed else _alive(app, self.tenant, self._life)
        path, _, query = exchange.head.target.partition("?")
        scope = {
            "type": "http",
            "method": exchange.head.method,
            "path": urllib.parse.unquote(path),
            "query_string": query.encode("latin-1"),
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in exchange.head.headers
            ],
        }
        await outer(scope, _receive, _Answer(exchange))

    def end(self) -> None:
        """As the kernel does for a process that ends: the turn and the place are free, and then the memory."""
        if self._life is not None:
            self._life.cancel()
        self._turn.leave()
        for descriptor in self._residence:
            os.close(descriptor)
        self._residence = []
        if self._seat.lingers:
            asyncio.get_running_loop().call_later(self._seat.lingers, self._free)
        else:
            self._free()

    def _free(self) -> None:
        for card in self._cards.values():
            card.close()


def _alive(app: Any, tenant: Tenant, life: asyncio.Task[None] | None) -> Alive:
    alive = Alive(app, tenant)
    alive._life = life  # it has begun with the replica
    return alive


async def _receive() -> MutableMapping[str, Any]:
    raise AssertionError("the shipped routes read no body")


class _Answer:
    """ASGI's send, which writes to an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        exchange = self._exchange
        if message["type"] == "http.response.start":
            await exchange.read_body()
            given = [(name.decode(), value.decode()) for name, value in message["headers"]]
            length = next(int(value) for name, value in given if name == "content-length")
            content_type = next(value for name, value in given if name == "content-type")
            more = [(name, value) for name, value in given if name not in ("content-length", "content-type")]
            headers = [*standard_headers(content_type), *more]
            await exchange.write(exchange.head_bytes(message["status"], headers, "auto", length))
        else:
            await exchange.write(message["body"])
            await exchange.finish()
