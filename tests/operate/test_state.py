"""A service's folder: who holds it, and files in it that are broken."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.operate.state.holder import Holder
from balancer.operate.state.service_folder import AlreadyUp, ServiceFolder, folders
from balancer.operate.state.state_file import BrokenState, read_whole, write_whole
from tests.operate.command_line import Groundserve
from tests.operate.meant import desired
from tests.support.until import wait_until


def as_directory(path: Path) -> None:
    path.mkdir()


def written(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    write.__name__ = text or "empty"
    return write


def as_bytes(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def as_a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


BROKEN = [
    as_directory,
    as_bytes,
    as_a_link_to_itself,
    *map(written, ("", '{"listen": "127', "[]", "3", '{"listen": 1, "admin": 2}')),
]


@contextmanager
def holding(lock: Path, word: Holder | None) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, signed with this word."""
    lock.parent.mkdir(parents=True)
    lock.write_text(word.to_text() if word is not None else "")
    program = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('has it'); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.kill()


def bystander() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


# Who holds it


def test_down_on_another_host_says_where_and_ends_nobody_here(groundserve: Groundserve, tmp_path: Path) -> None:
    other = bystander()
    there = replace(Holder.ours(), pid=other.pid, boot="another boot", host="gpu7")
    with holding(tmp_path / "state/groundserve/lab/lock", there):
        for command in (("down", "lab"), ("scale", "lab", "2"), ("down", "-a")):
            said = groundserve(*command, code=1)
            assert "lab runs on gpu7 as process" in said
            assert said.count("\n") == 1
        assert "gpu7" in groundserve("status", code=4)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_down_ends_no_process_that_only_has_the_number(groundserve: Groundserve, tmp_path: Path) -> None:
    other = bystander()
    ours = Holder.ours()
    with holding(tmp_path / "state/groundserve/lab/lock", replace(ours, pid=other.pid, started=ours.started - 1)):
        groundserve("down", "lab", code=1)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_down_ends_a_controller_that_does_not_answer(groundserve: Groundserve, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from balancer.operate.state.service_folder import ServiceFolder\n"
        "lock = ServiceFolder(Path(sys.argv[1]), 'lab').claim(); print('has it', flush=True); time.sleep(1000)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "state/groundserve")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=groundserve.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert groundserve("down", "lab") == "lab is down\n"
        assert process.wait(10) == -15


def test_a_signal_to_a_process_that_is_gone_reaches_nobody() -> None:
    gone = bystander()
    holder = replace(Holder.ours(), pid=gone.pid)
    gone.kill()
    gone.wait()
    assert not holder.is_here
    holder.signal(9)


def test_ours_is_here_and_what_another_version_signed_is_nobody() -> None:
    ours = Holder.ours()
    assert ours.is_here
    assert Holder.from_text(ours.to_text()) == ours
    for text in ("", "1234\n", "[]", '"x"', "{", json.dumps({"pid": "x"}), json.dumps({"pid": 1})):
        assert Holder.from_text(text) is None


def test_claiming_is_not_kept_out_by_those_who_only_look(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            ServiceFolder(tmp_path, "x").is_up()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(200):
            folder.claim().close()
    finally:
        is_over.set()
        for looker in lookers:
            looker.join()


def test_a_lock_that_is_held_keeps_others_out(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    with folder.claim(), pytest.raises(AlreadyUp):
        folder.claim()


# Files


def test_a_file_is_new_or_old_but_never_half(tmp_path: Path) -> None:
    file = tmp_path / "desired.json"
    write_whole(file, "old")
    is_over = threading.Event()
    seen = set()

    def read() -> None:
        while not is_over.is_set():
            seen.add(read_whole(file))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        write_whole(file, str(number) * 10_000)
    is_over.set()
    reader.join()
    assert {len(text or "") for text in seen} <= {3, 10_000, 20_000}
    assert [path.name for path in tmp_path.iterdir()] == ["desired.json"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "desired.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert read_whole(file) == "old"
    (tmp_path / "desired.json.new").mkdir()
    with pytest.raises(BrokenState, match=r"desired\.json cannot be written: Is a directory"):
        write_whole(file, "new")
    assert read_whole(file) == "old"


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_a_broken_left_file_is_said_in_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    make(folder.path / "desired.json")
    with pytest.raises(BrokenState, match=r"desired\.json cannot be used"):
        print(folder.desired)
    assert folder.is_detached


def test_where_it_was_left_is_found_again(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    with folder.claim():
        folder.write_desired(desired(is_left=True))
        assert not folder.is_detached
    assert folder.is_detached
    folder.write_desired(desired(is_left=False))
    assert not folder.is_detached


def test_broken_folders_are_no_other_ones_affair(groundserve: Groundserve, tmp_path: Path) -> None:
    """Each of their files in each way, and nothing of it is up; the next test has a service that is."""
    root = tmp_path / "state/groundserve"
    for name in ("desired.json", "lock", "control.sock", "admin.key", "replica-1.log", "replica-x.log", "balancer"):
        for number, make in enumerate(BROKEN):
            folder = ServiceFolder(root, f"broken-{name}-{number}")
            folder.claim().close()
            (folder.path / name).unlink(missing_ok=True)
            make(folder.path / name)
            if name == "lock":
                assert folder.replica_logs() == []
    with ServiceFolder(root, "fine").claim():
        for command in (("status",), ("status", "--json"), ("status", "f*")):
            said = groundserve(*command, code=4)
            assert "fine" in said
            assert "Traceback" not in said
        for code, command in ((1, ("logs", "nobody")), (1, ("scale", "nobody", "1")), (1, ("down", "nobody"))):
            said = groundserve(*command, code=code)
            assert "Traceback" not in said
    assert len(folders(root)) == 7 * len(BROKEN) + 1


@pytest.mark.parametrize("name", ["balancer/service.yaml", "balancer", "control.sock", "replica-1.log", "balancer.log"])
def test_a_start_that_a_broken_file_stops_says_so_in_one_line(
    groundserve: Groundserve, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "state/groundserve/lab" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "balancer":
        path.write_text("")
    else:
        path.mkdir()
    said = groundserve("up", groundserve.service("lab", replicas=1), code=1)
    assert said.startswith(f"groundserve: {path}")
    assert said.count("\n") == 1
    assert groundserve.processes() == {}


def test_status_and_down_of_others_go_on_beside_a_broken_folder(groundserve: Groundserve, tmp_path: Path) -> None:
    groundserve.up(groundserve.service("fine", replicas=1)).until_up()
    root = tmp_path / "state/groundserve"
    for name, file in (("half", "desired.json"), ("odd", "lock")):
        (root / name).mkdir()
        (root / name / "lock").touch()
        (root / name / file).unlink(missing_ok=True)
    (root / "half/desired.json").write_text('{"listen": ')
    (root / "odd/lock").mkdir()
    (root / "a file").touch()
    said = groundserve("status", code=4)
    assert "READY" in said
    assert f"half: {root}/half/desired.json cannot be used (it is not whole)" in said
    assert f"groundserve: odd: {root}/odd/lock cannot be used (Is a directory): remove it" in said
    assert "Traceback" not in said
    assert "fine is down" in groundserve("down", "fine")
    said = groundserve("down", "-a", code=1)
    assert "Traceback" not in said
    assert "odd" in said
    assert groundserve("up", groundserve.service("odd", replicas=1), code=1).startswith(
        f"groundserve: {root}/odd/lock cannot be used (Is a directory)"
    )


def test_a_lock_of_flock_alone_is_up_and_nobody_to_be_ended(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.path.mkdir()
    with (folder.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert folder.is_up()
        assert folder.holder() is None


def test_a_root_that_is_no_folder_is_said(groundserve: Groundserve, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/groundserve").write_text("")
    said = groundserve("status", code=1)
    assert "Not a directory: set XDG_STATE_HOME" in said
    assert os.fspath(tmp_path) in said


def test_it_is_up_until_its_holder_ends(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    with holding(tmp_path / "x/lock", None) as process:
        assert folder.is_up()
        process.kill()
        wait_until(folder.is_up, fits=lambda is_up: not is_up)
