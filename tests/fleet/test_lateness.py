"""A wait that is cut short because the loop itself stood still is no wait."""

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
import uvloop

from balancer.fleet.lateness import Lateness

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture(params=LOOPS.values(), ids=LOOPS)
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    make: Callable[[], asyncio.AbstractEventLoop] = request.param
    return asyncio.Runner(loop_factory=make)


def watched() -> tuple[Lateness, list[float]]:
    seen: list[float] = []
    lateness = Lateness(asyncio.get_running_loop(), seen.append)
    lateness.start()
    return lateness, seen


def test_a_wait_ends_in_its_time_where_the_loop_works(runner: asyncio.Runner) -> None:
    async def play() -> None:
        lateness, _ = watched()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with lateness.within(0.3):
                await asyncio.sleep(10)
        assert 0.29 < time.monotonic() - began < 2
        lateness.stop()

    with runner:
        runner.run(play())


def test_what_came_while_the_loop_stood_still_came_in_time(runner: asyncio.Runner) -> None:
    async def play() -> None:
        lateness, _ = watched()
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)

            def stand_still() -> None:
                theirs.send(b"!")
                time.sleep(0.5)

            loop.call_later(0.01, stand_still)
            async with lateness.within(0.2):
                assert await loop.sock_recv(ours, 1) == b"!"
        lateness.stop()

    with runner:
        runner.run(play())


def test_a_wait_begun_late_in_a_long_callback_is_as_long_as_any(runner: asyncio.Runner) -> None:
    async def play() -> None:
        lateness, _ = watched()
        await asyncio.sleep(0.15)
        time.sleep(0.5)  # noqa: ASYNC251
        async with lateness.within(0.3):
            await asyncio.sleep(0.1)
        lateness.stop()

    with runner:
        runner.run(play())


def test_lateness_is_told_and_added_up(runner: asyncio.Runner) -> None:
    async def play() -> None:
        lateness, seen = watched()
        await asyncio.sleep(0.25)
        before = lateness.total
        time.sleep(0.4)  # noqa: ASYNC251
        await asyncio.sleep(0.01)
        assert 0.2 < lateness.total - before < 2
        assert max(seen) > 0.2
        lateness.stop()

    with runner:
        runner.run(play())
