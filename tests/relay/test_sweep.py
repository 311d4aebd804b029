"""What is done beside the requests: each job by itself, in pieces, and told of when it fails."""

import asyncio
import logging

import pytest

from balancer.relay.sweep import INTERVAL, SAID_AGAIN, Sweep


def test_a_job_that_fails_keeps_no_other_from_being_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail(_: float) -> None:
        done.append("fails")
        raise RuntimeError("no")

    async def play() -> None:
        sweep = Sweep({"what fails": fail, "what works": lambda _: done.append("works")})
        task = asyncio.create_task(sweep.run())
        async with asyncio.timeout(10):
            while done.count("works") < 3:  # noqa: ASYNC110 - nobody is told of each
                await asyncio.sleep(INTERVAL / 5)
        task.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert done.count("fails") >= 3
    assert [record.getMessage() for record in caplog.records] == [
        "the sweep of what fails failed; it is tried again, and all else goes on"
    ], f"said once in {SAID_AGAIN} s"


def test_others_have_their_turn_between_two_pieces_of_a_job() -> None:
    order: list[str] = []

    def piece(_: float) -> bool:
        order.append("piece")
        return order.count("piece") < 3

    async def play() -> None:
        task = asyncio.create_task(Sweep({"a job": piece}).do("a job"))
        for _ in range(3):
            await asyncio.sleep(0)
            order.append("other")
        await task

    asyncio.run(play())
    assert order == ["piece", "other"] * 3
