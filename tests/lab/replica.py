"""A lab replica on a real socket: it speaks as SGLang 0.5.23 does, and fails as a test asks.

    async with LabReplica(tokens=3, token_interval=0.01) as replica:
        ...                                        # send requests to replica.url
        replica.set(status=503, retry_after="2")   # for all requests from now on; tests/lab/knobs.py has every knob
        replica.next(2, cut="before_head")         # for the next two on serving paths, then as set before
        replica.refuse()                           # connects are refused; `await replica.accept()` ends it
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        replica.seen.last.headers                  # tests/lab/seen.py: every request, byte for byte
        assert replica.seen.malformed == []        # everything received was HTTP/1.1

`LabReplica(model=ModelSettings(...))` takes its timing, caching and limits from tests/lab/model.py (faithful mode).
`LabReplica(seat=Seat(folder))` shares GPUs with others of the same folder (tests/lab/tenant.py).

/v1/chat/completions, /v1/completions, /generate and /v1/messages generate, and /tokenize counts tokens; /health,
/health_generate, /ready, /server_info, /v1/loads, /model_info, /v1/models and /metrics report its state; every other
path echoes: 200, any method, with the request's own body and content type (or as the knobs say). Its model continues
a text, or an answer to be continued, where it ends: after " t07" comes " t08".

`python -m tests.lab.replica` is the same in a process of its own, for kill -9, SIGSTOP and SIGTERM
(tests/lab/spawn.py), controlled over HTTP: `POST /lab/knobs` ({"status": 503}; {"next": 2, "status": 503} for the
next two requests; {"refuse": true}; {"drop_connections": true}), `GET /lab/knobs`, `GET /lab/seen`
(`?after=VERSION` waits for a newer version).
"""

import asyncio
import os
import random
import socket
from collections import deque
from typing import Any, Self

from tests.lab import service
from tests.lab.asked import Asked
from tests.lab.control import control
from tests.lab.exchange import Exchange
from tests.lab.http1 import Connection
from tests.lab.knobs import FAITHFUL, Knobs
from tests.lab.live import LiveModel
from tests.lab.model import ModelSettings
from tests.lab.pace import Pace, PlainPace
from tests.lab.prompts import tokenized
from tests.lab.seen import Seen
from tests.lab.serving import TOKENIZING, serve, silence
from tests.lab.tenant import Seat, SharedPace, Sharing

PROBES = ("/ready", "/health", "/health_generate")
LEASE = "/lease"  # 404: it shares no GPU
OPEN_TO_ALL = ("/ready", "/health", "/metrics")  # SGLang answers these without its API key


class LabReplica:
    """One simulated replica, listening while the `async with` block runs."""

    def __init__(
        self,
        knobs: Knobs | None = None,
        *,
        model: ModelSettings | None = None,
        seat: Seat | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        **changes: Any,
    ) -> None:
        """`model` makes it faithful: timing, caching and limits come from a ReplicaModel. Raises BadKnob.

        `seat`: it shares GPUs there; `start` returns once it had its first turn, and has loaded.
        """
        self.knobs = (knobs or (Knobs() if model is None else FAITHFUL)).change(**changes)
        self.live = None if model is None else LiveModel(model)
        self.seat = seat
        self.sharing: Sharing | None = None
        self.seen = Seen()
        self.host = host
        self.port = port
        self.random_seed = 0
        self.exiting = False  # SIGTERM was received: /ready and /health say 503
        self.die = self.fall  # what poison does
        self.is_warming = False
        self._next: deque[Knobs] = deque()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._control: asyncio.Server | None = None
        self._held: socket.socket | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        if self.seen.crashes:
            raise AssertionError("the lab replica itself failed:\n" + "\n".join(self.seen.crashes))

    async def start(self, warming: bool = False) -> None:
        """Listen. `warming`: /ready and /health say 503 until `warmed_up`, as SGLang's do while it warms up."""
        self.is_warming = warming
        self.random_seed = self.knobs.random_seed or random.SystemRandom().getrandbits(30)
        if self._held is None:
            # Bound for as long as the replica lives, so that no other program takes the port while it refuses.
            self._held = self._bound()
            self.port = self._held.getsockname()[1]
        if self.seat is not None:
            self.sharing = await Sharing.begin(self, self.seat)
        await self.accept()

    def warmed_up(self) -> None:
        self.is_warming = False

    async def open_control(self) -> str:
        """Listen for /lab requests on a separate port, where no fault applies. Returns its URL."""
        seen, knobs, connections = Seen(), Knobs(), set[Connection]()

        def connection() -> Connection:
            return Connection(seen, lambda: knobs, lambda exchange: control(self, exchange), connections, self._tasks)

        self._control = await asyncio.get_running_loop().create_server(connection, self.host, 0)
        return f"http://{self.host}:{self._control.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Reset what is open and stop listening."""
        self._leave_seat()
        self.refuse()
        if self._control is not None:
            self._control.close()
        self.drop_connections()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.live is not None:
            self.live.close()
        if self._held is not None:
            self._held.close()
            self._held = None

    def set(self, **changes: Any) -> None:
        """Change knobs from the next request on. Raises BadKnob."""
        self.knobs = self.knobs.change(**changes)
        if self.live is not None and "stuck" in changes:
            self.live.stick(self.knobs.stuck)

    @property
    def is_listening(self) -> bool:
        return self._server is not None

    @property
    def generating(self) -> int:
        """Generations that have begun and not ended, waiting ones included."""
        seen = self.seen
        return seen.generations_started - seen.generations_finished - seen.generations_aborted

    def refuse(self) -> None:
        """Stop listening: connects are refused, but the port stays bound and open connections continue."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Listen, again if need be, on the same port."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, sock=self._bound(), backlog=1024)

    def next(self, count: int = 1, **changes: Any) -> None:
        """Other knobs for the next `count` requests on serving paths but /tokenize; calls queue up. Raises BadKnob."""
        self._next.extend([self.knobs.change(**changes)] * count)

    def forget_next(self) -> None:
        """Drop the knobs that `next` has queued."""
        self._next.clear()

    def fall(self) -> None:
        """As if it were killed: stop listening and reset what is open."""
        self._leave_seat()
        self.refuse()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Reset every open connection, as a replica that is killed does."""
        for connection in list(self._connections):
            connection.reset()

    def close_now(self, number: int) -> None:
        """End the connection with this number in the kernel, at once: what is on its way is not read."""
        for connection in self._connections:
            if connection.number == number:
                with socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno())) as sock:
                    sock.shutdown(socket.SHUT_RDWR)

    def is_open(self, number: int) -> bool:
        """Is the connection of this number there at both ends, as far as this kernel knows?"""
        found = [connection for connection in self._connections if connection.number == number]
        return any(connection.is_open for connection in found)

    def _leave_seat(self) -> None:
        if self.sharing is not None:
            self.sharing.end()
            self.sharing = None

    def _bound(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # Of TCP by name: only then does asyncio send what is written at once, as uvicorn does (TCP_NODELAY).
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((self.host, self.port))
        sock.setblocking(False)
        return sock

    def _connection(self) -> Connection:
        return Connection(self.seen, lambda: self.knobs, self._answer, self._connections, self._tasks)

    async def _answer(self, exchange: Exchange) -> None:
        path = exchange.head.target.partition("?")[0]
        if path.startswith("/lab/"):
            await control(self, exchange)
        elif path == "/alive" and self.sharing is not None:
            self.seen.probes.append(exchange.record)
            await self.sharing.answer(exchange, silence, is_keyed=False)
        elif not self._may_enter(exchange, path):
            await exchange.read_body()
            await exchange.reply(401, service.JSON, b'{"error":"Unauthorized"}')
        elif self.sharing is not None:
            if path == LEASE:
                self.seen.probes.append(exchange.record)
            await self.sharing.answer(exchange, lambda: self._serve(exchange, path), is_keyed=True)
        else:
            await self._serve(exchange, path)

    async def _serve(self, exchange: Exchange, path: str) -> None:
        if path in PROBES or path in service.PATHS or path == LEASE:
            self.seen.probes.append(exchange.record)
            await exchange.read_body()
            await self._inform(exchange, path)
        elif path in TOKENIZING and exchange.record.header("x-request-id") is None:  # for no client
            self.seen.probes.append(exchange.record)
            await self._tokenize(exchange)
        else:
            knobs = self._next.popleft() if self._next and path not in TOKENIZING else self.knobs
            self.seen.requests.append(exchange.record)
            self.seen.changed()
            await serve(exchange, knobs, self.seen, self._pace, self.die)

    def _pace(self, knobs: Knobs, asked: Asked) -> Pace:
        pace = PlainPace(knobs, asked) if self.live is None else self.live.pace(knobs, asked)
        return pace if self.sharing is None else SharedPace(pace, self.sharing.engine)

    async def _tokenize(self, exchange: Exchange) -> None:
        await exchange.read_body()
        template = self.knobs.template
        if template == "hang":
            await silence()
        counted = (
            None if template == "404" else tokenized(exchange.body, template == "continues", self.knobs.opens_thinking)
        )
        await exchange.reply(404 if counted is None else 200, service.JSON, counted or b"{}")

    def _may_enter(self, exchange: Exchange, path: str) -> bool:
        if not self.knobs.api_key or path.startswith(OPEN_TO_ALL):
            return True
        return exchange.record.header("authorization") == f"Bearer {self.knobs.api_key}"

    async def _inform(self, exchange: Exchange, path: str) -> None:
        knobs = self.knobs
        if path == "/ready":
            wanted, delay = knobs.ready, knobs.ready_delay
        elif path in PROBES:
            wanted, delay = knobs.health, knobs.health_delay
        else:
            wanted, delay = 404 if path == LEASE else knobs.service_status, 0.0
        if delay:
            await asyncio.sleep(delay)
        if wanted == "hang":
            await silence()
        if wanted == "reset":
            exchange.connection.cut("reset")
        status = int(wanted)
        content_type, body = "", b""
        if status == 404:
            content_type, body = service.JSON, b'{"detail":"Not Found"}'
        elif path in PROBES:
            status = status if status != 200 or await self._probe_passes(path) else 503
        elif status == 200:
            load = service.load_from(self.seen, knobs) if self.live is None else self.live.load()
            content_type, body = service.describe(path, knobs, self.random_seed, self.seen, load)
        await exchange.reply(status, content_type, body)

    async def _probe_passes(self, path: str) -> bool:
        if self.exiting or self.is_warming:
            return False
        if self.live is None:
            return True
        return self.live.is_healthy if path == "/ready" else await self.live.check_health(self.knobs.health_timeout)


if __name__ == "__main__":
    from tests.lab.process import main

    main()
