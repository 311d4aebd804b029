"""A lab replica in its own process, for tests that kill, stop and restart it.

async with spawn_replica("--faithful", token_interval=0.02) as replica:
    ...                                          # send requests to replica.url
    await replica.set(status=503)                # as LabReplica.set; next, refuse, accept, drop_connections too
    await replica.until(lambda seen: seen["generations_started"] == 3)
    replica.send_signal(signal.SIGSTOP)          # SIGKILL, SIGTERM, SIGCONT
    assert await replica.wait() == 0
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from tests.support.program import Program
from tests.support.until import until


class SpawnedReplica:
    """The process, and its control port."""

    def __init__(self, program: Program, control: str) -> None:
        self.program = program
        self.url = ""  # known once it is ready
        self._control = httpx.AsyncClient(base_url=control, timeout=30.0)

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def ready(self) -> None:
        """Wait until it listens."""
        self.url = await _said(self.program, "ready ")

    async def set(self, **changes: Any) -> None:
        await self._turn(changes)

    async def next(self, count: int = 1, **changes: Any) -> None:
        await self._turn({"next": count, **changes})

    async def refuse(self) -> None:
        await self._turn({"refuse": True})

    async def accept(self) -> None:
        await self._turn({"refuse": False})

    async def drop_connections(self) -> None:
        await self._turn({"drop_connections": True})

    async def _turn(self, changes: dict[str, Any]) -> None:
        answer = await self._control.post("/lab/knobs", json=changes)
        if answer.is_error:
            raise ValueError(answer.json()["message"])

    async def seen(self, after: int = -1) -> dict[str, Any]:
        """Its Seen.as_json (tests/lab/seen.py), once the version is above `after` or 5 s have passed."""
        answer = await self._control.get("/lab/seen", params={"after": after})
        seen: dict[str, Any] = answer.raise_for_status().json()
        return seen

    async def until(self, claim: Callable[[dict[str, Any]], object], timeout: float = 10.0) -> dict[str, Any]:
        """Wait until the claim holds for what it saw. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            seen = await self.seen()
            while not claim(seen):
                seen = await self.seen(after=seen["version"])
            return seen

    def send_signal(self, number: signal.Signals) -> None:
        self.program.signal(number)

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return await self.program.ended()

    async def close(self) -> None:
        await self._control.aclose()


async def _said(program: Program, start: str) -> str:
    return await until(lambda: program.check_alive() and program.said(start), f"the lab replica says {start!r}", 60)


@contextlib.asynccontextmanager
async def spawn_replica(
    *flags: str, wait: bool = True, port: int = 0, host: str = "127.0.0.1", **knobs: Any
) -> AsyncIterator[SpawnedReplica]:
    """Start a replica, by default on a free port, wait until it is ready (if `wait`), and kill it at the end."""
    turned = [text for name, value in knobs.items() for text in (f"--{name.replace('_', '-')}", _word(value))]
    with Program("-m", "tests.lab.replica", "--host", host, "--port", str(port), *turned, *flags) as program:
        replica = SpawnedReplica(program, await _said(program, "control "))
        try:
            if wait:
                await replica.ready()
            yield replica
        finally:
            await replica.close()


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
