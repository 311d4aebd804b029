"""What a process and all its descendants have used: CPU time and memory, from /proc."""

import os
import time
from pathlib import Path

PROC = Path("/proc")
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (the second may hold spaces and brackets): proc_pid_stat(5)."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def members(pid: int) -> list[int]:
    """The process and its descendants that are alive; ProcessLookupError when the process itself is gone."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            try:
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    if not (PROC / str(pid)).exists():
        raise ProcessLookupError(f"process {pid} is gone")
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads, of the descendants, and of children that ended and were waited for."""
    seconds = 0.0
    for member in members(pid):
        try:
            # The kernel's clock of that process, in nanoseconds: /proc counts in ticks of ten milliseconds. Its number
            # is made as clock_getcpuclockid(3) makes it.
            seconds += time.clock_gettime(~member << 3 | 2)
            seconds += sum(map(int, _stat(member)[13:15])) / TICKS_A_SECOND  # cutime, cstime
        except OSError:
            continue
    return seconds


def memory_bytes(pid: int) -> int:
    """Resident memory: each process's own pages, and once the largest set that one of them shares.

    The sum of RSS would count again and again what forked workers share, and PSS would give a part of our pages
    to strangers that run the same Python.
    """
    private, shared = 0, [0]
    for member in members(pid):
        try:
            rollup = (PROC / str(member) / "smaps_rollup").read_text()
        except OSError:
            continue
        kib = {(words := line.split())[0]: int(words[1]) for line in rollup.splitlines()[1:]}
        own = kib["Private_Clean:"] + kib["Private_Dirty:"]
        private += own
        shared.append(kib["Rss:"] - own)
    return (private + max(shared)) * 1024
