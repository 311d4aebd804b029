"""What a coordinator tells its relays, with this test in the place of these."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from balancer.observe.tally import Tallies
from balancer.relay.deaths import REMEMBERED
from balancer.relay.metering import Meter
from balancer.workers.answering import Answering
from balancer.workers.link import Link, Message
from balancer.workers.messages import Asked, Told
from tests.lab.replica import LabReplica
from tests.support.until import until
from tests.wire.running import on_uvloop, serving


class PlayedRelay:
    """A relay that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.link = Link(asyncio.get_running_loop(), self.told.append, lambda: None)

    async def come(self, address: str, *entries: tuple[int, str]) -> None:
        """Returns when it was told everything. `entries` are requests in progress: their call and limited key."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(address)
        await asyncio.get_running_loop().create_unix_connection(lambda: self.link, sock=sock)
        self.link.send([Asked.HELLO, [], list(entries)])
        await until(lambda: bool(self.of(Told.ALL)))

    def of(self, kind: Told) -> list[Message]:
        """What follows the kind in each message of this kind."""
        return [message[1:] for message in self.told if message[0] == kind]

    async def ask(self, call: int, id_: str) -> Any:
        """Who keeps the answer, as it is told."""
        self.link.send([Asked.KEEPER, call, id_])
        await until(lambda: any(answered == call for answered, _ in self.of(Told.ANSWER)))
        return next(said for answered, said in self.of(Told.ANSWER) if answered == call)


@contextlib.asynccontextmanager
async def answering(services: Any) -> AsyncIterator[tuple[Answering, str]]:
    """A coordinator's end and its address."""
    nothing: Any = None
    loop, address = asyncio.get_running_loop(), f"\0groundserve-test-{secrets.token_hex(8)}"
    at = Answering(loop, services, Tallies(), None, Meter(loop.time), nothing, lambda: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    await at.start(listener)
    try:
        yield at, address
    finally:
        at.close()
        await asyncio.sleep(0.01)


@on_uvloop
async def test_who_keeps_an_answer_is_asked_for_not_told() -> None:
    """A relay that comes, or one of several that tell a new coordinator, does not make it tell all to all."""
    async with LabReplica() as a, serving(a) as house, answering(house.balancer.services) as (_, address):
        first, second, third = PlayedRelay(), PlayedRelay(), PlayedRelay()
        for relay in (first, second):
            await relay.come(address)
        number = first.of(Told.REPLICA)[0][0]
        first.link.send([Asked.KEEPS, "0", [[number, f"resp_{count}", "alice"] for count in range(1000)]])
        await until(lambda: house.balancer.services.destinations[0].responses.known("resp_999") is not None)
        await third.come(address)
        where = ["a", f"{a.host}:{a.port}", "alice"]
        for call, relay in enumerate((second, third)):
            assert await relay.ask(call, "resp_7") == where
            assert await relay.ask(100 + call, "resp_of_nobody") is None
            assert relay.of(Told.KEPT) == []


@on_uvloop
async def test_requests_in_progress_count_for_their_keys() -> None:
    """A new coordinator adds up those of all relays, and takes off what leaves."""
    async with LabReplica() as a, serving(a) as house, answering(house.balancer.services) as (at, address):
        first, second = PlayedRelay(), PlayedRelay()
        await first.come(address, (1, "alice"), (2, "bob"))
        await second.come(address, (1, "alice"))
        await until(lambda: at.entered == {"alice": 2, "bob": 1})
        first.link.send([Asked.LEFT, 1])
        await until(lambda: at.entered["alice"] == 1)


@on_uvloop
async def test_only_what_was_learned_is_passed_on() -> None:
    """An answer that is another key's already is not told to the other relays as somebody else's."""
    async with LabReplica() as a, serving(a) as house, answering(house.balancer.services) as (_, address):
        first, second = PlayedRelay(), PlayedRelay()
        for relay in (first, second):
            await relay.come(address)
        number = first.of(Told.REPLICA)[0][0]
        told = [["0", number, id_, key] for id_, key in (("resp_hers", "alice"), ("resp_new", "mallory"))]
        for key in ("alice", "mallory", "alice"):
            first.link.send([Asked.KEPT, "0", number, "resp_hers", key])
        first.link.send([Asked.KEPT, *told[-1]])
        await until(lambda: told[-1] in second.of(Told.KEPT))
        assert second.of(Told.KEPT) == told
        assert first.of(Told.KEPT) == []


@on_uvloop
async def test_relays_that_come_later_hear_of_deaths() -> None:
    """What killed a replica lately is told to them, too, unless it was completed after all."""
    async with LabReplica() as a, serving(a) as house, answering(house.balancer.services) as (_, address):
        first, second, third = PlayedRelay(), PlayedRelay(), PlayedRelay()
        await first.come(address)
        now = asyncio.get_running_loop().time()
        killer, innocent, long_ago = (
            ["0", "a", "10.0.0.1:1", digest, at, f"id {digest}"]
            for digest, at in (("01", now), ("02", now), ("03", now - REMEMBERED))
        )
        for died in (killer, innocent, long_ago):
            first.link.send([Asked.DIED, *died])
        await second.come(address)
        assert second.of(Told.DIED) == [killer, innocent]
        first.link.send([Asked.ACQUITTED, "0", "02"])
        await until(lambda: bool(second.of(Told.ACQUITTED)))
        await third.come(address)
        assert (third.of(Told.DIED), first.of(Told.DIED)) == ([killer], [])


@on_uvloop
async def test_deaths_told_again_are_passed_on_once() -> None:
    """All relays tell a new coordinator what they know; what has been acquitted since stays so."""
    async with LabReplica() as a, serving(a) as house, answering(house.balancer.services) as (_, address):
        first, second, third = PlayedRelay(), PlayedRelay(), PlayedRelay()
        for relay in (first, second):
            await relay.come(address)
        now = asyncio.get_running_loop().time()
        alike = [["0", "a", "10.0.0.1:1", "01", now, id_] for id_ in ("x", "y")]
        innocent = ["0", "a", "10.0.0.1:1", "02", now, "z"]
        for died in (*alike, innocent):
            first.link.send([Asked.DIED, *died])
        await until(lambda: len(second.of(Told.DIED)) == 3)
        second.link.send([Asked.ACQUITTED, "0", "02"])
        for died in (*alike, innocent):
            second.link.send([Asked.DIED, *died])
        second.link.send([Asked.ACQUITTED, "0", "03"])
        await until(lambda: len(first.of(Told.ACQUITTED)) == 2)
        await third.come(address)
        assert (first.of(Told.DIED), third.of(Told.DIED)) == ([], alike)


@on_uvloop
async def test_waiting_claims_look_at_services_once() -> None:
    """However many requests wait for a service of which nothing is known yet, each tick looks at all services once."""
    looks: list[int] = []
    services = SimpleNamespace(all=[], destinations=[], still_here=lambda: looks.append(1) or [])
    async with answering(services) as (at, _):
        waiting = [asyncio.ensure_future(at.once_told("9")) for _ in range(20)]
        await asyncio.sleep(0)
        looks.clear()
        for _ in range(3):
            at.tick(0.0)
            await asyncio.sleep(0.01)
        assert len(looks) == 3
        for one in waiting:
            one.cancel()
