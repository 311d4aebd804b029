"""One at a time, keys in turn, whoever is cancelled meanwhile."""

import asyncio
import random

import pytest

from balancer.routing.one_at_a_time import OneAtATime


class Room:
    """Who is in, and who has been."""

    def __init__(self) -> None:
        self.turns = OneAtATime()
        self.inside = 0
        self.been: list[str] = []

    async def visit(self, name: str) -> None:
        async with self.turns.of(name.split()[0]):
            self.inside += 1
            assert self.inside == 1
            try:
                await asyncio.sleep(0)
                self.been.append(name)
            finally:
                self.inside -= 1

    def come(self, *names: str) -> list["asyncio.Task[None]"]:
        return [asyncio.ensure_future(self.visit(name)) for name in names]


def test_keys_take_turns() -> None:
    async def play() -> None:
        room = Room()
        await asyncio.gather(*room.come("hog 1", "hog 2", "hog 3", "hog 4", "one 1", "two 1", "one 2"))
        assert room.been == ["hog 1", "hog 2", "one 1", "two 1", "hog 3", "one 2", "hog 4"]
        assert not room.turns._is_taken

    asyncio.run(play())


@pytest.mark.parametrize("seed", range(20))
def test_cancelled_visitors_hold_up_nobody(seed: int) -> None:
    async def play() -> None:
        dice = random.Random(seed)
        room = Room()
        tasks = room.come(*(f"{dice.choice('abc')} {number}" for number in range(60)))
        gone = dice.sample(tasks, 25)
        for task in gone:
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert len(room.been) == sum(not task.cancelled() for task in tasks)
        assert not room.turns._is_taken
        await room.visit("last 1")
        assert room.been[-1] == "last 1"

    asyncio.run(play())
