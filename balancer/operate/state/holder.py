"""The process that runs a service, identified so that no other process is ever mistaken for it."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Holder:
    """A process id identifies a process only together with its host and start time: several hosts may share the disk
    that the folder is on, and process ids are reused.
    """

    pid: int
    # In clock ticks since boot, as in /proc.
    started: int
    boot: str
    host: str
    # When it took the service, in seconds since the epoch.
    since: float

    @classmethod
    def ours(cls) -> Self:
        """This process, as the holder from now on."""
        pid = os.getpid()
        return cls(pid, _started(pid) or 0, _boot(), socket.gethostname(), time.time())

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """None if the text was not written by `to_text`."""
        try:
            said = json.loads(text)
            return cls(int(said["pid"]), int(said["started"]), str(said["boot"]), said["host"], float(said["since"]))
        except (ValueError, TypeError, LookupError):
            return None

    def to_text(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @property
    def is_here(self) -> bool:
        """Is it alive and visible from here: on this host, and not hidden in a container?"""
        return self.boot == _boot() and self.started == _started(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Signals this process and never another one. Raises PermissionError if it belongs to another user."""
        with contextlib.suppress(ProcessLookupError):
            # From here on the descriptor refers to one process, even if the process id is reused.
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_here:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


@lru_cache(maxsize=1)
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """The start time of a process; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The start time is field 22. Field 2, the program's name in parentheses, may contain spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])
