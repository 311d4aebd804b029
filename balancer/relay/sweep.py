"""Beside the requests, four times a second: what waits too long is ended, what was noted is counted and written."""

import asyncio
import logging
from collections.abc import Callable, Mapping

log = logging.getLogger("groundserve")

INTERVAL = 0.25  # seconds
# A job that goes on failing is logged again after so many seconds.
SAID_AGAIN = 60.0

# One piece of what is to be done at a loop time; True: there is more.
Job = Callable[[float], object]


class Sweep:
    """Does each job by itself: one that fails keeps no other from being done."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        """`jobs` are named as the log is to name them; some may be added later, and go."""
        self._jobs = jobs
        self._said: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            # What has come meanwhile is read before anybody is judged for his silence: after a pause of this process
            # timers come first.
            await asyncio.sleep(0)
            for name in list(self._jobs):
                await self.do(name)

    async def do(self, name: str) -> None:
        """All pieces of one job, with everybody else's turn in between."""
        now = asyncio.get_running_loop().time()
        if (job := self._jobs.get(name)) is None:
            return  # it was taken off meanwhile
        try:
            while job(now) is True:  # noqa: ASYNC110 - not waiting: letting others have their turn
                await asyncio.sleep(0)
        except Exception:
            if now - self._said.get(name, -SAID_AGAIN) >= SAID_AGAIN:
                self._said[name] = now
                log.exception("the sweep of %s failed; it is tried again, and all else goes on", name)
