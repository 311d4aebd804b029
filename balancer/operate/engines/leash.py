"""Runs one command so that none of its processes outlives our parent: `leash.py PARENT_PID [--log=FILE] COMMAND...`.

It does for a process on this host what tini does for a container. It adopts every process that the command leaves
behind, and the kernel signals it when its parent dies, however that happens.

SIGTERM, SIGINT and SIGUSR1 go to the command alone, as with `docker stop`; once the command has ended after one of
them, the processes that it left behind get SIGTERM. SIGHUP, which the kernel also sends when the parent dies, kills
everything at once. All four count only if our parent sends them: a service manager may signal every process of a
service, and the order in which they end is the parent's to decide. If the command ends by itself, the processes that
it left behind are killed. The exit code is the command's, or 128 + the signal that ended it.

The leash is two processes, one below the other, and each adopts what the other leaves behind when somebody kills it:
the outer one all that the command started, and the inner one, whose parent is gone then, ends it.

With a log, the command's output goes through a pipe into files of bounded size. The leash reads the pipe to its
end, even after the command or our parent has died, but for at most LAST_WORDS seconds after all processes are gone.

It is run as a script, without site packages, so that it needs only a few megabytes of memory.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
from pathlib import Path

# At the end of the path, so that none of our modules shadows the standard library.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from balancer.operate.engines.family import descendants
from balancer.operate.engines.rotation import RotatedLog

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CANNOT_EXECUTE = 126
NOT_FOUND = 127

PIPE_BYTES = 256 << 10  # so that a burst of output need not wait for us
# Seconds to wait for the pipe's end after all our processes are gone: some other process may hold its write end open.
LAST_WORDS = 5.0

_FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
_OURS = {*_FORWARDED, signal.SIGHUP, signal.SIGCHLD}


def main(arguments: list[str]) -> int:
    parent, command = int(arguments[0]), arguments[1:]
    log = Path(command.pop(0).removeprefix("--log=")) if command[0].startswith("--log=") else None
    # Signals that our parent ignored (SIGHUP under nohup) would stay ignored, and sigwaitinfo() would not see them.
    ignored = {number for number in _OURS if signal.getsignal(number) is signal.SIG_IGN}
    for number in _OURS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    if not _tie_to(parent):
        return 128 + signal.SIGHUP
    handed_over = _open_descriptors()
    pipe: tuple[int, ...] = () if log is None else _pipe()
    outer = os.getpid()
    inner = os.fork()
    if inner == 0:
        if not _tie_to(outer):
            os._exit(128 + signal.SIGHUP)
        os._exit(_hold(_start(command, ignored - {signal.SIGCHLD}, handed_over, pipe), outer))
    for descriptor in handed_over:
        os.close(descriptor)
    if log is None:
        return _hold(inner, parent)
    reading, writing = pipe
    os.close(writing)
    keeping = threading.Thread(target=_keep, args=(reading, RotatedLog(log)), daemon=True)
    keeping.start()
    code = _hold(inner, parent)
    keeping.join(LAST_WORDS)
    return code


def _tie_to(parent: int) -> bool:
    """We are told when `parent` dies, and adopt the orphans below us; returns whether it is our parent still."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    return os.getppid() == parent


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):  # the total size of a user's pipes is limited
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def _keep(reading: int, log: RotatedLog) -> None:
    while data := os.read(reading, PIPE_BYTES):
        log.write(data)


def _open_descriptors() -> list[int]:
    """The descriptors that we were started with, except the three standard ones."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - only the names are needed
        with contextlib.suppress(OSError):  # it was the descriptor that listdir itself used
            os.fstat(int(name))
            found.append(int(name))
    return [descriptor for descriptor in found if descriptor > 2]


def _start(command: list[str], ignored: set[signal.Signals], handed_over: list[int], pipe: tuple[int, ...]) -> int:
    """Starts the command, its output in the pipe, if any.

    Only it keeps the inherited descriptors, so that the leash holds no port open.
    """
    leash = os.getpid()
    pid = os.fork()
    if pid:
        for descriptor in (*handed_over, *pipe):
            os.close(descriptor)
        return pid
    if pipe:
        os.dup2(pipe[1], 1)
        os.dup2(pipe[1], 2)
    # If the leash itself is killed, the command has to end too.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leash:
        os._exit(128 + signal.SIGKILL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    # Python ignores these two signals, and ignored signals stay ignored across exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as failure:
        os.write(2, f"{command[0]}: {failure.strerror}\n".encode())
        os._exit(NOT_FOUND if isinstance(failure, FileNotFoundError) else CANNOT_EXECUTE)


def _hold(pid: int, parent: int) -> int:
    code: int | None = None
    was_asked = False
    while True:
        info = signal.sigwaitinfo(_OURS)
        received = info.si_signo
        if received != signal.SIGCHLD and info.si_pid != parent and os.getppid() == parent:
            continue
        if received == signal.SIGHUP:
            _kill_all()
            return 128 + signal.SIGKILL if code is None else code
        if received in _FORWARDED:
            was_asked = True
            _send(received if code is None else signal.SIGTERM, [pid] if code is None else descendants(os.getpid()))
        ended, code_now = _reap(pid)
        if ended:
            code = code_now
            if not was_asked:
                _kill_all()
            else:
                _send(signal.SIGTERM, descendants(os.getpid()))
        if code is not None and not descendants(os.getpid()):
            return code


def _reap(pid: int) -> tuple[bool, int]:
    """Reaps all children that have ended; returns whether `pid` was among them, and its exit code."""
    ended, code = False, 0
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == pid:
                ended, code = True, os.waitstatus_to_exitcode(found[1])
    return ended, code if code >= 0 else 128 - code


def _kill_all() -> None:
    # Repeated, because a process may fork between the listing and the signal.
    while living := descendants(os.getpid()):
        _send(signal.SIGKILL, living)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _send(number: int, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        sys.exit(f"prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
