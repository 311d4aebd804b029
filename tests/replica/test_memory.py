"""replica/memory.py: the least of all limits that the kernel would hold this process to."""

from pathlib import Path

import pytest

from replica.memory import available_gib


def limit(folder: Path, gib: float | None, used: float = 0.0, name: str = "memory.max") -> None:
    """Limits a cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("max\n" if gib is None else f"{int(gib * 2**30)}\n")
    (folder / "memory.current").write_text(f"{int(used * 2**30)}\n")
    (folder / "memory.stat").write_text("anon 5\ninactive_file 0\n")


def older(folder: Path, gib: float, used: float = 0.0) -> None:
    """Limits one of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{int(gib * 2**30)}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{int(used * 2**30)}\n")
    (folder / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 0\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Of a machine with 16 GiB free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    return tmp_path / "proc"


def test_container_limit(tmp_path: Path) -> None:
    """A container's limit counts, and cache that can be dropped is not counted as used."""
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    assert available_gib(tmp_path, tmp_path) == 16
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**30}\n")
    assert available_gib(tmp_path, tmp_path) == 16
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert available_gib(tmp_path, tmp_path) == 2


def test_so_does_one_of_the_older_cgroups(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (old / "memory.usage_in_bytes").write_text(f"{3 * 2**30}\n")
    (old / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {2**30}\n")
    assert available_gib(tmp_path, tmp_path) == 16
    (old / "memory.limit_in_bytes").write_text(f"{4 * 2**30}\n")
    assert available_gib(tmp_path, tmp_path) == 2


def test_lowest_limit_counts(proc: Path, tmp_path: Path) -> None:
    """The lowest limit of the process's own cgroup and its parents counts."""
    root = tmp_path / "cgroup"
    job = root / "user.slice/user-1000.slice/session-1.scope"
    (proc / "self/cgroup").write_text("0::/user.slice/user-1000.slice/session-1.scope\n")
    limit(job, None, used=1)
    assert available_gib(proc, root) == 16
    limit(root / "user.slice", 12, used=2)
    assert available_gib(proc, root) == 10
    limit(job, 8, used=1)
    assert available_gib(proc, root) == 7
    limit(job.parent, 5, used=1.5)
    assert available_gib(proc, root) == 3.5
    limit(root / "other.slice", 1)
    assert available_gib(proc, root) == 3.5


def test_what_slows_a_process_down_is_a_limit_too(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/job\n")
    limit(tmp_path / "cgroup/job", 8)
    limit(tmp_path / "cgroup/job", 4, name="memory.high")
    assert available_gib(proc, tmp_path / "cgroup") == 4


def test_the_older_version_nests_as_well(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    (proc / "self/cgroup").write_text("12:cpu,cpuacct:/x\n4:memory:/slurm/uid_1/job_7\n0::/\n")
    older(root / "memory/slurm/uid_1/job_7", 2**33)
    older(root / "memory/slurm/uid_1", 6, used=1)
    assert available_gib(proc, root) == 5


@pytest.mark.parametrize("path", ["/docker/abc", "/../../docker/abc", "/"])
def test_a_container_that_sees_its_own_cgroup_as_the_root(proc: Path, tmp_path: Path, path: str) -> None:
    (proc / "self/cgroup").write_text(f"4:memory:{path}\n0::{path}\n")
    limit(tmp_path / "new", 3)
    assert available_gib(proc, tmp_path / "new") == 3
    older(tmp_path / "old/memory", 2)
    assert available_gib(proc, tmp_path / "old") == 2


def test_more_used_than_allowed_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    limit(tmp_path / "cgroup", 1, used=2)
    assert available_gib(proc, tmp_path / "cgroup") == 0


def test_this_machine_has_some() -> None:
    assert 0 < available_gib() < 2**20
