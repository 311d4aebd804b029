"""`groundserve up -d`: the controller goes on in the background, and the caller waits until the service is up."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# What the background process says last when its service came up.
_UP = b"\x04"


def detached(work: Callable[[Callable[[], None]], int], log: Path) -> int:
    """Forks, runs `work` in the background with its output in `log`, and shows that output until it calls back.

    `work` gets the function to call once it is up. The exit code: 0 then, else that of the work.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        os._exit(_in_background(work, writing, log))
    os.close(writing)
    try:
        return _follow(reading, process)
    except KeyboardInterrupt:
        os.kill(process, signal.SIGTERM)
        return _follow(reading, process)


def _in_background(work: Callable[[Callable[[], None]], int], writing: int, log: Path) -> int:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    logged = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def came_up() -> None:
        sys.stdout.flush()
        os.write(1, _UP)
        os.dup2(logged, 1)
        os.dup2(logged, 2)

    try:
        return work(came_up)
    finally:
        sys.stdout.flush()


def _follow(reading: int, process: int) -> int:
    while chunk := os.read(reading, 4096):
        text, up, _ = chunk.partition(_UP)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        if up:
            return 0
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) or 1
