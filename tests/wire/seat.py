"""Lab replicas that share one GPU: the shipped tenants and locks of replica/, in front of simulated models."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from replica.tenant import Limits, State, Tenant
from replica.tenant_api import Alive, Gate
from replica.turn import Turn
from tests.lab.asked import Asked
from tests.lab.exchange import Exchange
from tests.lab.knobs import Knobs
from tests.lab.pace import PlainPace
from tests.lab.replica import LabReplica
from tests.lab.serving import serve

GPU = "GPU-of-the-lab"


class Card:
    """The memory of `GPU`, in some unit. `others`: what strangers have of it."""

    WEIGHTS, POOL = 2, 4

    def __init__(self, models: int) -> None:
        self.size = models * self.WEIGHTS + self.POOL
        self.others = 0
        self.taken: dict[Sharer, int] = {}

    def free(self) -> int:
        return self.size - self.others - sum(self.taken.values())


class Sharer(LabReplica):
    """A replica that shares `GPU`, whose tokens and memory are counted: what would kill its real one fails the test."""

    def __init__(self, folder: Path, card: Card, gpu_slice: float = 0.5, **knobs: Any) -> None:
        super().__init__(**knobs)
        self.folder = folder
        self.running = asyncio.Event()
        self.has_memory = True
        self.card = card
        self.swaps: list[str] = []
        self._limits = Limits(gpu_slice=gpu_slice, memory=0.05)
        self._life: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Sharer":
        turn = Turn.join(self.folder, [GPU], self.knobs.served_model, 0.0)
        self.turn = turn
        self.tenant = Tenant(turn, self, self._limits)
        self.gate = Gate(self._beyond, self.tenant)
        loop = asyncio.get_running_loop()
        while not turn.take(loop.time()):  # noqa: ASYNC110 - as a replica waits that starts
            await asyncio.sleep(0.01)
        self.running.set()
        self.card.taken[self] = Card.WEIGHTS + Card.POOL
        await super().__aenter__()
        self._life = asyncio.ensure_future(self.tenant.live())
        return self

    async def stop(self) -> None:
        await self.kill()
        await super().stop()

    async def kill(self) -> None:
        """As by kill -9: the kernel closes its connections, and frees its locks."""
        self.fall()
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
            self._life = None
            self.card.taken.pop(self)
            self.turn.leave()

    # What its tenant asks of SGLang

    def has_started(self) -> bool:
        return True

    def is_leaving(self) -> bool:
        return self.exiting

    def requests(self) -> int:
        seen = self.seen
        return seen.generations_started - seen.generations_finished - seen.generations_aborted

    async def pause(self) -> bool:
        self.running.clear()
        return True

    async def release(self, what: Sequence[str]) -> None:
        assert not self.running.is_set()
        self.has_memory = False
        self.card.taken[self] -= Card.WEIGHTS if "weights" in what else Card.POOL
        self.swaps.append(f"release {' '.join(what)}")

    async def resume(self, what: Sequence[str]) -> None:
        self.has_memory = True
        self.card.taken[self] = Card.WEIGHTS + Card.POOL
        assert self.card.free() >= 0
        self.swaps.append("resume")

    async def go_on(self) -> None:
        assert self.has_memory
        self.running.set()

    def free_memory(self, gpu: str) -> int | None:
        return self.card.free()

    # What the network sees

    def pace(self, knobs: Knobs, asked: Asked) -> "_Pace":
        return _Pace(self, knobs, asked)

    async def _answer(self, exchange: Exchange) -> None:
        path = exchange.head.target.partition("?")[0]
        if path.startswith("/lease") or path in ("/ready", "/health", "/health_generate", "/alive"):
            await exchange.read_body()
            await self._ask(exchange, path)
        elif path in ("/server_info", "/v1/loads", "/v1/models", "/tokenize"):
            await super()._answer(exchange)
        else:
            self.seen.requests.append(exchange.record)
            self.seen.changed()
            await serve(exchange, self.knobs, self.seen, self.pace, self.fall)

    async def _ask(self, exchange: Exchange, path: str) -> None:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "path": path,
            "method": exchange.head.method,
            "headers": [(name.lower().encode(), value.encode()) for name, value in exchange.head.headers],
            "query_string": exchange.head.target.partition("?")[2].encode(),
        }
        app = Alive(self.gate, self.tenant) if path == "/alive" else self.gate
        await app(scope, receive, send)
        if sent:
            await exchange.reply(sent[0]["status"], "application/json", sent[1]["body"])
        else:
            await super()._answer(exchange)

    async def _beyond(self, scope: Any, receive: Any, send: Any) -> None:
        """The gate is open: the replica answers as others do."""


class _Pace(PlainPace):
    def __init__(self, replica: Sharer, knobs: Knobs, asked: Asked) -> None:
        super().__init__(knobs, asked)
        self._replica = replica

    async def token(self, position: int) -> None:
        await self._replica.running.wait()
        await super().token(position)
        await self._replica.running.wait()
        assert self._replica.has_memory


@contextlib.asynccontextmanager
async def seat(folder: Path, *models: str, **knobs: Any) -> AsyncIterator[list[Sharer]]:
    """A replica for each of these models, started one after the other."""
    async with contextlib.AsyncExitStack() as stack:
        sharers: list[Sharer] = []
        card = Card(len(models))
        for model in models:
            for other in sharers:
                await other.tenant.order(State.DOZING, 5)
            sharers.append(await stack.enter_async_context(Sharer(folder, card, served_model=model, **knobs)))
        yield sharers
