"""A whole balancer in the test's own event loop, with lab replicas behind it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvloop

from balancer.app import Balancer
from balancer.contract.listing import ReplicaListing
from tests.lab.replica import LabReplica
from tests.wire import running

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
    *replicas: LabReplica, settings: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Balancer]:
    """A balancer on free ports in front of `replicas` (replica-1, replica-2, ...), all of them ready."""
    listed = tuple(ReplicaListing(f"replica-{number}", replica.url) for number, replica in enumerate(replicas, 1))
    quick = {"ready_interval": 0.1, **(settings or {})}
    async with running.serving(*replicas, config={"replicas": listed, **config}, **quick) as house:
        yield house.balancer


@asynccontextmanager
async def client_of(balancer: Balancer, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the endpoint; its admin port is at `balancer.admin_endpoint`."""
    async with httpx.AsyncClient(base_url=balancer.endpoint, timeout=20, trust_env=False, **more) as client:
        yield client
