"""A stopwatch for what processes do, on a machine where others keep them waiting for a processor."""

import os
import time
from pathlib import Path


class Stopwatch:
    """Seconds since it was made, less those for which one of these processes, or this one, waited for its turn to run.

    The one that waited longest counts, so that the watch runs slowly on a busy machine, and never backwards.
    """

    def __init__(self, *pids: int) -> None:
        self._began = time.monotonic()
        self._waited = {pid: _waited(pid) for pid in (os.getpid(), *pids)}

    def seconds(self) -> float:
        longest = max(_waited(pid) - before for pid, before in self._waited.items())
        return time.monotonic() - self._began - max(0.0, longest)


def _waited(pid: int) -> float:
    """Seconds for which the first thread of a process waited for a processor so far; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
