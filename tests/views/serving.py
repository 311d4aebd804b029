"""A whole balancer in the test's own event loop, with lab replicas behind it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvloop

from balancer.app import Balancer, Config
from balancer.fleet.member import Listed
from balancer.settings import Settings
from tests.lab.replica import LabReplica

CHAT = "/v1/chat/completions"


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine on the loop that the balancer runs on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "lab", "messages": [{"role": "user", "content": text}], **more}


def stream(text: str = "hello", **more: Any) -> dict[str, Any]:
    return chat(text, stream=True, stream_options={"include_usage": True}, **more)


@asynccontextmanager
async def serving(
    *replicas: LabReplica, settings: dict[str, Any] | None = None, log: int | None = None, **config: Any
) -> AsyncIterator[Balancer]:
    """A balancer on free ports in front of `replicas`, all of them ready. `log` is a descriptor for its access log."""
    listed = tuple(Listed(f"replica-{number}", replica.url) for number, replica in enumerate(replicas, 1))
    quick = {"drain_grace": 0, "drain_timeout": 0.1, "ready_interval": 0.1, **(settings or {})}
    ports = {"listen": ("127.0.0.1", 0), "admin": ("127.0.0.1", 0)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    balancer = Balancer(
        Config(**{**ports, "replicas": listed, "settings": Settings(**quick), **config}),
        asyncio.get_running_loop(),
        nowhere if log is None else log,
    )
    await balancer.start()
    try:
        await until(lambda: len(balancer.fleet.available()) == len(replicas))
        yield balancer
    finally:
        hurry = asyncio.Event()
        hurry.set()
        await balancer.leave(hurry)
        await balancer.stop()
        os.close(nowhere)


@asynccontextmanager
async def client_of(balancer: Balancer, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the endpoint; its admin port is at `balancer.admin_endpoint`."""
    async with httpx.AsyncClient(base_url=balancer.endpoint, timeout=20, trust_env=False, **more) as client:
        yield client


async def until(claim: Callable[[], object], timeout: float = 10.0) -> None:
    """Waits for what other parts of this loop bring about; raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not claim():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)
