"""One connection's fault is not the others'."""

import asyncio
from collections.abc import Callable
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
