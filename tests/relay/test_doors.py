"""One connection's fault is not the others'."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.relay.doors import Doors
from balancer.service import ServiceFacts
from balancer.spec.settings import Settings
from tests.wire.running import each, on_uvloop


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
