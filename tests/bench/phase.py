"""The part of a load that counts: its wall time, and the CPU time of what is under test."""

import asyncio
import contextlib
import time
from dataclasses import dataclass

from tests.bench import process_tree

PATIENCE = 20.0  # seconds that answers may be late before the load is given up


@dataclass(frozen=True)
class Phase:
    """`seconds` long; `pid` is the root of the process tree under test, None when there is nothing to test."""

    seconds: float
    pid: int | None = None

    async def run(self, heard: asyncio.Event | None = None) -> dict[str, object]:
        """Goes on beyond its seconds until something is `heard`: a busy machine may answer nothing in a short phase."""
        own, before, start = time.process_time(), self._cpu(), time.monotonic()
        await asyncio.sleep(self.seconds)
        if heard:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), PATIENCE)
        own, after, end = time.process_time() - own, self._cpu(), time.monotonic()
        return {
            "start": start,
            "end": end,
            "cpu_seconds": None if self.pid is None else after - before,
            "generator_busy": own / (end - start),
        }

    def _cpu(self) -> float:
        return 0.0 if self.pid is None else process_tree.cpu_seconds(self.pid)
