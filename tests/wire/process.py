"""A balancer as a process of its own: for signals, memory, and what it prints."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.support.client import Client
from tests.wire.running import SOON

ROOT = Path(__file__).parents[2]


class BalancerProcess:
    """The process, its endpoint, and all it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.admin_url = ""
        self.printed = b""  # on standard output: the access log
        self.clients: list[Client] = []
        self.complained = b""  # on standard error, after the two lines that say where it listens

    @property
    def memory(self) -> int:
        """Bytes that it holds in memory now."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def client(self, receive_buffer: int = 0) -> Client:
        """A new connection, closed with the process."""
        client = await Client.open(self.url, receive_buffer)
        self.clients.append(client)
        return client

    async def says(self, status: int) -> None:
        """Waits until /ready answers so."""
        async with asyncio.timeout(SOON * 4):
            while True:
                client = await self.client()
                await client.send(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if (await client.answer("GET")).status == status:
                    return
                await asyncio.sleep(0.02)

    async def end(self) -> int:
        """Waits for its end; the exit status."""
        async with asyncio.timeout(SOON * 2):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def running(
    *replicas: str, arguments: tuple[str, ...] = (), **settings: object
) -> AsyncIterator[BalancerProcess]:
    """`python -m balancer` in front of these URLs, once one of them can be served; killed at the end if need be."""
    options = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json", *arguments]
    options += [word for url in replicas for word in ("--replica", url)]
    options += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "balancer", *options, cwd=ROOT, stdout=pipe, stderr=pipe, stdin=asyncio.subprocess.DEVNULL
    )
    balancer = BalancerProcess(process)
    assert process.stdout is not None
    assert process.stderr is not None
    readers: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(SOON * 4):
            balancer.url = (await process.stderr.readline()).split()[-1].decode()
            balancer.admin_url = (await process.stderr.readline()).split()[-1].decode()
        readers = [
            asyncio.ensure_future(_kept(process.stdout, balancer, "printed")),
            asyncio.ensure_future(_kept(process.stderr, balancer, "complained")),
        ]
        await balancer.says(200)
        yield balancer
    finally:
        for client in balancer.clients:
            client.leave()
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.gather(*readers)


async def _kept(stream: asyncio.StreamReader, balancer: BalancerProcess, name: str) -> None:
    while data := await stream.read(1 << 16):
        setattr(balancer, name, getattr(balancer, name) + data)
