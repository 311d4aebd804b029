"""`groundserve up -d`: runs the controller in the background, and waits until the service is up."""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from balancer.errors import ConfigError
from balancer.inherited import ending
from balancer.operate.engines.rotation import RotatedLog

# What the background process sends once its service is up.
_UP = b"\x04"
_LOOK = 0.1  # seconds between two checks of its log


class AskedToEnd(BaseException):
    """A signal other than Ctrl-C asked this command to end: what is up is to end, and stays meant to exist."""


def detached(work: Callable[[Callable[[], None]], int], log: Path) -> int:
    """Forks, runs `work` in the background with its output in `log`, and shows that output until the service is up.

    `work` is given a function to call once the service is up. Returns 0 then, else the exit code of `work`, or
    1 if that is 0. The background process does not depend on the caller: if that goes away, the service still comes up.
    Ctrl-C, and what raises AskedToEnd, is passed on to it, and raised once it has ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log.touch(0o600)
    reading, writing = os.pipe()
    # From the fork on, a signal that is raised here has to reach the background process, too.
    free = signal.pthread_sigmask(signal.SIG_BLOCK, ending())
    process = os.fork()
    if process == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, free)
        os.close(reading)
        code = 1
        try:
            code = _in_background(work, writing, log)
        finally:
            os._exit(code)
    os.close(writing)
    asked: BaseException | None = None
    with log.open("rb") as said:
        while True:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, free)
                code = _follow(reading, process, said)
                break
            except (KeyboardInterrupt, AskedToEnd) as by:
                asked = by
                os.kill(process, signal.SIGINT if isinstance(by, KeyboardInterrupt) else signal.SIGTERM)
    if asked is not None:
        raise asked
    return code


def _in_background(work: Callable[[Callable[[], None]], int], writing: int, log: Path) -> int:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.stdout = sys.stderr = _Into(RotatedLog(log))

    def came_up() -> None:
        with contextlib.suppress(BrokenPipeError):  # the caller is gone
            os.write(writing, _UP)
        os.close(writing)

    try:
        return work(came_up)
    except ConfigError as failure:
        print(f"groundserve: {failure}")
        return 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1


class _Into(io.TextIOBase):
    """A text stream that writes to a rotated log."""

    def __init__(self, log: RotatedLog) -> None:
        self._log = log

    def write(self, text: str, /) -> int:
        self._log.write(text.encode(errors="replace"))
        return len(text)


def _follow(reading: int, process: int, said: BinaryIO) -> int:
    word: bytes | None = None
    while word is None:
        if select.select([reading], [], [], _LOOK)[0]:
            word = os.read(reading, 1)
        sys.stdout.write(said.read().decode(errors="replace"))
        sys.stdout.flush()
    if word == _UP:
        return 0
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) or 1
