"""How late the event loop is: a timeout must only count time in which the loop could have seen an answer.

After a pause of the whole process (SIGSTOP, a throttled container, one heavy callback), all timers are due at once and
run before anything is read. Also, uvloop's clock stands still during a callback, so a timer that is set in a long one
is due as soon as it ends.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

TICK = 0.1  # seconds between two readings of the clock
LATE = 0.02  # seconds; less than that is ignored

# Makes a block that ends with TimeoutError after that many seconds, like asyncio.timeout.
Within = Callable[[float], AbstractAsyncContextManager[object]]


class Lateness:
    """Reads the loop's clock ten times a second, and each time calls `note` with the seconds that it was late."""

    def __init__(self, loop: asyncio.AbstractEventLoop, note: Callable[[float], None]) -> None:
        self._loop = loop
        self._note = note
        self._sum = 0.0
        self._due = loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = self._loop.time() + TICK
        self._timer = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        late = max(0.0, self._loop.time() - self._due)
        self._note(late)
        if late > LATE:
            self._sum += late
        self.start()

    @property
    def total(self) -> float:
        """Seconds in which the loop could not run, in total, up to this moment."""
        late = self._loop.time() - self._due
        return self._sum + (late if late > LATE else 0.0)

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Ends the block with TimeoutError after that many seconds in which the loop could run."""
        async with asyncio.timeout(None) as block:
            timers: list[asyncio.TimerHandle] = []

            def wait(seconds: float) -> None:
                timers[:] = [self._loop.call_later(seconds, look, self.total, seconds)]

            def look(total: float, waited: float) -> None:
                missed = min(self.total - total, waited)
                if missed > 0:
                    wait(missed)
                else:
                    block.reschedule(self._loop.time())

            wait(seconds)
            try:
                yield
            finally:
                timers[0].cancel()
