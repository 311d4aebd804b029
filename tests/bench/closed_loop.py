"""A closed loop of small requests: each connection sends the next one when its last answer is whole."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence

from tests.bench import messages
from tests.bench.exchange import Exchange, address, chat_post, tls
from tests.bench.phase import PATIENCE, Phase
from tests.bench.stats import quantile


class ClosedLoop:
    """Keeps `connections` requests in flight at `url`, of these bodies in turn."""

    def __init__(self, url: str, connections: int, bodies: Sequence[bytes], key: str = "") -> None:
        self.address = address(url)
        self.tls = tls(url)
        self.connections = connections
        self.requests = itertools.cycle([chat_post(url, body, key) for body in bodies])
        self.seconds: list[float] = []  # of each answer
        self.errors: Counter[str] = Counter()
        self.heard = asyncio.Event()  # since the phase that counts began: an answer, or anything that went wrong at all
        self.stopping = False
        self.idle = asyncio.Event()  # stopped, and all connections are closed
        self.in_flight = 0  # connections that are open or being opened
        self.sent = 0
        self.connecting: set[asyncio.Task[None]] = set()

    async def run(self, warmup: float, phase: Phase) -> dict[str, object]:
        for _ in range(self.connections):
            self.connect()
        await asyncio.sleep(warmup)
        before = len(self.seconds)
        if not self.errors:
            self.heard.clear()
        measured = await phase.run(self.heard)
        counted = self.seconds[before : len(self.seconds)]
        self.stopping = True
        if self.in_flight:
            await asyncio.wait_for(self.idle.wait(), PATIENCE)
        return {
            **measured,
            "count": len(counted),
            "sent": self.sent,
            "latency_p50": quantile(counted, 0.5) if counted else None,
            "latency_p99": quantile(counted, 0.99) if counted else None,
            "errors": dict(self.errors.most_common(5)),
        }

    def connect(self) -> None:
        self.in_flight += 1
        task = asyncio.create_task(self._connect())
        self.connecting.add(task)
        task.add_done_callback(self.connecting.discard)

    async def _connect(self) -> None:
        try:
            _, worker = await asyncio.get_running_loop().create_connection(
                lambda: Worker(self), *self.address, ssl=self.tls
            )
        except OSError as error:
            self.wrong(f"connect: {error}")
            self.leave()
        else:
            worker.send()

    def wrong(self, reason: str) -> None:
        self.errors[reason] += 1
        self.heard.set()

    def lost(self) -> None:
        """A connection is closed; another takes its place, as nginx asks after each thousandth request."""
        if not self.stopping:
            self.connect()
        self.leave()

    def leave(self) -> None:
        self.in_flight -= 1
        if self.stopping and not self.in_flight:
            self.idle.set()


class Worker(Exchange):
    """One connection of the loop."""

    def __init__(self, loop: ClosedLoop) -> None:
        super().__init__(b"")
        self.loop = loop
        self.expected = messages.small_answer()
        self.body = b""

    def send(self) -> None:
        self.loop.sent += 1
        self.request = next(self.loop.requests)
        super().send()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def completed(self, status: int, keep_alive: bool) -> None:
        body, self.body = self.body, b""
        if status == 200 and body == self.expected:
            self.loop.seconds.append(time.monotonic() - self.sent_at)
            self.loop.heard.set()
        else:
            self.loop.wrong(f"status {status}, body {body[:80]!r}")
        if keep_alive and not self.loop.stopping:
            self.send()
        else:
            self.transport.close()

    def failed(self, reason: str) -> None:
        self.loop.wrong(reason)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.loop.lost()
