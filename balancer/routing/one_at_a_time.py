"""A lock for one request at a time; keys take turns at it, so that a key with many requests delays no other."""

import asyncio
from collections.abc import Hashable
from types import TracebackType

from balancer.routing.fair_queue import FairQueue


class OneAtATime:
    """`async with one_at_a_time.of(key):` waits for the key's turn and ends it."""

    def __init__(self) -> None:
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._is_taken = False

    def of(self, key: Hashable) -> "_Turn":
        return _Turn(self, key)

    async def take(self, key: Hashable) -> None:
        """Returns when it is the key's turn. The caller must end the turn."""
        if not self._is_taken:
            self._is_taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.push(turn, key)
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.remove(turn)
            if not turn.cancelled():
                self.end()  # it was given while the request was being cancelled
            raise

    def end(self) -> None:
        """Ends the turn; the next request in the queue gets it."""
        while (turn := self._queue.first()) is not None:
            self._queue.take(turn)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False


class _Turn:
    __slots__ = ("_key", "_turns")

    def __init__(self, turns: OneAtATime, key: Hashable) -> None:
        self._turns = turns
        self._key = key

    async def __aenter__(self) -> None:
        await self._turns.take(self._key)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.end()
