"""What `groundserve up` is handed by its starter: ignored signals, closed streams, callers who leave."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from tests.operate.command_line import ANY_PORT, LAB, ROOT, Groundserve
from tests.support.until import wait_until

SLOW = f"{LAB} --start-delay 1"
# Shells that start a command as nohup does, and as a script's `&` does.
NOHUP = "trap '' HUP; exec \"$@\""
BACKGROUND = "trap '' INT; exec \"$@\""
CLOSED = 'exec "$@" <&- >&- 2>&-'


def started(groundserve: Groundserve, shell: str, *arguments: str | Path, **how: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "balancer.cli", "up", *map(str, arguments), *ANY_PORT]
    return subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        env=groundserve.environ,
        cwd=ROOT,
        **how,  # type: ignore[call-overload]
    )


def is_ready(groundserve: Groundserve) -> bool:
    try:
        return bool(groundserve.status("lab")["service"]["ready"] == 1)
    except Exception:
        return False


def until_ready(groundserve: Groundserve) -> str:
    wait_until(lambda: is_ready(groundserve))
    endpoint: str = groundserve.status("lab")["service"]["endpoint"]
    return endpoint


def serves_on(groundserve: Groundserve, seconds: float = 1.5) -> None:
    """The same replica is ready all that time: no end of the service has begun."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert groundserve.status("lab")["service"]["status"] == "READY"
        time.sleep(0.1)
    endpoint = groundserve.status("lab")["service"]["endpoint"]
    assert httpx.get(f"{endpoint}/health").status_code == 200


@pytest.mark.parametrize(("shell", "number"), [(NOHUP, signal.SIGHUP), (BACKGROUND, signal.SIGINT)])
def test_a_signal_that_is_ignored_where_we_start_stays_ignored(
    groundserve: Groundserve, shell: str, number: signal.Signals
) -> None:
    up = started(groundserve, shell, groundserve.service("lab", replicas=1), stdout=subprocess.DEVNULL)
    until_ready(groundserve)
    up.send_signal(number)
    serves_on(groundserve)
    replica, balancer = (
        next(pid for pid, line in groundserve.processes().items() if word in line and "leash" not in line)
        for word in ("tests.lab.replica", "-m balancer ")
    )
    for process in (up.pid, replica, balancer):
        ignored = int(Path(f"/proc/{process}/status").read_text().partition("SigIgn:")[2].split()[0], 16)
        # A replica may have a handler of its own, as any program; it was handed the rest as we were.
        assert ignored & 1 << number - 1 or (process == replica and number == signal.SIGINT), process
    assert groundserve("down", "lab") == "lab is down\n"
    assert up.wait(30) == 0
    assert groundserve.processes() == {}


@pytest.mark.parametrize("shell", ['exec "$@"', NOHUP])
def test_closing_the_terminal(groundserve: Groundserve, shell: str) -> None:
    """Closing the terminal ends only what was not started to outlive it."""
    service = groundserve.service("lab", replicas=1)
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "balancer.cli", "up", str(service), *ANY_PORT]
        os.chdir(ROOT)
        os.execvpe("bash", ["bash", "-c", shell, "bash", *command], {**groundserve.environ, "TERM": "xterm"})
    seen = b""
    while b"stop   groundserve down" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    if shell == NOHUP:
        serves_on(groundserve)
        # Its next words, and its last ones, find no terminal.
        groundserve("scale", "lab", "2")
        groundserve.until("lab", lambda status: status["service"]["ready"] == 2)
        assert groundserve("down", "lab") == "lab is down\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert groundserve.processes() == {}


@pytest.mark.parametrize("flags", [(), ("-d",)])
def test_closed_streams(groundserve: Groundserve, flags: Sequence[str]) -> None:
    """With closed streams a service comes up, and nothing printed goes into its files."""
    up = started(groundserve, CLOSED, groundserve.service("lab", replicas=1), *flags)
    endpoint = until_ready(groundserve)
    assert httpx.get(f"{endpoint}/health").status_code == 200
    folder = groundserve.folder / "state/groundserve/lab"
    assert (folder / "lock").read_text().count("\n") == 1
    assert "READY" not in (folder / "replica-1.log").read_text() + (folder / "balancer.log").read_text()
    groundserve("down", "lab")
    assert up.wait(30) == 0


def test_a_pipe_that_nobody_reads_any_more_ends_nothing(groundserve: Groundserve) -> None:
    reading, writing = os.pipe()
    service = groundserve.service("lab", SLOW, replicas=1)
    up = started(groundserve, 'exec "$@" 2>&1', service, stdout=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    until_ready(groundserve)
    groundserve("scale", "lab", "2")
    groundserve.until("lab", lambda status: status["service"]["ready"] == 2)
    up.terminate()
    assert up.wait(30) == 0


def test_a_full_disk_under_its_output_ends_nothing(groundserve: Groundserve) -> None:
    up = started(groundserve, 'exec "$@" > /dev/full 2>&1', groundserve.service("lab", replicas=1))
    until_ready(groundserve)
    serves_on(groundserve, 0.5)
    groundserve("down", "lab")
    up.wait(30)


def killed(caller: subprocess.Popen[bytes]) -> None:
    caller.kill()


def hung_up(caller: subprocess.Popen[bytes]) -> None:
    os.killpg(caller.pid, signal.SIGHUP)


def left_unread(caller: subprocess.Popen[bytes]) -> None:
    assert caller.stdout is not None
    caller.stdout.close()


@pytest.mark.parametrize("leave", [killed, hung_up, left_unread])
def test_detached_it_comes_up_without_its_caller(
    groundserve: Groundserve, leave: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    may_go_on = groundserve.folder / "may-go-on"
    service = groundserve.service("lab", f"until [ -e {may_go_on} ]; do sleep 0.05; done\n{LAB}", replicas=1)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    caller = started(groundserve, 'exec "$@"', "-d", service, **how)
    assert caller.stdout is not None
    assert b"STARTING" in caller.stdout.readline()
    leave(caller)
    if leave is not left_unread:
        caller.wait(30)
    may_go_on.touch()
    until_ready(groundserve)
    serves_on(groundserve)
    caller.wait(30)
    caller.stdout.close()
    assert "lab-1  READY" in groundserve("logs", "lab", "--controller")
    assert groundserve("down", "lab") == "lab is down\n"
    assert groundserve.processes() == {}


def test_starter_that_ignores_sigchld(groundserve: Groundserve) -> None:
    """Children that end are noticed even if the parent process ignores SIGCHLD."""
    command = [sys.executable, "-m", "balancer.cli", "up", str(groundserve.service("lab", replicas=1)), *ANY_PORT]
    script = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    up = subprocess.Popen(
        [sys.executable, "-c", script, *command], env=groundserve.environ, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    until_ready(groundserve)
    replica = next(p for p, line in groundserve.processes().items() if "lab.replica" in line and "leash" not in line)
    os.kill(replica, signal.SIGKILL)
    groundserve.until("lab", lambda status: not status["service"]["ready"])
    until_ready(groundserve)
    up.terminate()
    assert up.wait(30) == 0


@pytest.mark.parametrize("shell", [CLOSED, NOHUP, 'exec "$@" 2>&1 | true'])
def test_a_balancer_of_its_own_takes_what_it_is_handed(tmp_path: Path, shell: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [taken.getsockname()[1] for taken in (one, other)]
    flags = ["--listen", f"127.0.0.1:{ports[0]}", "--admin", f"127.0.0.1:{ports[1]}", "--set", "drain_grace=0"]
    argv = ["bash", "-c", shell, "bash", sys.executable, "-m", "balancer", *flags]
    balancer = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{ports[1]}/health").status_code == 200
        return False

    wait_until(answers)
    if shell == NOHUP:
        balancer.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert answers()
    # With the pipe it is bash's child, and bash waits for it.
    process = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and f"127.0.0.1:{ports[1]}" in cmdline(entry) and "bash" not in cmdline(entry)
    )
    os.kill(process, signal.SIGTERM)
    assert balancer.wait(30) == 0


def cmdline(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text().split("\0")
    except OSError:
        return []
