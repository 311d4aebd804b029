"""replica/lease.py: real processes, real locks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.gpu import Gpu, list_gpus
from replica.lease import LeaseError, holder, take

ROOT = Path(__file__).resolve().parents[2]

# Leases as python -m replica does, becomes another program by exec, as it does, and tells what it holds.
HOLD = """
import os, sys
from pathlib import Path
from replica import gpu, lease
there, count, wait = gpu.list_gpus(os.environ), int(sys.argv[2]), float(sys.argv[3])
held = lease.take(there, count, Path(sys.argv[1]), wait=wait, note="a test")
told = ",".join(str(one.index) for one in held.gpus)
os.execv("/bin/sh", ["sh", "-c", sys.argv[4], "sh", told])
"""
BE_HELD = 'echo "$1"; exec sleep 60'


def gpus(count: int) -> list[Gpu]:
    return list_gpus({"REPLICA_PRETEND_GPUS": str(count)})


class Holders:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, there: int, count: int = 1, wait: float = 0, then: str = BE_HELD
    ) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(self.directory), str(count), str(wait), then],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "REPLICA_PRETEND_GPUS": str(there)},
        )
        self.processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    started = Holders(tmp_path / "leases")
    yield started
    started.stop()


def test_each_replica_gets_a_gpu_of_its_own(holders: Holders) -> None:
    assert [holders.start(3)[1] for _ in range(3)] == ["0", "1", "2"]


def test_a_surplus_replica_is_told_how_many_there_are_and_who_holds_them(holders: Holders) -> None:
    process, _ = holders.start(1)
    with pytest.raises(LeaseError) as refusal:
        take(gpus(1), 1, holders.directory, wait=0, note="surplus")
    said = str(refusal.value)
    assert "no GPU free among this machine's 1 after 0 s" in said
    assert f"GPU 0: a test (process {process.pid} on {os.uname().nodename}, since " in said
    assert "\n" not in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lease_ends_with_its_holder_however_it_dies(holders: Holders, how: signal.Signals) -> None:
    process, _ = holders.start(1)
    assert holder(gpus(1)[0], holders.directory) is not None
    process.send_signal(how)
    process.wait()
    assert holder(gpus(1)[0], holders.directory) is None
    take(gpus(1), 1, holders.directory, wait=0, note="next").release()


def test_a_replica_that_waits_gets_the_gpu_when_its_holder_dies(holders: Holders) -> None:
    first, _ = holders.start(1)
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        first.kill()
        first.wait()

    held = take(gpus(1), 1, holders.directory, wait=60, note="patient", pause=pause)
    assert len(waits) == 1
    assert held.gpus == tuple(gpus(1))
    held.release()


def test_the_wait_ends_after_lease_wait(holders: Holders) -> None:
    holders.start(1)
    now = 0.0

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.raises(LeaseError, match="after 30 s"):
        take(gpus(1), 1, holders.directory, wait=30, note="patient", clock=lambda: now, pause=pause)
    assert 30 <= now < 31


def test_groups_are_aligned(holders: Holders) -> None:
    assert holders.start(5, count=2)[1] == "0,1"
    assert holders.start(5, count=2)[1] == "2,3"
    with pytest.raises(LeaseError, match="no aligned group of 2 GPUs free"):
        take(gpus(5), 2, holders.directory, wait=0, note="third")


def test_a_group_is_leased_whole_or_not_at_all(holders: Holders) -> None:
    single = take(gpus(4)[1:2], 1, holders.directory, wait=0, note="in the way")
    assert holders.start(4, count=2)[1] == "2,3"
    with pytest.raises(LeaseError):
        take(gpus(2), 2, holders.directory, wait=0, note="second")
    assert holder(gpus(4)[0], holders.directory) is None  # nothing kept of the group that was not whole
    single.release()


def test_children_that_close_what_they_inherit_do_not_keep_the_lease(holders: Holders) -> None:
    # As Python's subprocess and multiprocessing do, with which SGLang starts its children.
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    process, pid = holders.start(1, then=f'exec {sys.executable} -c "{child}"')
    try:
        process.kill()
        process.wait()
        os.kill(int(pid), 0)  # the child lives
        assert holder(gpus(1)[0], holders.directory) is None
    finally:
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    ("there", "count", "says"),
    [
        ([], 1, "0 NVIDIA GPUs can be leased here, but this replica needs 1: check nvidia-smi"),
        (gpus(2), 4, "2 NVIDIA GPUs can be leased here, but this replica needs 4: lower --gpus"),
        ([Gpu(0, "GPU-a", "H200", 1, 0, mig=True)], 1, "1 more are split by MIG"),
    ],
)
def test_more_gpus_than_there_are_is_refused_at_once(tmp_path: Path, there: list[Gpu], count: int, says: str) -> None:
    with pytest.raises(LeaseError, match=says):
        take(there, count, tmp_path, wait=3600, note="greedy")


def test_the_directory_and_the_locks_are_open_to_other_users(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "leases"
    before = os.umask(0o077)
    try:
        held = take(gpus(1), 1, directory, wait=0, note="mine")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o7777 == 0o1777
    assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o666]
    held.release()


def test_a_directory_that_cannot_be_made_is_an_error_that_names_lease_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LeaseError, match="set LEASE_DIR"):
        take(gpus(1), 1, tmp_path / "file" / "leases", wait=0, note="x")


def test_a_removed_lock_file_keeps_nobody_from_leasing(tmp_path: Path) -> None:
    held = take(gpus(1), 1, tmp_path, wait=0, note="first")
    held.release()
    (tmp_path / "GPU-pretended-0.lock").unlink()
    assert holder(gpus(1)[0], tmp_path) is None
    take(gpus(1), 1, tmp_path, wait=0, note="second").release()
