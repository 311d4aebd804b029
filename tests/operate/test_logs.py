"""Logs have an end, and are read across it."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from balancer.operate.commands import log_reader
from balancer.operate.commands.log_reader import LogReader
from balancer.operate.engines import rotation
from balancer.operate.engines.rotation import FILES, MAX_BYTES, RotatedLog
from balancer.operate.state.service_folder import ServiceFolder
from tests.operate.command_line import LAB, ROOT, Groundserve
from tests.operate.test_leash import LEASH
from tests.support.until import wait_until

# Prints its number on each line of 50 bytes, so that a missing one shows.
COUNTING = "import sys; sys.stdout.writelines(f'{n:049}\\n' for n in range(int(sys.argv[1])))"


def numbers(lines: list[str]) -> list[int]:
    return [int(line) for line in lines]


def written(log: Path, first: int, count: int) -> None:
    """Lines of a kilobyte with their numbers, as one process prints them."""
    out = RotatedLog(log)
    for number in range(first, first + count):
        out.write(b"%01023d\n" % number)
    out.close()


def reader(log: Path) -> LogReader:
    return LogReader(log, rotation.files(log))


def everything(log: Path) -> list[str]:
    with reader(log) as opened:
        return [*opened.all(), *opened.rest()]


def last(log: Path, count: int) -> list[str]:
    with reader(log) as opened:
        return opened.last(count)


def in_all(log: Path) -> int:
    return sum(file.stat().st_size for file in rotation.files(log))


# Writing


def test_log_is_bounded(tmp_path: Path) -> None:
    """A log stays below its bound and keeps its last lines whole."""
    log = tmp_path / "x.log"
    written(log, 0, 40_000)
    assert [file.name for file in rotation.files(log)] == ["x.log.2", "x.log.1", "x.log"]
    assert all(file.stat().st_size <= MAX_BYTES for file in rotation.files(log))
    kept = numbers(everything(log))
    assert kept == list(range(40_000 - len(kept), 40_000))
    assert len(kept) > 20_000
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_cannot_be_closed_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full share says so only when a file is closed; its number may be another file's from then on."""
    log = RotatedLog(tmp_path / "x.log")
    assert log.write(b"x" * (MAX_BYTES - 1)) is None
    closed = []

    def close(descriptor: int) -> None:
        closed.append(descriptor)
        os_close(descriptor)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    os_close = os.close
    monkeypatch.setattr(os, "close", close)
    failure = log.write(b"more\n")
    monkeypatch.undo()
    assert failure is not None
    assert failure.errno == errno.EDQUOT
    assert len(closed) == 1
    assert log.write(b"more\n") is None
    log.close()
    assert (tmp_path / "x.log").read_bytes() == b"more\n"


def test_write_beyond_the_bound(tmp_path: Path) -> None:
    """The part of a write beyond the bound goes on in the next file."""
    log = tmp_path / "x.log"
    text = b"".join(b"%d\n" % number for number in range(3_000_000))
    RotatedLog(log).write(text)
    assert b"".join(file.read_bytes() for file in rotation.files(log)) == text[: len(text)]
    assert all(file.read_bytes().endswith(b"\n") for file in rotation.files(log))


def test_a_line_without_an_end_is_bounded_too(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    out = RotatedLog(log)
    for _ in range(60):
        out.write(b"x" * 1_000_000)
    assert in_all(log) <= FILES * MAX_BYTES
    assert last(log, 1)[0].endswith("x" * 1_000_000)


def test_two_that_write_one_log_keep_the_bound(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    outs = [RotatedLog(log) for _ in range(2)]
    for _ in range(60):
        for out in outs:
            out.write(b"x" * 999_999 + b"\n")
    assert in_all(log) <= FILES * MAX_BYTES
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith("x.log")] == []


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    out = RotatedLog(tmp_path / "no-such-folder/x.log")
    out.write(b"lost\n")
    (tmp_path / "no-such-folder").mkdir()
    out.write(b"kept\n")
    assert (tmp_path / "no-such-folder/x.log").read_text() == "kept\n"


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """The command's own limit on file sizes stands for the disk's."""
    script = f'echo begun; {sys.executable} -c "{COUNTING}" 100000; echo went on > {tmp_path}/after'
    limits = (1_000_000, 1_000_000)
    done = subprocess.run(
        [*LEASH, str(os.getpid()), f"--log={tmp_path / 'x.log'}", "bash", "-c", script],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "after").read_text() == "went on\n"


# Through the leash


def test_a_burst_is_neither_lost_nor_slow_nor_kept_for_ever(tmp_path: Path) -> None:
    log, count = tmp_path / "x.log", 4_000_000  # 200 MB
    began = time.monotonic()
    argv = [*LEASH, str(os.getpid()), f"--log={log}", sys.executable, "-c", COUNTING, str(count)]
    assert subprocess.run(argv, timeout=120, check=False).returncode == 0
    assert time.monotonic() - began < 60
    assert in_all(log) <= FILES * MAX_BYTES
    kept = numbers(everything(log))
    assert kept == list(range(count - len(kept), count))


@pytest.mark.parametrize("end", ["kill -9 $$", "kill -SEGV $$", "exit 3", "abort"])
def test_the_last_words_of_a_crash_are_there(tmp_path: Path, end: str) -> None:
    log = tmp_path / "x.log"
    script = f'{sys.executable} -c "{COUNTING}" 20000; echo last words >&2; {end}'
    subprocess.run([*LEASH, str(os.getpid()), f"--log={log}", "bash", "-c", script], timeout=60, check=False)
    assert "last words" in last(log, 2)
    assert numbers(everything(log)[:20_000]) == list(range(20_000))


def test_what_was_printed_before_the_starter_was_killed_is_there(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    command = ["bash", "-c", f'{sys.executable} -c "{COUNTING}" 20000; echo up > {tmp_path}/up; sleep 1001']
    program = f"import os, subprocess; subprocess.run([*{LEASH!r}, str(os.getpid()), '--log={log}', *{command!r}])"
    parent = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    wait_until((tmp_path / "up").exists)
    parent.kill()
    parent.wait(30)
    assert len(wait_until(lambda: everything(log), fits=lambda lines: len(lines) == 20_000)) == 20_000


# Reading


def test_the_last_lines_are_read_from_the_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    written(log, 0, 25_000)
    for count in (0, 1, 5, 11_000, 25_000, 99_999):
        assert numbers(last(log, count)) == list(range(max(0, 25_000 - count), 25_000))
    with log.open("ab") as more:
        more.write(b"no end yet")
    assert last(log, 1) == ["no end yet"]


def test_the_tail_of_a_gigabyte_costs_no_memory(groundserve: Groundserve) -> None:
    folder = ServiceFolder(groundserve.folder / "state/groundserve", "old")
    folder.claim().close()
    with folder.replica_log(1).open("wb") as log:
        log.truncate(1 << 30)  # of an earlier version, say, which did not end them
        log.seek(0, os.SEEK_END)
        log.write(b"\none\ntwo\nthree\n")
    script = (
        "from balancer import cli; code = cli.main(['logs', 'old', '1', '--tail', '2']);"
        "print(code, open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], env=groundserve.environ, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[:3] == ["two", "three", "0"]
    assert int(said[3]) < 200_000  # KiB


def test_following_misses_no_line_while_files_rotate(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    written(log, 0, 100)
    writer = threading.Thread(target=written, args=(log, 100, 30_000))
    with reader(log) as following:
        seen = numbers(following.last(10))
        writer.start()
        while writer.is_alive():
            seen += numbers(list(following.more()))
        seen += numbers(list(following.more()))
    assert seen == list(range(90, 30_100))


@pytest.mark.parametrize("at", range(3))
def test_a_rotation_while_looking_hides_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A file is rotated between two looks at the log's files, wherever that is."""
    log = tmp_path / "x.log"
    opened, looks = log_reader._opened, 0

    def rotating(file: Path) -> BinaryIO | None:
        nonlocal looks
        if looks == at:
            rotation.shift(log)
            log.write_bytes(b"2\n")
        looks += 1
        return opened(file)

    log.write_bytes(b"0\n")
    rotation.shift(log)
    log.write_bytes(b"1\n")
    with reader(log) as following:
        seen = numbers(following.last(1))
        monkeypatch.setattr(log_reader, "_opened", rotating)
        for _ in range(3):
            seen += numbers(list(following.more()))
    assert seen == [1, 2]


def test_following_waits_for_a_log_and_for_the_end_of_a_line(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with LogReader(log, []) as following:
        assert list(following.all()) == list(following.more()) == []
        log.write_bytes(b"half a ")
        assert list(following.more()) == []
        with log.open("ab") as more:
            more.write("line \u00e9\n10%\r20%\rtail".encode())
        assert list(following.more()) == ["half a line \u00e9", "10%", "20%"]
        assert following.rest() == ["tail"]


def test_following_goes_on_where_a_log_was_emptied_or_replaced(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("one\ntwo\n")
    with reader(log) as following:
        assert list(following.all()) == ["one", "two"]
        log.write_text("new\n")
        assert list(following.more()) == ["new"]
        log.unlink()
        log.write_text("newer\n")
        assert list(following.more()) == ["newer"]


# A service's


def test_the_life_before_is_set_aside_and_not_shown(groundserve: Groundserve) -> None:
    service = groundserve.service("lab", f"echo born in $LIFE\n{LAB}", replicas=1, more="envs: {LIFE: one}")
    folder = ServiceFolder(groundserve.folder / "state/groundserve", "lab")
    for life in ("one", "two", "three"):
        up = groundserve.up(service, "--env", f"LIFE={life}").until_up()
        assert groundserve("logs", "lab", "1").startswith(f"born in {life}\n")
        assert [line for line in groundserve("logs", "lab").splitlines() if "born" in line] == [f"born in {life}"] or (
            groundserve("logs", "lab").startswith("lab-1 | born in " + life)
        )
        groundserve("down", "lab")
        up.wait()
    assert folder.replica_log(1).with_name("replica-1.log.1").read_text().startswith("born in two\n")
    assert folder.replica_log(1).with_name("replica-1.log.2").read_text().startswith("born in one\n")
    assert (folder.path / "balancer.log.1").is_file()


def test_logs_of_replicas_that_are_gone_end_too(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    for id in range(1, 101):
        folder.replica_log(id).touch()
        folder.trim_replica_logs({3, id})
    assert [path.stem for path in folder.replica_logs()] == [f"replica-{id}" for id in (3, *range(80, 101))]


def test_claiming_sets_logs_aside(tmp_path: Path) -> None:
    """Claiming a folder sets its logs aside and removes those of an older run."""
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    folder.replica_log(2).write_text("old")
    folder.replica_log(3).with_name("replica-3.log.1").write_text("of a life before")
    folder.claim().close()
    assert folder.replica_logs() == []
    assert [path.name for path in sorted(tmp_path.glob("x/*.log*"))] == ["replica-2.log.1"]
    assert folder.log_files(folder.replica_log(2)) == []
