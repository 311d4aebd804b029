"""Nothing outlives a leash, whatever is done to it or to its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.operate.command_line import ROOT
from tests.support.until import wait_until

LEASH = [sys.executable, "-I", "-S", str(ROOT / "balancer/operate/engines/leash.py")]
# A child in a session of its own whose parent is gone: nothing ties it to the command any more.
STRAY = "(setsid sleep 1000 &)"


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment by which everything below a test is found, and at last killed."""
    environ = {**os.environ, "LEASH_TEST": str(tmp_path)}
    yield environ
    for process in alive(environ):
        os.kill(process, signal.SIGKILL)


def alive(environ: dict[str, str], word: str = "") -> list[int]:
    """What is alive below a test, leashes left out; `word`: only processes of that program."""
    mark, found = f"LEASH_TEST={environ['LEASH_TEST']}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                program, *arguments = (entry / "cmdline").read_text().split("\0")
                if word in ("", Path(program).name) and LEASH[-1] not in arguments:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def leashed(environ: dict[str, str], script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*LEASH, str(os.getpid()), "bash", "-c", script], env=environ)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_the_exit_code_is_the_commands(marked: dict[str, str], script: str, code: int) -> None:
    assert leashed(marked, script).wait(30) == code


@pytest.mark.parametrize(("command", "code"), [("no-such-program", 127), ("/etc/hostname", 126)])
def test_what_cannot_be_executed_is_said(marked: dict[str, str], command: str, code: int) -> None:
    done = subprocess.run([*LEASH, str(os.getpid()), command], env=marked, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert done.stderr.startswith(f"{command}: ")


def test_strays_go_when_the_command_ends(marked: dict[str, str]) -> None:
    assert leashed(marked, f"{STRAY}; sleep 0.2; exit 3").wait(30) == 3
    assert alive(marked) == []


def test_strays_go_when_the_command_is_killed(marked: dict[str, str]) -> None:
    leash = leashed(marked, f"{STRAY}; sleep 1001; true")
    wait_until(lambda: alive(marked, "sleep"), fits=lambda found: len(found) == 2)
    os.kill(*alive(marked, "bash"), signal.SIGKILL)
    assert leash.wait(30) == 137
    assert alive(marked) == []


def test_sigterm_reaches_the_command_which_ends_in_its_own_time(marked: dict[str, str]) -> None:
    leash = leashed(marked, "trap 'sleep 0.3; exit 5' TERM; while true; do sleep 0.05; done")
    wait_until(lambda: alive(marked, "sleep"))
    leash.terminate()
    assert leash.wait(30) == 5


def test_sigterm_reaches_what_a_shell_leaves_behind(marked: dict[str, str], tmp_path: Path) -> None:
    server = (
        f"trap 'echo asked > {tmp_path}/told; exit 0' TERM; echo up > {tmp_path}/up; while true; do sleep 0.05; done"
    )
    leash = leashed(marked, f'bash -c "{server}"; true')
    wait_until((tmp_path / "up").exists)
    leash.terminate()
    assert leash.wait(30) == 143
    assert (tmp_path / "told").read_text() == "asked\n"
    assert alive(marked) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_only_the_parent_ends_the_command(marked: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    """A service manager that signals each process of a service cuts nothing off: the parent decides."""
    told = f'for s in TERM INT USR1; do trap "echo $s >> {tmp_path}/told" $s; done'
    leash = leashed(marked, f"{told}; touch {tmp_path}/up; while true; do sleep 0.05; done")
    wait_until((tmp_path / "up").exists)
    subprocess.run(["bash", "-c", f"kill -{number.name} {leash.pid}"], check=True)
    leash.send_signal(signal.SIGUSR1 if number is signal.SIGTERM else signal.SIGTERM)  # in order, from one to the other
    wait_until((tmp_path / "told").exists)
    assert (tmp_path / "told").read_text() == ("USR1\n" if number is signal.SIGTERM else "TERM\n")
    assert leash.poll() is None
    leash.send_signal(signal.SIGHUP)
    assert leash.wait(30) == 137


def test_sighup_kills_everything_at_once(marked: dict[str, str]) -> None:
    leash = leashed(marked, f"trap '' TERM HUP; {STRAY}; while true; do sleep 0.05; done")
    wait_until(lambda: alive(marked, "sleep"))
    leash.send_signal(signal.SIGHUP)
    assert leash.wait(30) == 137
    assert alive(marked) == []


def test_everything_goes_when_the_parent_is_killed(marked: dict[str, str]) -> None:
    command = ["bash", "-c", f"{STRAY}; sleep 1001; true"]
    program = f"import os, subprocess; subprocess.run([*{LEASH!r}, str(os.getpid()), *{command!r}])"
    parent = subprocess.Popen([sys.executable, "-c", program], env=marked, start_new_session=True)
    wait_until(lambda: alive(marked, "sleep"), fits=lambda found: len(found) == 2)
    parent.kill()
    parent.wait(30)
    wait_until(lambda: alive(marked), fits=lambda found: not found)


@pytest.mark.parametrize("which", [0, 1])
def test_everything_goes_when_a_leash_is_killed(marked: dict[str, str], which: int) -> None:
    """Whichever of its two processes: a shell's child, and a stray in a session of its own, go with the command."""
    leash = leashed(marked, f"trap '' TERM HUP; {STRAY}; bash -c 'sleep 1001; true'; true")
    wait_until(lambda: alive(marked, "sleep"), fits=lambda found: len(found) == 2)
    inner = int(Path(f"/proc/{leash.pid}/task/{leash.pid}/children").read_text())
    os.kill((leash.pid, inner)[which], signal.SIGKILL)
    assert leash.wait(30) == (-signal.SIGKILL, 137)[which]
    wait_until(lambda: alive(marked), fits=lambda found: not found)
    wait_until(lambda: Path(f"/proc/{inner}").exists(), fits=lambda is_there: not is_there)


def test_a_leash_whose_parent_is_gone_already_starts_nothing(marked: dict[str, str], tmp_path: Path) -> None:
    argv = [*LEASH, "1", "bash", "-c", f"echo started > {tmp_path}/started"]
    assert subprocess.run(argv, env=marked, timeout=30).returncode == 128 + signal.SIGHUP
    assert not (tmp_path / "started").exists()
