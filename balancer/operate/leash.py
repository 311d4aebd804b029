"""Runs one command so that nothing of it outlives whoever started it: `leash.py PARENT_PID COMMAND...`.

What tini is for a container, for a process on this host. The leash adopts every process that the command
leaves behind, and the kernel tells it when its parent dies, however that dies.

SIGTERM and SIGINT go to the command alone, as `docker stop` does it; if it ends by that, what it left
behind gets SIGTERM too. SIGHUP, also sent by the kernel when the parent dies, kills everything at once. When
the command ends by itself, whatever it left behind is killed. The exit code is the command's, or 128 + the
signal that ended it.

Started as a file, without site packages: it imports nothing of the project and stays at a few megabytes.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CANNOT_EXECUTE = 126
NOT_FOUND = 127

_OURS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


def main(arguments: list[str]) -> int:
    parent, command = int(arguments[0]), arguments[1:]
    # A SIGHUP that the starter ignored (nohup) would stay ignored, and then not even sigwait() sees it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:
        return 128 + signal.SIGHUP
    return _hold(_start(command))


def _start(command: list[str]) -> int:
    leash = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # Were the leash itself killed, the command has to go with it.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leash:
        os._exit(128 + signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    # Python ignores these two for itself, and what is ignored stays ignored in a command that is executed.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as failure:
        os.write(2, f"{command[0]}: {failure.strerror}\n".encode())
        os._exit(NOT_FOUND if isinstance(failure, FileNotFoundError) else CANNOT_EXECUTE)


def _hold(pid: int) -> int:
    code: int | None = None
    was_asked = False
    while True:
        received = signal.sigwait(_OURS)
        if received == signal.SIGHUP:
            _kill_all()
            return 128 + signal.SIGKILL if code is None else code
        if received in (signal.SIGTERM, signal.SIGINT):
            was_asked = True
            _send(received, [pid] if code is None else _descendants())
        ended, code_now = _reap(pid)
        if ended:
            code = code_now
            if not was_asked:
                _kill_all()
            else:
                _send(signal.SIGTERM, _descendants())
        if code is not None and not _descendants():
            return code


def _reap(pid: int) -> tuple[bool, int]:
    """Takes note of all children that ended; whether `pid` was among them, and its exit code."""
    ended, code = False, 0
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == pid:
                ended, code = True, os.waitstatus_to_exitcode(found[1])
    return ended, code if code >= 0 else 128 - code


def _kill_all() -> None:
    # Again and again: a process may fork between the look and the signal.
    while living := _descendants():
        _send(signal.SIGKILL, living)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _send(number: int, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _descendants() -> list[int]:
    """All living processes below this one. Orphans count: they were handed to us, the subreaper."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # "PID (NAME) STATE PPID ...": NAME may hold anything, even a parenthesis.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found.extend(children.get(process, ()))
    return found


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        sys.exit(f"prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
