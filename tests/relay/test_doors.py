"""One connection's fault is not the others'."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.relay.doors import Connection, Doors
from balancer.relay.downstream import ClientConnection
from balancer.service import ServiceFacts
from balancer.spec.settings import Settings
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import each, on_uvloop, serving


class Wire:
    """A connection that counts what it is asked, and may fail at it."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.asked = 0
        self.is_cut = False

    def _ask(self, *_: object) -> None:
        self.asked += 1
        if self.fails:
            raise RuntimeError("broken")

    flush = recognise = check_time = close_if_idle = break_off = _ask

    def abort(self) -> None:
        self.is_cut = True


class Nobody:
    """Answers no request: there is none."""

    def check(self, *_: object) -> Any:
        raise AssertionError

    serve = refuse = check


WAYS: dict[str, Callable[[Doors], object]] = {
    "what was written is sent": lambda doors: doors,
    "each takes its next step": lambda doors: [doors],
    "times are looked at": lambda doors: doors.sweep(0.0),
    "all are closed": lambda doors: doors.close(),
}


@pytest.mark.parametrize("way", **each(WAYS))
@on_uvloop
async def test_one_connections_fault_leaves_the_others_theirs(
    way: Callable[[Doors], object], caplog: pytest.LogCaptureFixture
) -> None:
    doors = Doors(Settings(), asyncio.get_running_loop(), Nobody(), ServiceFacts())
    wires = [Wire(fails) for fails in (False, True, False, True, False)]
    for wire in wires:
        doors.connections.add(wire)
        if way is WAYS["what was written is sent"]:
            doors.flush_soon(wire)
        if way is WAYS["each takes its next step"]:
            doors.soon(wire, wire.flush)
    way(doors)
    await asyncio.sleep(0)
    assert [wire.asked for wire in wires] == [1] * 5
    assert [wire.is_cut for wire in wires] == [wire.fails for wire in wires]
    assert caplog.text.count("RuntimeError: broken") == 2


ENDS: dict[str, tuple[Callable[[Connection], object], str]] = {
    "makes room": (lambda connection: connection.give_way(), "buffers_full"),
    "the balancer stops": (lambda connection: connection.break_off("it stops."), "shutting_down"),
}


@pytest.mark.parametrize("end", **each(ENDS))
@on_uvloop
async def test_a_refusal_at_once_is_logged_and_counted(end: tuple[Callable[[Connection], object], str]) -> None:
    """A request that is refused in the same round of the loop in which it came leaves its line in the log as well."""
    way, code = end
    async with LabReplica() as a, serving(a) as house:
        client = await house.client()
        await until(lambda: len(house.balancer.doors.connections) == 1)
        (connection,) = house.balancer.doors.connections
        assert isinstance(connection, ClientConnection)
        sent = request(body=chat())
        house.balancer.doors.incoming[: len(sent)] = sent
        connection.buffer_updated(len(sent))
        way(connection)
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (503, code)
        (line,) = await house.logged()
        assert (line["status"], line["error"], line["path"]) == (503, code, "/v1/chat/completions")
        await until(lambda: sum(house.balancer.tallies.errors.values()) == 1)
        assert a.seen.requests == []


class Holder(Wire):
    """A connection whose requests take memory; what is bound by an answer in progress cannot be given up."""

    def __init__(self, doors: Doors, owner: str, count: int, is_bound: bool = False) -> None:
        super().__init__(fails=False)
        self._doors = doors
        self.owner = owner
        self.count = count
        self.is_bound = is_bound
        self.is_reading_body = not is_bound
        doors.connections.add(self)
        doors.buffered += count

    def held(self) -> Iterator[tuple[str, int]]:
        yield self.owner, self.count

    def give_way(self) -> bool:
        if self.is_bound:
            return False
        self._doors.buffered -= self.count
        self.count = 0
        return True


@on_uvloop
async def test_who_gives_way_to_another_relay() -> None:
    """The largest, down to the equal part of this relay; who holds little stays, even if that is not enough."""
    doors = Doors(Settings(max_buffered_bytes=1000), asyncio.get_running_loop(), Nobody(), ServiceFacts())
    uploads = [Holder(doors, "uploads", size) for size in (100, 300, 200)]
    small = Holder(doors, "small", 100)
    doors.make_room_for_others(700)
    assert [one.count for one in (*uploads, small)] == [100, 300, 200, 100]
    doors.make_room_for_others(500)
    assert [one.count for one in (*uploads, small)] == [100, 0, 200, 100]
    bound = Holder(doors, "streams", 500, is_bound=True)
    doors.make_room_for_others(500)
    assert [one.count for one in (bound, *uploads, small)] == [500, 100, 0, 0, 100]


@on_uvloop
async def test_who_gives_way() -> None:
    """Those who hold most give way first, then the next ones, but nobody who holds less than the owner."""
    doors = Doors(Settings(max_buffered_bytes=1000), asyncio.get_running_loop(), Nobody(), ServiceFacts())
    bound = Holder(doors, "streams", 450, is_bound=True)
    uploads = [Holder(doors, "uploads", size) for size in (100, 200, 100)]
    small = Holder(doors, "small", 100)
    Holder(doors, "new", 60)
    assert doors.buffered == 1010
    assert doors.make_room("new")
    assert [one.count for one in (bound, *uploads, small)] == [450, 100, 0, 100, 100]
    doors.sweep(0.0)
    doors.buffered += 300
    assert not doors.make_room("streams"), "it holds most"
    doors.sweep(0.0)
    assert not doors.make_room("uploads"), "who holds more cannot give way, and who holds less need not"
    assert [one.count for one in (bound, *uploads, small)] == [450, 100, 0, 100, 100]
