"""Periodic jobs, four times a second: ending what waits too long, counting and writing what was recorded."""

import asyncio
import logging
from collections.abc import Callable, Mapping

log = logging.getLogger("groundserve")

INTERVAL = 0.25  # seconds
# A job that keeps failing is logged again after this many seconds.
SAID_AGAIN = 60.0

# Does one piece of a job; gets the loop's time in seconds and returns True if there is more to do.
Job = Callable[[float], object]


class Sweep:
    """Runs each job by itself, so that a failing job does not stop the others."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        """The keys of `jobs` are their names in the log. Jobs may be added to it and removed later."""
        self._jobs = jobs
        self._said: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            # After a pause of this process, timers run first. Read what has arrived before ending anything as silent.
            await asyncio.sleep(0)
            for name in list(self._jobs):
                await self.do(name)

    async def do(self, name: str) -> None:
        """Runs all pieces of one job, and lets other tasks run between them."""
        now = asyncio.get_running_loop().time()
        if (job := self._jobs.get(name)) is None:
            return  # it was removed meanwhile
        try:
            while job(now) is True:  # noqa: ASYNC110 - not waiting, but letting other tasks run
                await asyncio.sleep(0)
        except Exception:
            if now - self._said.get(name, -SAID_AGAIN) >= SAID_AGAIN:
                self._said[name] = now
                log.exception("the sweep of %s failed; it is tried again, and all else goes on", name)
