"""Memory and cores that new processes may use: the machine's, or less if our cgroup or one above it limits them."""

import os
from collections.abc import Iterator
from pathlib import Path

# The files with a cgroup's limits and usage, and the field of memory.stat for reclaimable cache; version 2, then 1.
_MEMORY = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


def memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory in bytes: the minimum over the machine and all limits."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder in _folders(proc, cgroup, "memory"):
        for limits, used, cache in _MEMORY:
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                spent = int((folder / used).read_text()) - int(stat[cache])
            except (OSError, KeyError, ValueError):
                continue  # the other version of cgroups, or no memory limits here
            for name in limits:
                if limit := _numbers(folder / name):
                    free = min(free, limit[0] - spent)
    return max(free, 0)


def cores(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """The number of cores that this process may run on, or the number that a quota grants if that is lower."""
    found = float(len(os.sched_getaffinity(0)))
    for folder in _folders(proc, cgroup, "cpu"):
        granted = _numbers(folder / "cpu.max")  # quota and period
        if not granted:
            granted = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(granted) == 2 and min(granted) > 0:
            found = min(found, granted[0] / granted[1])
    return found


def _numbers(file: Path) -> list[int]:
    """The numbers in the file; none if it does not exist or says `max`, which means no limit."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _folders(proc: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """Our cgroup and those above it, as far as they are visible: a container sees its own as the root."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    new, old = ["/"], ["/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            new.append(path)
        elif controller in controllers.split(","):
            old.append(path)
    for root, paths in ((cgroup, new), (cgroup / "unified", new), (cgroup / controller, old)):
        inner = {part for path in paths for part in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents)}
        yield from (root / part for part in inner if ".." not in part.parts and (root / part).is_dir())
