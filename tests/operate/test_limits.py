"""engines/limits.py: what a slice, a job or a container grants counts, wherever above us it is set."""

import os
from pathlib import Path

import pytest

from balancer.operate.engines import limits

GIB = 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Of a machine with 16 GiB free, on which we are in a slice's scope."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(
        "5:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/user.slice/a.scope\n"
    )
    return tmp_path / "proc"


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_limits_it_is_the_kernels_own_estimate(proc: Path, tmp_path: Path) -> None:
    assert limits.memory(proc, tmp_path / "cgroup") == 16 * GIB
    written(tmp_path / "cgroup/user.slice", memory__max="max", memory__current="5", memory__stat="inactive_file 0")
    assert limits.memory(proc, tmp_path / "cgroup") == 16 * GIB


def test_memory_is_the_least_that_any_limit_leaves(proc: Path, tmp_path: Path) -> None:
    root, used = tmp_path / "cgroup", {"memory__current": str(2 * GIB), "memory__stat": f"inactive_file {GIB}"}
    written(root / "user.slice", memory__max=str(6 * GIB), **used)
    written(root / "user.slice/a.scope", memory__max="max", **used)
    assert limits.memory(proc, root) == 5 * GIB
    written(root / "user.slice/a.scope", memory__high=str(4 * GIB))
    assert limits.memory(proc, root) == 3 * GIB
    older = {"memory__usage_in_bytes": str(3 * GIB), "memory__stat": "total_inactive_file 0"}
    written(root / "memory/slurm", memory__limit_in_bytes=str(2 * GIB), **older)
    assert limits.memory(proc, root) == 0


def test_cores(proc: Path, tmp_path: Path) -> None:
    """The cores are those that this process may run on, or the share that it is granted."""
    root, ours = tmp_path / "cgroup", len(os.sched_getaffinity(0))
    written(root / "user.slice/a.scope", cpu__max="max 100000")
    written(root / "cpu/slurm", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert limits.cores(proc, root) == ours
    written(root / "user.slice", cpu__max="50000 100000")
    assert limits.cores(proc, root) == 0.5
    written(root / "cpu/slurm", cpu__cfs_quota_us="25000", cpu__cfs_period_us="100000")
    assert limits.cores(proc, root) == 0.25


def test_this_machine_has_some() -> None:
    assert limits.memory() > 0
    assert limits.cores() > 0
