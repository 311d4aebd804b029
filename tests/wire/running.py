"""A balancer in the test's own event loop; a test fails if the balancer leaves anything behind."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import orjson
import uvloop

from balancer import app
from balancer.app import Balancer
from balancer.config import Config, Reread
from balancer.contract.listing import ReplicaListing
from balancer.fleet.discovery import Resolve, resolve
from balancer.fleet.ejection import Outlier
from balancer.fleet.member import Member
from balancer.spec.settings import Settings
from tests.lab.knobs import Knobs
from tests.lab.replica import LabReplica
from tests.support.client import Answer, Client
from tests.support.until import until

DEADLINE = 60.0  # seconds for one test
NOT_AWAITED = -1
SOON = 5.0  # seconds for what should be there already


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes a coroutine a plain test, which runs on uvloop, as in production, and within DEADLINE."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE):
                await test(*arguments, **named)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded())

    return run


def in_house(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The same for a test of a module's `house`, which is reset before each test and checked after it."""

    @functools.wraps(test)
    def run(house: "House", **named: Any) -> None:
        assert house.runner is not None

        async def watched() -> None:
            house.renew()
            async with asyncio.timeout(DEADLINE):
                await test(house, **named)
                await house.emptied()

        house.runner.run(watched())

    return run


class House:
    """A running balancer, its replicas and its clients."""

    def __init__(self, balancer: Balancer, replicas: tuple[LabReplica, ...], log_reader: int) -> None:
        self.balancer = balancer
        self.replicas = replicas
        self.url = balancer.endpoint
        self.clients: list[Client] = []
        self.complaints: list[str] = []
        self.runner: asyncio.Runner | None = None
        self._log_reader = log_reader
        self._log = b""

    async def client(self, receive_buffer: int = 0, source: str = "") -> Client:
        """A new connection, closed with the house."""
        client = await Client.open(self.url, receive_buffer, source)
        self.clients.append(client)
        return client

    async def ask(self, data: bytes, method: str = "POST") -> Answer:
        """Sends on a new connection and returns the answer."""
        client = await self.client()
        await client.send(data)
        answer = await client.answer(method)
        client.leave()
        return answer

    def member(self, name: str) -> Member:
        return next(m for m in self.balancer.service.fleet.members.values() if m.name == name)

    def log_text(self) -> bytes:
        """The access log so far."""
        while True:
            self.balancer.access_log.flush()
            try:
                self._log += os.read(self._log_reader, 1 << 16)
            except BlockingIOError:
                return self._log

    def log(self) -> list[dict[str, Any]]:
        """The parsed lines of the access log."""
        return [orjson.loads(line) for line in self.log_text().splitlines()]

    async def logged(self, count: int = 1) -> list[dict[str, Any]]:
        """Waits until the log has `count` lines and returns it."""
        await until(lambda: len(self.log()) >= count, f"{count} log lines")
        assert len(self.log()) == count, self.log()
        return self.log()

    def is_at_rest(self) -> bool:
        """Is nothing in flight, nothing queued, and no upstream connection in use?"""
        balancer = self.balancer
        in_flight = [member.in_flight for member in balancer.service.fleet.members.values()]
        generating = [member.generating for member in balancer.service.fleet.members.values()]
        return not any(
            (*in_flight, *generating, balancer.service.admission.queue_depth, balancer.destination.pool.busy)
        )

    async def at_rest(self) -> None:
        """Waits until it is at rest."""
        balancer = self.balancer
        await until(self.is_at_rest, f"{balancer.destination.pool} queue={balancer.service.admission.queue_depth}")

    async def ready(self, count: int) -> None:
        """Waits until exactly `count` members may get requests."""
        fleet = self.balancer.service.fleet
        await until(lambda: sum(m.is_available(fleet.clock()) for m in fleet.members.values()) == count, "ready", 10)

    def renew(self) -> None:
        """Resets what earlier tests changed."""
        self.log()
        self._log = b""
        for replica in self.replicas:
            replica.knobs = Knobs()
            seen = replica.seen
            seen.requests.clear()
            seen.generations_started = seen.generations_finished = seen.generations_aborted = 0
        settings = self.balancer.config.settings
        for member in self.balancer.service.fleet.members.values():
            member.full_until = member.ejected_until = 0.0
            member.outlier = Outlier(settings.ejection_time, settings.max_ejection_time)
            member.turn = member.failures_total = member.said_full_to = 0
            self.balancer.destination.pool.forget(member.address)
        self.balancer.service.fleet.changed()

    async def emptied(self) -> None:
        """Checks what must be true once all clients have gone, whatever happened before."""
        for client in self.clients:
            client.leave()
        self.clients.clear()
        await self.at_rest()
        doors = self.balancer.doors
        await until(lambda: not doors.connections, "client connections closed")
        assert doors.buffered == 0, f"{doors.buffered} bytes of bodies counted, none held"
        assert self.complaints == []
        for replica in self.replicas:
            await replica.seen.until(
                lambda seen: seen.generations_finished + seen.generations_aborted == seen.generations_started
            )
            assert replica.seen.malformed == []


@contextlib.asynccontextmanager
async def serving(
    *replicas: LabReplica,
    ready: int | None = None,
    config: dict[str, Any] | None = None,
    reread: Reread | None = None,
    look_up: Resolve = resolve,
    **settings: Any,
) -> AsyncIterator[House]:
    """A balancer in front of these replicas (members a, b, ...), once `ready` of them are ready.

    By default all; NOT_AWAITED: at once.
    """
    loop = asyncio.get_running_loop()
    complaints: list[str] = []
    loop.set_exception_handler(lambda _, context: complaints.append(repr(context)))
    listener = _Listener(complaints)
    logging.getLogger().addHandler(listener)
    connections = _connections()
    log_reader, log_writer = os.pipe()
    os.set_blocking(log_reader, False)
    listed = tuple(ReplicaListing(chr(97 + n), replica.url) for n, replica in enumerate(replicas))
    settings = {"drain_grace": 0, "drain_timeout": 0} | settings
    whole = {"listen": ("127.0.0.1", 0), "admin": ("127.0.0.1", 0), "replicas": listed, "is_log_json": True}
    told = Config(**(whole | {"settings": Settings(**settings)} | (config or {})))
    balancer = Balancer(told, loop, log_writer, look_up, reread)
    await balancer.start()
    house = House(balancer, replicas, log_reader)
    house.complaints = complaints
    try:
        if ready != NOT_AWAITED:
            await house.ready(len(replicas) if ready is None else ready)
        yield house
        await house.emptied()
    finally:
        for client in house.clients:
            client.leave()
        await balancer.stop()
        os.close(log_reader)
        os.close(log_writer)
        logging.getLogger().removeHandler(listener)
    assert complaints == []
    left = [task for task in asyncio.all_tasks() if _is_ours(task)]
    assert left == [], "tasks left behind"
    await until(lambda: _connections() <= connections, "connections left open")


@contextlib.contextmanager
def kept(*knobs: dict[str, Any], **settings: Any) -> Iterator[House]:
    """A balancer for the tests of a module, in front of a replica for each of `knobs`."""
    stack = contextlib.AsyncExitStack()

    async def opened() -> House:
        replicas = [await stack.enter_async_context(LabReplica(**knob)) for knob in knobs]
        return await stack.enter_async_context(serving(*replicas, **settings))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            house = runner.run(opened())
            house.runner = runner
            yield house
        finally:
            runner.run(stack.aclose())


@contextlib.contextmanager
def deaf(replica: LabReplica) -> Iterator[None]:
    """Connections to the replica time out: its address has a listener with a full backlog that never accepts."""
    replica.refuse()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((replica.host, replica.port))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((replica.host, replica.port))
        yield


@contextlib.contextmanager
def hanging_up(replica: LabReplica) -> Iterator[None]:
    """Connections to the replica are accepted and closed at once, as by a proxy whose server is gone."""
    replica.refuse()

    def hang_up(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((replica.host, replica.port))
        listener.listen()
        thread = threading.Thread(target=hang_up, args=(listener,))  # a thread, to be as quick as a process
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def each(table: dict[str, Any]) -> dict[str, Any]:
    """A table of named rows, as arguments for parametrize."""
    return {"argvalues": list(table.values()), "ids": list(table)}


class _Listener(logging.Handler):
    """Collects warnings and errors of all loggers: tests expect none."""

    def __init__(self, complaints: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._complaints = complaints

    def emit(self, record: logging.LogRecord) -> None:
        self._complaints.append(f"{record.name}: {record.getMessage()} {record.exc_info or ''}")


def _connections() -> set[str]:
    """The inode numbers of this process's TCP sockets."""
    ours = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that listed them
            ours.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    return ours & {line.split()[9] for line in lines}


def _is_ours(task: "asyncio.Task[Any]") -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and str(Path(app.__file__).parent) in code.co_filename
