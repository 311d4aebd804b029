"""A lab replica on a real socket: speaks as SGLang 0.5.23 does, and breaks as a test asks.

    async with LabReplica(tokens=3, token_interval=0.01) as replica:
        ...                                        # send requests to replica.url
        replica.set(status=503, retry_after="2")   # for all that come; tests/lab/knobs.py has every knob
        replica.next(2, cut="before_head")         # the next two on serving paths, then as set before
        replica.refuse()                           # connects are refused; `await replica.accept()` ends it
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        replica.seen.last.headers                  # tests/lab/seen.py: every request, byte for byte
        assert replica.seen.malformed == []        # nothing came that is no HTTP/1.1

/v1/chat/completions, /v1/completions and /generate generate; /health, /health_generate, /ready, /server_info,
/v1/loads, /model_info, /v1/models and /metrics inform; every other path echoes: 200, any method, with the
request's own body and content type (or as the knobs say).

`python -m tests.lab.replica` is the same as a process of its own, for kill -9, SIGSTOP and SIGTERM
(tests/lab/spawn.py), turned over HTTP: `POST /lab/knobs` ({"status": 503}; {"next": 2, "status": 503} for the
next two requests; {"refuse": true}; {"drop_connections": true}), `GET /lab/knobs`, `GET /lab/seen`
(`?after=VERSION` waits for news).
"""

import asyncio
import contextlib
import random
import socket
from collections import deque
from typing import Any, Self

import orjson

from tests.lab import answers, service
from tests.lab.http1 import Connection, Exchange
from tests.lab.knobs import BadKnob, Knobs
from tests.lab.pace import PlainPace
from tests.lab.seen import Seen
from tests.lab.serving import serve, silence, standard_headers

PROBES = ("/ready", "/health", "/health_generate")


class LabReplica:
    """One simulated replica, listening while the `async with` block runs."""

    def __init__(self, knobs: Knobs | None = None, *, host: str = "127.0.0.1", port: int = 0, **changes: Any) -> None:
        self.knobs = (knobs or Knobs()).change(**changes)
        self.seen = Seen()
        self.host = host
        self.port = port
        self.random_seed = 0
        self.exiting = False  # SIGTERM was received: /ready and /health say 503
        self._next: deque[Knobs] = deque()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
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

    async def start(self) -> None:
        self.random_seed = self.knobs.random_seed or random.SystemRandom().getrandbits(30)
        if self._held is None:
            # Held for as long as the replica lives, so that nobody takes the port while it refuses.
            self._held = self._bound()
            self.port = self._held.getsockname()[1]
        await self.accept()

    async def stop(self) -> None:
        """Reset what is open and stop listening."""
        self.refuse()
        self.drop_connections()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._held is not None:
            self._held.close()
            self._held = None

    def set(self, **changes: Any) -> None:
        """Change knobs from the next request on. Raises BadKnob."""
        self.knobs = self.knobs.change(**changes)

    def refuse(self) -> None:
        """Stop listening: connects are refused, the port stays bound, open connections live on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Listen, again if need be, on the same port."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, sock=self._bound(), backlog=1024)

    def next(self, count: int = 1, **changes: Any) -> None:
        """Other knobs for the next `count` requests on serving paths; calls queue up. Raises BadKnob."""
        self._next.extend([self.knobs.change(**changes)] * count)

    def drop_connections(self) -> None:
        """Reset every open connection, as a replica that is killed does."""
        for connection in list(self._connections):
            connection.reset()

    def _bound(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((self.host, self.port))
        sock.setblocking(False)
        return sock

    def _connection(self) -> Connection:
        return Connection(self.seen, lambda: self.knobs, self._answer, self._connections, self._tasks)

    async def _answer(self, exchange: Exchange) -> None:
        path, _, query = exchange.head.target.partition("?")
        if path.startswith("/lab/"):
            self.seen.probes.append(exchange.record)
            await control(self, exchange, path, query)
        elif path in PROBES or path in service.PATHS:
            self.seen.probes.append(exchange.record)
            await exchange.read_body()
            await self._inform(exchange, path)
        else:
            knobs = self._next.popleft() if self._next else self.knobs
            self.seen.requests.append(exchange.record)
            self.seen.changed()
            await serve(exchange, knobs, self.seen, PlainPace)

    async def _inform(self, exchange: Exchange, path: str) -> None:
        knobs = self.knobs
        if path == "/ready":
            wanted, delay = knobs.ready, knobs.ready_delay
        elif path in PROBES:
            wanted, delay = knobs.health, knobs.health_delay
        else:
            wanted, delay = knobs.service_status, 0.0
        if delay:
            await asyncio.sleep(delay)
        if wanted == "hang":
            await silence()
        if wanted == "reset":
            exchange.connection.cut("reset")
        status = int(wanted)
        if path in PROBES and self.exiting:
            status = 503
        content_type, body = "", b""
        if status == 404:
            content_type, body = service.JSON, b'{"detail":"Not Found"}'
        elif path not in PROBES and status == 200:
            load = service.load_from(self.seen, knobs)
            content_type, body = service.describe(path, knobs, self.random_seed, self.seen, load)
        await reply(exchange, status, content_type, body)


async def reply(exchange: Exchange, status: int, content_type: str, body: bytes) -> None:
    """An answer that no fault touches."""
    await exchange.write(exchange.head_bytes(status, standard_headers(content_type), "auto", len(body)))
    if body and exchange.head.method != "HEAD":
        await exchange.write(body)
    await exchange.finish()


async def control(replica: LabReplica, exchange: Exchange, path: str, query: str) -> None:
    """Answer /lab/knobs and /lab/seen."""
    await exchange.read_body()
    match exchange.head.method, path:
        case "POST", "/lab/knobs":
            try:
                await _turn(replica, orjson.loads(exchange.body))
            except ValueError as error:
                await reply(exchange, 400, service.JSON, answers.error(400, str(error), "BadKnob"))
                return
            await reply(exchange, 200, service.JSON, orjson.dumps(replica.knobs))
        case "GET", "/lab/knobs":
            await reply(exchange, 200, service.JSON, orjson.dumps(replica.knobs))
        case "GET", "/lab/seen":
            after = int(query.partition("after=")[2] or -1)
            with contextlib.suppress(AssertionError):
                await replica.seen.until(lambda seen: seen.version > after, timeout=5.0)
            await reply(exchange, 200, service.JSON, orjson.dumps(replica.seen.as_json()))
        case _:
            await reply(exchange, 404, service.JSON, answers.error(404, f"no {path} in the lab", "NotFound"))


async def _turn(replica: LabReplica, asked: Any) -> None:
    if not isinstance(asked, dict):
        raise BadKnob(f"knobs are an object, not {asked!r}")
    count = asked.pop("next", None)
    refuse, drop = asked.pop("refuse", None), asked.pop("drop_connections", False)
    if count is None:
        replica.set(**asked)
    else:
        replica.next(count, **asked)
    if refuse:
        replica.refuse()
    elif refuse is False:
        await replica.accept()
    if drop:
        replica.drop_connections()
