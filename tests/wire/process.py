"""A balancer as a process of its own: for signals, memory, and what it prints."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from tests.support.client import Client
from tests.support.program import BalancerProgram
from tests.support.until import until
from tests.wire.running import SOON


class BalancerProcess(BalancerProgram):
    """The process, and the clients that are closed with it."""

    def __init__(self, replicas: tuple[str, ...], *flags: str, pass_fds: Sequence[int] = ()) -> None:
        self.clients: list[Client] = []
        super().__init__(replicas, *flags, has_own_errors=True, pass_fds=pass_fds)

    @property
    def printed(self) -> bytes:
        """Its standard output: the access log."""
        return self.log.read_bytes()

    @property
    def complained(self) -> bytes:
        """Its standard error after the two lines that say where it listens."""
        return b"".join(self.errors.read_bytes().splitlines(keepends=True)[2:])

    async def client(self, receive_buffer: int = 0) -> Client:
        """A new connection, closed with the process."""
        client = await Client.open(self.url, receive_buffer)
        self.clients.append(client)
        return client

    async def says(self, status: int) -> None:
        """Waits until /ready answers with this status."""
        async with asyncio.timeout(SOON * 4):
            while True:
                client = await self.client()
                await client.send(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if (await client.answer("GET")).status == status:
                    return
                await asyncio.sleep(0.02)

    async def end(self) -> int:
        """Waits for its end and returns the exit status."""
        return await self.ended(SOON * 2)


@contextlib.asynccontextmanager
async def running(
    *replicas: str, arguments: tuple[str, ...] = (), pass_fds: Sequence[int] = (), **settings: object
) -> AsyncIterator[BalancerProcess]:
    """`python -m balancer` in front of these URLs, once it is ready; killed at the end if it still runs."""
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with BalancerProcess(replicas, "--log-format", "json", *arguments, *options, pass_fds=pass_fds) as balancer:
        try:
            await until(balancer.is_listening, "the balancer listens", SOON * 8)
            await balancer.says(200)
            yield balancer
        finally:
            for client in balancer.clients:
                client.leave()
