"""replica/turn.py and shared leases: real processes, real locks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from replica.gpu import Gpu, list_gpus
from replica.lease import AllHeldError, LeaseError, holder, sharers, take
from replica.placement import Want
from replica.turn import HELD, MOST_TENANTS, TooManyTenantsError, Turn, neighbours

ROOT = Path(__file__).resolve().parents[2]

# Joins as python -m replica does, becomes another program by exec, and from then on does what it is told line by line.
TENANT = """
import os, sys
from pathlib import Path
from replica import gpu, lease, placement
there = gpu.list_gpus(os.environ)
held = lease.take(there, placement.Want(int(sys.argv[2])), Path(sys.argv[1]), wait=30, note=sys.argv[3], is_shared=True)
os.execve(sys.executable, [sys.executable, "-c", sys.argv[4]], {**os.environ, **held.turn.environ()})
"""
LIVES = """
import os, sys, time
from replica.turn import Turn
turn = Turn.inherit(os.environ)
turn.say(time.time(), state="AWAKE")
print("awake", flush=True)
for line in sys.stdin:
    if line == "give up\\n":
        turn.give_up()
        turn.say(time.time(), state="DOZING")
    while line == "wake\\n" and not turn.take(time.time()):
        time.sleep(0.01)
    print("done", flush=True)
"""


class TenantProcess:
    def __init__(self, directory: Path, note: str, there: int = 1, count: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TENANT, str(directory), str(count), note, LIVES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "REPLICA_PRETEND_GPUS": str(there)},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout

    def is_awake(self) -> bool:
        return self.stdout.readline() == "awake\n"

    def begin(self, what: str) -> None:
        self.stdin.write(f"{what}\n")
        self.stdin.flush()

    def do(self, what: str) -> None:
        self.begin(what)
        assert self.stdout.readline() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "leases"


@pytest.fixture
def started(directory: Path) -> Iterator[list[TenantProcess]]:
    assert not directory.exists()
    processes: list[TenantProcess] = []
    yield processes
    for process in processes:
        process.end()


def gpus(count: int) -> list[Gpu]:
    return list_gpus({"REPLICA_PRETEND_GPUS": str(count)})


def test_starts_in_turn(directory: Path, started: list[TenantProcess]) -> None:
    """Tenants start one after another and keep strangers out while they doze."""
    started.append(TenantProcess(directory, "first"))
    assert started[0].is_awake()
    started.append(TenantProcess(directory, "second"))
    waiting = []
    while not waiting:  # it has joined, and waits for the turn
        waiting = [one for one in neighbours(directory, gpus(1)[0].uuid) if one.waits(time.time())]
    assert [one.note for one in waiting] == ["second"]
    started[0].do("give up")
    assert started[1].is_awake()
    started[1].do("give up")
    assert sorted(sharers(gpus(1)[0], directory)) == ["first (dozing)", "second (dozing)"]
    assert "shared by first (dozing), second (dozing)" in (holder(gpus(1)[0], directory) or "")
    assert holder(gpus(1)[0], directory, is_shared=True) is None
    with pytest.raises(AllHeldError):
        take(gpus(1), Want(1), directory, wait=0, note="a stranger")


def test_a_gpu_that_is_held_alone_is_shared_with_nobody(directory: Path) -> None:
    alone = take(gpus(1), Want(1), directory, wait=0, note="alone")
    with pytest.raises(AllHeldError, match="GPU 0: alone"):
        take(gpus(1), Want(1), directory, wait=0, note="tenant", is_shared=True)
    alone.release()
    take(gpus(1), Want(1), directory, wait=0, note="tenant", is_shared=True).release()
    take(gpus(1), Want(1), directory, wait=0, note="alone again").release()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_holder(directory: Path, started: list[TenantProcess], how: signal.Signals) -> None:
    """A tenant killed amid its turn leaves it to the one that waits."""
    started.append(TenantProcess(directory, "first"))
    assert started[0].is_awake()
    started[0].do("give up")
    started.append(TenantProcess(directory, "second"))
    assert started[1].is_awake()
    started[0].begin("wake")
    started[1].process.send_signal(how)
    began = time.monotonic()
    assert started[0].stdout.readline() == "done\n"
    assert time.monotonic() - began < 5
    assert sharers(gpus(1)[0], directory) == ["first (dozing)"]


def test_longest_wait_first(directory: Path) -> None:
    """Who waits longest goes first and a stopped one holds nobody up."""
    now = 1000.0
    uuids = ["GPU-a"]
    first, second, third = (Turn.join(_made(directory), uuids, note, now) for note in ("first", "second", "third"))
    assert first.take(now)
    assert not second.take(now + 1)
    assert not third.take(now + 2)
    first.give_up()
    assert not third.take(now + 2.5)  # free, and not its turn
    assert second.take(now + 2.6)
    assert not first.take(now + 3)
    assert not third.take(now + 3)
    second.give_up()
    assert third.take(now + 3.1)
    assert not second.take(now + 3.2)
    third.give_up()
    assert not second.take(now + 4)  # first waits longer
    assert second.take(now + 6)  # and was not heard for a while: it hangs
    for one in (first, second, third):
        one.leave()


def test_ahead_of_all(directory: Path) -> None:
    """One that is to end goes ahead of those who waited longer."""
    first, second, third = (Turn.join(_made(directory), ["GPU-a"], note, 1000.0) for note in ("first", "2nd", "3rd"))
    assert first.take(1000)
    assert not second.take(1001)
    assert not third.take(1002, is_ahead=True)
    first.give_up()
    assert not second.take(1003)
    assert third.take(1003, is_ahead=True)
    for one in (first, second, third):
        one.leave()


def test_several_gpus_are_taken_all_or_none(directory: Path) -> None:
    both = Turn.join(_made(directory), ["GPU-b", "GPU-a"], "both", 1000.0)
    one = Turn.join(directory, ["GPU-b"], "one", 1000.0)
    assert one.take(1000)
    assert not both.take(1001)
    other = Turn.join(directory, ["GPU-a"], "other", 1000.0)
    assert not other.take(1002)  # the pair waits longer, and would starve otherwise
    both.stop_waiting(1003)
    assert other.take(1003)  # nothing is kept of a pair that was not whole
    for turn in (both, one, other):
        turn.leave()


def test_what_a_tenant_says_of_itself_is_read_by_others(directory: Path) -> None:
    mine = Turn.join(_made(directory), ["GPU-a"], "mine" * 1000, 1000.0)
    mine.say(1000.0, state="AWAKE")
    other = Turn.join(directory, ["GPU-a"], "other", 1000.0)
    assert not other.others()[0].waits(1000.0)
    assert other.others()[0].note == ("mine" * 1000)[:300]
    assert (other.others()[0].state, other.others()[0].pid) == ("AWAKE", os.getpid())
    assert mine.take(1000)
    assert not other.take(1001, by="balancer 7")
    assert [(one.note, one.by, one.waits(1001)) for one in mine.others()] == [("other", "balancer 7", True)]
    assert not mine.others()[0].waits(1010)  # not heard of since
    mine.leave()
    assert other.others() == []
    other.leave()


@pytest.mark.parametrize(
    "written",
    [
        *(b"", b"[1]", b"{", b"\xff", b'{"note": 1, "waiting_since": "x"}', b"9" * 5000),
        *(b'{"pid": 1e999}', b'{"pid": NaN}', b'{"waiting_since": Infinity}', b'{"said_at": ' + b"9" * 4000 + b"}"),
    ],
)
def test_what_others_wrote_into_a_tenants_file_does_no_harm(directory: Path, written: bytes) -> None:
    mine = Turn.join(_made(directory), ["GPU-a"], "mine", 1000.0)
    (directory / "GPU-a.tenant-0").write_bytes(written)
    other = Turn.join(directory, ["GPU-a"], "other", 1000.0)
    assert [one.note for one in other.others()] == ["a replica that has just started"]
    assert other.take(1000)
    mine.leave()
    other.leave()


def test_planted_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "somebody's file"
    victim.write_text("precious")
    _made(directory)
    (directory / "GPU-pretended-0.tenant-0").symlink_to(victim)
    held = take(gpus(1), Want(1), directory, wait=0, note="mine", is_shared=True)  # the next place will do
    held.release()
    (directory / "GPU-pretended-0.turn").unlink()
    (directory / "GPU-pretended-0.turn").hardlink_to(victim)
    with pytest.raises(LeaseError, match="cannot take turns"):
        take(gpus(1), Want(1), directory, wait=0, note="mine", is_shared=True)
    assert victim.read_text() == "precious"
    assert holder(gpus(1)[0], directory) is None  # nothing is kept by the one that failed


def test_removed_files_are_made_again(directory: Path) -> None:
    mine = Turn.join(_made(directory), ["GPU-a"], "mine", 1000.0)
    for file in directory.iterdir():
        file.unlink()
    assert mine.take(1000)
    other = Turn.join(directory, ["GPU-a"], "other", 1000.0)
    assert not other.take(1001)
    assert [one.note for one in other.others()] == ["mine"]
    mine.leave()
    other.leave()


def test_a_lost_folder_costs_nobody_a_descriptor(directory: Path) -> None:
    """While the turn's file can be neither found nor made, no descriptor is closed that has become another's."""
    mine = Turn.join(_made(directory), ["GPU-a"], "mine", 1000.0)
    shutil.rmtree(directory)
    for second in (0, 1):
        with pytest.raises(FileNotFoundError):
            mine.take(1000.0 + second)
    left, right = socket.socketpair()  # they get the numbers that are free
    with left, right, pytest.raises(FileNotFoundError):
        mine.take(1002)
    _made(directory)
    assert mine.take(1003)
    mine.leave()


def test_half_of_a_pair_is_not_kept(directory: Path) -> None:
    """Whose second GPU's turn cannot be opened neither keeps the first, nor is in the way of those that wait for it."""
    both = Turn.join(_made(directory), ["GPU-a", "GPU-b"], "both", 1000.0)
    one = Turn.join(directory, ["GPU-a"], "one", 1000.0)
    (directory / "GPU-b.turn").unlink()
    (directory / "GPU-b.turn").symlink_to("/nowhere")
    for _ in range(2):
        with pytest.raises(OSError, match="symbolic"):
            both.take(1001)
    assert one.take(1002)
    one.give_up()
    (directory / "GPU-b.turn").unlink()
    assert both.take(1003)
    both.leave()
    one.leave()


def test_a_turn_on_a_new_file_outlives_exec(directory: Path) -> None:
    mine = Turn.join(_made(directory), ["GPU-a"], "mine", 1000.0)
    (directory / "GPU-a.turn").unlink()
    assert mine.take(1000)
    assert all(map(os.get_inheritable, json.loads(mine.environ()[HELD])["turns"]))
    mine.leave()


def test_half_of_a_group_is_not_leased(directory: Path) -> None:
    """Whose second GPU's lease cannot be opened leaves the first to others."""
    _made(directory)
    second = directory / f"{gpus(2)[1].uuid}.lock"
    second.symlink_to("/nowhere")
    with pytest.raises(LeaseError, match="cannot open the lease"):
        take(gpus(2), Want(2), directory, wait=0, note="both")
    take(gpus(1), Want(1), directory, wait=0, note="one").release()


def test_a_gpu_has_so_many_tenants_at_the_most(directory: Path) -> None:
    there = [Turn.join(_made(directory), ["GPU-a"], str(number), 1000.0) for number in range(MOST_TENANTS)]
    with pytest.raises(TooManyTenantsError):
        Turn.join(directory, ["GPU-a"], "one too many", 1000.0)
    for one in there:
        one.leave()


def test_tenants_spread_over_the_gpus(directory: Path, started: list[TenantProcess]) -> None:
    for note in ("a", "b"):
        started.append(TenantProcess(directory, note, there=2))
        assert started[-1].is_awake()  # none waits for another's turn
    assert [sharers(gpu, directory) for gpu in gpus(2)] == [["a (awake)"], ["b (awake)"]]


def test_start_waits_too_long(directory: Path) -> None:
    """A tenant that waits too long to start is told whose turn it is."""
    held = take(gpus(1), Want(1), directory, wait=0, note="mine", is_shared=True)
    with pytest.raises(AllHeldError, match=r"not this replica's turn yet \(GPU 0: mine \(starting\)\)"):
        take(gpus(1), Want(1), directory, wait=0, note="second", is_shared=True)
    held.release()


def test_files_in_a_groups_folder_are_the_groups(tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    before = os.umask(0o077)
    try:
        held = take(gpus(1), Want(1), tmp_path, wait=0, note="mine", is_shared=True)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o660}
    assert json.loads((tmp_path / "GPU-pretended-0.tenant-0").read_text())["note"] == "mine"
    held.release()


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def test_one_after_the_other_is_asked_for_memory(tmp_path: Path) -> None:
    """Who has dozed longest comes first, the next only if memory is lacking still, and nobody once it is not."""
    long, short, starts = (Turn.join(tmp_path, ["GPU-a"], note, 1.0) for note in ("long", "short", "starts"))
    try:
        long.say(2.0, state="DOZING")
        short.say(3.0, state="DOZING")
        asked = [one.is_asked_for_memory(4.0) for one in (long, short)]
        starts.say(4.0, lacks={"GPU-a": 4.0})
        long.say(4.1, waiting_since=4.1)  # that it says something does not make its doze shorter
        asked += [one.is_asked_for_memory(4.5) for one in (long, short)]
        long.say(5.0, state="ASLEEP")
        starts.say(5.1, lacks={"GPU-a": 4.9})  # a look that began before that
        asked += [short.is_asked_for_memory(5.5)]
        long.say(5.8, waiting_since=5.8)  # it waits for its turn, and gave what it had long before
        starts.say(5.6, lacks={"GPU-a": 5.5})
        asked += [short.is_asked_for_memory(5.9), short.is_asked_for_memory(9.0)]
        starts.say(9.5, lacks={})
        asked += [short.is_asked_for_memory(9.6)]
    finally:
        for one in (long, short, starts):
            one.leave()
    assert asked == [False, False, True, False, False, True, False, False]


def test_who_dozes_elsewhere_is_not_asked_for_memory(tmp_path: Path) -> None:
    """A start on two GPUs lacks memory of one of them."""
    here, there = (Turn.join(tmp_path, [gpu], gpu, 1.0) for gpu in ("GPU-a", "GPU-b"))
    starts = Turn.join(tmp_path, ["GPU-a", "GPU-b"], "starts", 1.0)
    try:
        for one in (here, there):
            one.say(2.0, state="DOZING")
        starts.say(4.0, lacks={"GPU-b": 4.0})
        assert [one.is_asked_for_memory(4.5) for one in (here, there)] == [False, True]
    finally:
        for one in (here, there, starts):
            one.leave()
