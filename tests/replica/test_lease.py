"""replica/lease.py: real processes, real locks."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.gpu import Gpu, list_gpus
from replica.kinds import is_of_kind
from replica.lease import LeaseError, holder, take
from replica.placement import Want

ROOT = Path(__file__).resolve().parents[2]

# Leases as python -m replica does, becomes another program by exec, as it does, and tells what it holds.
HOLD = """
import os, sys
from pathlib import Path
from replica import gpu, lease, placement
there, count, wait = gpu.list_gpus(os.environ), int(sys.argv[2]), float(sys.argv[3])
held = lease.take(there, placement.Want(count), Path(sys.argv[1]), wait=wait, note="a test")
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


def test_surplus_replica_is_told_the_holders(holders: Holders) -> None:
    """A surplus replica is told how many GPUs there are and who holds them."""
    process, _ = holders.start(1)
    with pytest.raises(LeaseError) as refusal:
        take(gpus(1), Want(1), holders.directory, wait=0, note="surplus")
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
    take(gpus(1), Want(1), holders.directory, wait=0, note="next").release()


def test_a_replica_that_waits_gets_the_gpu_when_its_holder_dies(holders: Holders) -> None:
    first, _ = holders.start(1)
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        first.kill()
        first.wait()

    held = take(gpus(1), Want(1), holders.directory, wait=60, note="patient", pause=pause)
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
        take(gpus(1), Want(1), holders.directory, wait=30, note="patient", clock=lambda: now, pause=pause)
    assert 30 <= now < 31


def test_groups_are_aligned(holders: Holders) -> None:
    assert holders.start(5, count=2)[1] == "0,1"
    assert holders.start(5, count=2)[1] == "2,3"
    with pytest.raises(LeaseError, match="no aligned group of 2 GPUs free"):
        take(gpus(5), Want(2), holders.directory, wait=0, note="third")


def test_a_group_is_leased_whole_or_not_at_all(holders: Holders) -> None:
    single = take(gpus(4)[1:2], Want(1), holders.directory, wait=0, note="in the way")
    assert holders.start(4, count=2)[1] == "2,3"
    with pytest.raises(LeaseError):
        take(gpus(2), Want(2), holders.directory, wait=0, note="second")
    assert holder(gpus(4)[0], holders.directory) is None  # nothing kept of the group that was not whole
    single.release()


def test_children_that_close_descriptors(holders: Holders) -> None:
    """Children that close inherited descriptors do not keep the lease."""
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
        take(there, Want(count), tmp_path, wait=3600, note="greedy")


def test_the_directory_and_the_locks_are_open_to_other_users(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "leases"
    before = os.umask(0o077)
    try:
        held = take(gpus(1), Want(1), directory, wait=0, note="mine")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o7777 == 0o1777
    assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o666]
    held.release()


def test_lease_dir_that_cannot_be_made(tmp_path: Path) -> None:
    """A lease directory that cannot be created is an error that names LEASE_DIR."""
    (tmp_path / "file").touch()
    with pytest.raises(LeaseError, match="set LEASE_DIR"):
        take(gpus(1), Want(1), tmp_path / "file" / "leases", wait=0, note="x")


def test_a_removed_lock_file_keeps_nobody_from_leasing(tmp_path: Path) -> None:
    held = take(gpus(1), Want(1), tmp_path, wait=0, note="first")
    held.release()
    (tmp_path / "GPU-pretended-0.lock").unlink()
    assert holder(gpus(1)[0], tmp_path) is None
    take(gpus(1), Want(1), tmp_path, wait=0, note="second").release()


def l4(index: int, *, free: int = 23000, problem: str = "") -> Gpu:
    return Gpu(index, f"GPU-{index}", "NVIDIA L4", 23034, 23034 - free, problem=problem)


def taken(there: list[Gpu], want: Want, directory: Path, **more: float) -> list[int]:
    """The indices that a lease is given; it ends at once."""
    held = take(there, want, directory, wait=0, note="a test", now=lambda: more.get("now", 0.0))
    held.release()
    return [gpu.index for gpu in held.gpus]


def test_a_gpu_that_has_failed_is_not_leased(tmp_path: Path) -> None:
    assert taken([l4(0, problem="GPU requires reset"), l4(1)], Want(1), tmp_path) == [1]


def test_a_refusal_names_the_gpus_that_have_failed(tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match=r"GPU 0 \(GPU requires reset\) cannot be used"):
        taken([l4(0, problem="GPU requires reset")], Want(1), tmp_path)


def test_pair_of_remaining_gpus(tmp_path: Path) -> None:
    """If failed GPUs break up every pair, a pair is made of the remaining ones."""
    there = [l4(0), l4(1, problem="lost"), l4(2, problem="lost"), l4(3)]
    assert taken(there, Want(2), tmp_path) == [0, 3]


def test_free_memory_comes_first(tmp_path: Path) -> None:
    """A GPU with enough free memory is preferred over one that other programs fill."""
    assert taken([l4(0, free=2000), l4(1)], Want(1, gib=18), tmp_path) == [1]
    assert taken([l4(0, free=2000), l4(1)], Want(1), tmp_path) == [1]  # nobody knows how much it takes
    assert taken([l4(0, free=12000), l4(1)], Want(1, gib=10), tmp_path) == [0]


def test_wanted_kind(tmp_path: Path) -> None:
    """Only GPUs of the wanted kind are leased if there are any."""
    a100 = Gpu(0, "GPU-a", "NVIDIA A100-SXM4-80GB", 81920, 0)
    assert taken([a100, l4(1)], Want(1, kinds=("L4",)), tmp_path) == [1]
    held = take([a100, l4(1)], Want(1, kinds=("L4",)), tmp_path, wait=0, note="first")
    with pytest.raises(LeaseError, match="no GPU free of kind L4"):
        taken([a100, l4(1)], Want(1, kinds=("L4",)), tmp_path)
    held.release()
    assert taken([a100], Want(1, kinds=("L4",)), tmp_path) == [0]  # there is none, so any will do


def test_gpus_of_one_kind_go_together(tmp_path: Path) -> None:
    a100 = Gpu(0, "GPU-a", "NVIDIA A100-SXM4-80GB", 81920, 0)
    assert taken([a100, l4(1), l4(2), l4(3)], Want(2), tmp_path) == [2, 3]


def test_a_gpu_on_which_a_start_failed_is_tried_last(tmp_path: Path) -> None:
    there = [l4(0), l4(1)]
    assert taken(there, Want(1), tmp_path, now=1000.0) == [0]
    assert taken(there, Want(1), tmp_path, now=1010.0) == [1]  # the lease of GPU 0 was over within seconds
    assert taken(there, Want(1), tmp_path, now=1020.0) == [0]  # both failed, and GPU 0 earlier
    assert taken(there, Want(1), tmp_path, now=1020.0 + 7200) == [0]


def test_a_long_life_is_no_failure(tmp_path: Path) -> None:
    there = [l4(0), l4(1)]
    assert taken(there, Want(1), tmp_path, now=1000.0) == [0]
    assert taken(there, Want(1), tmp_path, now=2000.0) == [0]


def test_a_link_in_the_lease_folder_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "somebody's file"
    victim.write_text("precious")
    leases = tmp_path / "leases"
    leases.mkdir(mode=0o1777)
    (leases / "GPU-pretended-0.lock").symlink_to(victim)
    with pytest.raises(LeaseError, match="cannot open the lease"):
        taken(gpus(1), Want(1), leases)
    (leases / "GPU-pretended-0.lock").unlink()
    (leases / "GPU-pretended-0.lock").hardlink_to(victim)
    with pytest.raises(LeaseError, match="cannot open the lease"):
        taken(gpus(1), Want(1), leases)
    assert victim.read_text() == "precious"


def test_a_pipe_in_the_lease_folder_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "GPU-pretended-0.lock")
    with pytest.raises(LeaseError, match="cannot open the lease"):
        taken(gpus(1), Want(1), tmp_path)
    assert "unknown" in (holder(gpus(1)[0], tmp_path) or "")


def test_unsafe_lease_folder(tmp_path: Path) -> None:
    """A lease folder that is a link, or in which others can remove locks, is refused."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LeaseError, match="it is no folder, or a link to one"):
        taken(gpus(1), Want(1), tmp_path / "link")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(LeaseError, match="others may remove what lies in it"):
        taken(gpus(1), Want(1), tmp_path / "open")


@pytest.mark.parametrize("written", [b"", b"[1]", b"{", b"\xff\xfe", b'{"note": 1}', b"9" * 5000])
def test_what_others_wrote_into_a_lock_does_no_harm(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "GPU-pretended-0.lock").write_bytes(written)
    assert taken(gpus(1), Want(1), tmp_path) == [0]


@pytest.mark.parametrize(
    ("name", "kind", "is_one"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", True),
        ("NVIDIA A100-SXM4-40GB", "A100-80GB", False),
        ("NVIDIA GeForce RTX 4090", "RTX4090", True),
        ("NVIDIA RTX A6000", "RTXA6000", True),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada", True),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA A10G", "A10", False),
        ("NVIDIA GH200 480GB", "H200", False),
        ("Tesla T4", "t4", True),
    ],
)
def test_kinds_are_skypilots_names(name: str, kind: str, is_one: bool) -> None:
    assert is_of_kind(name, kind) is is_one


def test_those_who_only_ask_who_holds_it_keep_nobody_out(tmp_path: Path) -> None:
    gpu = gpus(1)
    take(gpu, Want(1), tmp_path, wait=0, note="before").release()
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            holder(gpu[0], tmp_path)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(300):
            take(gpu, Want(1), tmp_path, wait=0, note="mine").release()
    finally:
        is_over.set()
        asking.join()
