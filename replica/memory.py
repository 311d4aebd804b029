"""Memory that this process may still use: the machine's, or less if its cgroup or a parent cgroup limits it."""

from collections.abc import Iterator
from pathlib import Path

# A cgroup's files for limits and usage, and the memory.stat field for droppable cache: version 2, then version 1.
_LAYOUTS = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


def available_gib(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """In GiB. Systemd slices, Slurm jobs and containers limit everything inside them: the lowest limit counts."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder in _folders(proc, cgroup):
        for limits, used, cache in _LAYOUTS:
            try:
                stat = (folder / "memory.stat").read_text()
                dropped = int(dict(line.split() for line in stat.splitlines())[cache])
                spent = int((folder / used).read_text()) - dropped
            except (OSError, KeyError, ValueError):
                continue  # the other cgroup version, or no memory limits here
            available = min([available, *(limit - spent for limit in _read(folder, limits))])
    return max(available, 0) / 2**30


def _read(folder: Path, names: tuple[str, ...]) -> Iterator[int]:
    for name in names:
        try:
            yield int((folder / name).read_text())
        except (OSError, ValueError):
            continue  # "max": no limit


def _folders(proc: Path, cgroup: Path) -> Iterator[Path]:
    """This process's cgroups and their parents, as far as visible: a container sees its own cgroup as the root."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    places = {"": ["/"], "memory": ["/"]}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            places["memory" if controllers else ""].append(path)
    for root, paths in ((cgroup, places[""]), (cgroup / "unified", places[""]), (cgroup / "memory", places["memory"])):
        seen = set()
        for path in paths:
            inner = Path(path.lstrip("/"))
            seen |= {inner, *inner.parents}
        yield from (root / inner for inner in seen if ".." not in inner.parts and (root / inner).is_dir())
