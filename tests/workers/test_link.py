"""The connections between a balancer's processes, with this test at one end: what is hostile, lost, or asked again."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.routing.admission import Waiter
from balancer.routing.prompt import Prompt
from balancer.spec.settings import Settings
from balancer.workers import link
from balancer.workers.asking import Asking, Listener
from balancer.workers.known import KnownReplica, KnownService
from balancer.workers.link import Link, Message
from balancer.workers.messages import Asked, Told
from balancer.workers.remote_places import NOTHING, OtherRelays, RemotePlaces
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop
from tests.workers.running import workers

A, B = ("a", "http://10.0.0.1:1"), ("b", "http://10.0.0.2:1")
FACTS = [0.0, 0.0, 0.0, True, 0.0, None, False, False, None]


class Nobody:
    """Implements balancer.workers.asking.Listener."""

    def greeted(self) -> None: ...

    def told(self, message: Message) -> None: ...

    def met(self, replica: KnownReplica) -> None: ...

    def left(self, replica: KnownReplica) -> None: ...


class PlayedCoordinator:
    """Listens where relays look for their coordinator, and remembers what the last that came has said."""

    def __init__(self) -> None:
        self.address = f"\0groundserve-test-{secrets.token_hex(8)}"
        self.said: list[Message] = []
        self.link: Link | None = None

    def _came(self) -> Link:
        self.said = []
        self.link = Link(asyncio.get_running_loop(), lambda message: self.said.append(message), lambda: None)
        return self.link

    def tell(self, *messages: list[Any]) -> None:
        assert self.link is not None
        for message in messages:
            self.link.send(message)

    async def until_asked(self, kind: Asked) -> Message:
        """What was said of this kind."""
        found = await until(lambda: [one for one in self.said if one[0] == kind], f"a relay says {kind.name}")
        return found[-1]

    @contextlib.asynccontextmanager
    async def relay(
        self, listener_of: Callable[[Asking], Listener] = lambda _: Nobody()
    ) -> AsyncIterator[tuple[Asking, RemotePlaces]]:
        loop = asyncio.get_running_loop()
        asking = Asking(loop, self.address)
        asking.listener = listener_of(asking)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        server = await loop.create_unix_server(self._came, sock=listener)
        running = loop.create_task(asking.run())
        try:
            await self.until_asked(Asked.HELLO)
            yield asking, RemotePlaces(KnownService("0", Settings()), asking, loop)
        finally:
            asking.is_leaving = True  # it would connect anew
            if self.link is not None:
                self.link.close()
            await running
            server.close()
            await until(lambda: listener.fileno() < 0, "the listener is closed")

    async def restart(self) -> None:
        assert self.link is not None
        self.link.close()
        self.said = []
        await self.until_asked(Asked.HELLO)


@on_uvloop
async def test_a_coordinator_is_told_of_all_deaths() -> None:
    """Each new one is, also of what others saw; of a request completed since then, that it was, then its new death."""
    heard = ["0", "b", "10.0.0.2:1", "02", 1.0, "an identifier"]

    class Teller(Nobody):
        def __init__(self, asking: Asking) -> None:
            self.others = OtherRelays("0", asking, lambda: 2.0)
            self.others.deaths.learn(heard)
            replica = ReplicaAddress.of(*A)
            self.others.noted(replica, b"\1", 1.0)
            self.others.acquitted(b"\1")
            self.others.noted(replica, b"\1", 2.0)

        def greeted(self) -> None:
            self.others.greeted()

    played = PlayedCoordinator()
    async with played.relay(Teller):
        await until(lambda: len(played.said) == 4)
        _, acquitted, *deaths = played.said
        assert acquitted == [Asked.ACQUITTED, "0", "01"]
        again = [Asked.DIED, "0", "a", "10.0.0.1:1", "01", 2.0]
        assert (deaths[0], deaths[1][:-1]) == ([Asked.DIED, *heard], again)
        await played.restart()
        await until(lambda: len(played.said) == 3)
        assert played.said[1:] == deaths


@on_uvloop
async def test_what_is_asked_again_names_the_same_replicas() -> None:
    """Another coordinator may count the replicas in another order."""
    played = PlayedCoordinator()
    async with played.relay() as (asking, places):
        played.tell([Told.REPLICA, 1, "0", *A, *FACTS], [Told.REPLICA, 2, "0", *B, *FACTS], [Told.ALL])
        await asking.knows_all.wait()
        waiter = Waiter(Prompt.of([], False), True)
        first = asyncio.ensure_future(places.claim(waiter))
        played.tell([Told.PLACE, (await played.until_asked(Asked.CLAIM))[1], 1, "", 0.0, 0.0, 1, False])
        (await first).end(Outcome.REFUSED, NOTHING)
        second = asyncio.ensure_future(places.claim(waiter))
        await until(lambda: [one for one in played.said if one[0] == Asked.CLAIM and one[1] == 2])
        await played.restart()
        played.tell([Told.REPLICA, 1, "0", *B, *FACTS], [Told.REPLICA, 2, "0", *A, *FACTS], [Told.ALL])
        claim = await played.until_asked(Asked.CLAIM)
        assert claim[-2][0] == [list(A)]
        second.cancel()


@on_uvloop
async def test_a_held_place_is_at_a_replica_that_is_told_late() -> None:
    """A coordinator that was started anew hears of some replicas from elsewhere, a moment later."""
    played = PlayedCoordinator()
    async with played.relay() as (asking, places):
        played.tell([Told.REPLICA, 1, "0", *A, *FACTS], [Told.ALL])
        held = asyncio.ensure_future(places.claim(Waiter(Prompt.of([], False), True)))
        played.tell([Told.PLACE, (await played.until_asked(Asked.CLAIM))[1], 1, "", 0.0, 0.0, 1, False])
        place = await held
        await played.restart()
        assert played.said[0][1] == [[1, "0", *A, True]]
        played.tell([Told.ALL])
        await asking.knows_all.wait()
        asking.all_met("0")
        played.tell([Told.REPLICA, 7, "0", *A, 5.0, *FACTS[1:]])
        await until(lambda: place.alive_at == 5.0, "the place learns what its replica says")


@on_uvloop
async def test_another_users_process_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on the machine can connect; what they send is neither read nor kept."""
    loop, taken = asyncio.get_running_loop(), list[Message]()
    ours, theirs = socket.socketpair()
    theirs.send(b"[[0,[],[]]]\n")
    ended = asyncio.Event()
    monkeypatch.setattr(link.os, "geteuid", lambda: os.getuid() + 1)
    await loop.create_unix_connection(lambda: Link(loop, taken.append, ended.set), sock=ours)
    await asyncio.wait_for(ended.wait(), 10)
    assert taken == []
    theirs.close()
    await until(lambda: ours.fileno() < 0, "the connection is closed")


@on_uvloop
async def test_a_message_that_cannot_be_written_is_lost_alone() -> None:
    loop, taken = asyncio.get_running_loop(), list[Message]()
    ends = socket.socketpair()
    for end in ends:
        _, sending = await loop.create_unix_connection(lambda: Link(loop, taken.append, lambda: None), sock=end)
    for message in ([1, "first"], [2, 1 << 70], [3, "last"]):
        sending.send(message)
    await until(lambda: taken == [[1, "first"], [3, "last"]], lambda: taken)
    sending.close()
    await until(lambda: all(end.fileno() < 0 for end in ends), "the connection is closed")


@on_uvloop
async def test_an_end_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it would grow as long as it hangs."""
    monkeypatch.setattr(link, "MOST_UNREAD", 1 << 20)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    ours, theirs = socket.socketpair()
    _, sending = await loop.create_unix_connection(lambda: Link(loop, lambda _: None, ended.set), sock=ours)
    for _ in range(8):
        sending.send(["x" * (1 << 19)])
        sending.flush()
    await asyncio.wait_for(ended.wait(), 10)
    theirs.close()
    await until(lambda: ours.fileno() < 0, "the connection is closed")


@on_uvloop
async def test_a_question_that_fails_is_answered() -> None:
    """Else its client would wait for ever. This test speaks to a running coordinator as one more relay."""
    async with LabReplica() as a, workers(a.url) as at:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(_address_of(at.coordinator))
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        writer.write(orjson.dumps([[Asked.HELLO, [], []], [Asked.CLAIM, 9, "0", 0, "", 0.0]]) + b"\n")
        answers: list[Message] = []
        async with asyncio.timeout(20):
            while not any(one[:2] == [Told.ERROR, 9] for one in answers):
                answers += orjson.loads(await reader.readline())
        writer.close()
        assert (await at.ask()).status == 200


@on_uvloop
async def test_nobody_waits_for_a_coordinator_that_will_not_come() -> None:
    """It dies just before the balancer is told to leave: whoever waits for a place is refused, not left waiting."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url, max_in_flight=1, drain_grace=0) as at:
        first, second = await at.one_each()
        await first.send(request(body=chat(stream=True, tokens=2_000)))
        await first.until(b"t00")
        await second.send(request(body=chat()))
        await at.shows(queue_depth=1)
        os.kill(at.balancer.pid, signal.SIGSTOP)
        os.kill(at.coordinator, signal.SIGKILL)
        os.kill(at.balancer.pid, signal.SIGTERM)
        os.kill(at.balancer.pid, signal.SIGCONT)
        async with asyncio.timeout(20):
            assert (await second.answer()).status == 503
        first.leave()
        await at.balancer.end()


def _address_of(coordinator: int) -> str:
    """Where it listens for relays."""
    files = [str(file.readlink()) for file in Path(f"/proc/{coordinator}/fd").iterdir()]
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return next("\0" + row[-1][1:] for row in rows if "@groundserve-" in row[-1] and f"socket:[{row[-2]}]" in files)
