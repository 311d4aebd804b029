"""A balancer of several processes, and clients whose relay is known."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from tests.support.client import Answer, Client, chat, request
from tests.support.until import until
from tests.wire.process import BalancerProcess, running
from tests.wire.running import SOON

ADMIN_KEY = "the-admin-key"


class Workers:
    """The processes of one balancer with two relays, and its admin port."""

    def __init__(self, balancer: BalancerProcess) -> None:
        self.balancer = balancer
        self.coordinator, *self.relays = self.children()
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        self.admin = httpx.AsyncClient(base_url=balancer.admin_url, headers=headers, trust_env=False)

    def children(self) -> list[int]:
        pid = self.balancer.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    async def kill(self, pid: int) -> None:
        """Kills one of the processes, and returns when another has taken its place."""
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in (left := self.children()) and len(left) == 3, "it is started anew", 20.0)

    async def ask(self, asked: bytes = b"", method: str = "POST") -> Answer:
        """One request on a connection of its own."""
        client = await self.balancer.client()
        await client.send(asked or request(body=chat()))
        answer = await client.answer(method)
        client.leave()
        return answer

    async def one_each(self) -> tuple[Client, Client]:
        """A client at each of the two relays."""
        clients: dict[str, Client] = {}
        while len(clients) < 2:
            client = await self.balancer.client()
            await client.send(request("GET", "/health"))
            clients[relay_of(await client.answer("GET"))] = client
        first, second = clients.values()
        return first, second

    async def ask_each(self, asked: bytes = b"") -> list[Answer]:
        """One request at each of the two relays."""
        answers = []
        for client in await self.one_each():
            await client.send(asked or request(body=chat()))
            answers.append(await client.answer())
            client.leave()
        return answers

    async def service(self) -> dict[str, Any]:
        row: dict[str, Any] = (await self.admin.get("/status")).json()["service"]
        return row

    async def put(self, *replicas: str, **service: object) -> None:
        """Lists these replicas, as a controller does, as soon as somebody is there to be told."""
        listing = [{"name": f"replica-{number}", "endpoint": url} for number, url in enumerate(replicas, 1)]

        async def is_taken() -> bool:
            answer = await self.admin.put("/replicas", json={"replicas": listing, "service": service or None})
            return answer.status_code == 200

        await self.until(is_taken)

    async def until(self, look: Callable[[], Awaitable[bool]], within: float = 20.0) -> None:
        """Asks again and again; while the coordinator is started anew, nobody may answer."""
        async with asyncio.timeout(within):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if await look():
                        return
                await asyncio.sleep(0.05)

    async def shows(self, **facts: object) -> None:
        """Waits until /status says this of the service."""

        async def is_so() -> bool:
            return facts.items() <= (await self.service()).items()

        await self.until(is_so)

    async def requests(self, path: str = "/v1/chat/completions", status: str = "2xx") -> int:
        """How many requests the metrics have counted."""
        lines = (await self.admin.get("/metrics")).text.splitlines()
        marks = ("groundserve_requests_total{", f'path="{path}"', f'status="{status}"')
        return sum(int(float(line.split()[-1])) for line in lines if all(mark in line for mark in marks))


def relay_of(answer: Answer) -> str:
    """What begins the identifiers of all requests of one relay."""
    return str(answer.header("x-request-id")).partition("-")[0]


@contextlib.asynccontextmanager
async def workers(*replicas: str, arguments: tuple[str, ...] = (), **settings: object) -> AsyncIterator[Workers]:
    """Two relays and their coordinator, in front of these replicas."""
    async with running(*replicas, arguments=("--workers", "2", *arguments), **settings) as balancer:
        at = Workers(balancer)
        try:
            yield at
        finally:
            await at.admin.aclose()


@contextlib.asynccontextmanager
async def listed(*replicas: str, arguments: tuple[str, ...] = (), **settings: object) -> AsyncIterator[Workers]:
    """The same where the list of replicas comes from a controller: a new coordinator does not have it."""
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with BalancerProcess((), "--log-format", "json", "--workers", "2", *arguments, *options) as balancer:
        await until(balancer.is_listening, "the balancer listens", SOON * 8)
        at = Workers(balancer)
        try:
            await at.put(*replicas)
            await balancer.says(200)
            yield at
        finally:
            await at.admin.aclose()
            for client in balancer.clients:
                client.leave()
