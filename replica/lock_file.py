"""Lock files, which may hold one line of JSON, in a folder that all processes of a machine may write to.

A lock is a flock on an inheritable descriptor: it survives exec, and the kernel releases it when its process ends.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LONGEST = 4096  # bytes of a file that are read


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Opens a regular file that has no other name. Raises OSError for anything else.

    The folder may be open to all users of the machine, so a link in it could make us overwrite a file of our own.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "not a plain file of its own")
    return descriptor


def open_or_make(path: Path) -> int:
    """Opens a file for reading and writing. All who may write to the folder may write to a new file. Raises OSError."""
    try:
        # Without O_CREAT first: with it the kernel may refuse another user's file in a sticky folder.
        return open_plain(path, os.O_RDWR)
    except FileNotFoundError:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        # The umask would shut other users out. In a group's folder only the group gets access.
        is_open = path.parent.stat().st_mode & stat.S_IWOTH
        os.fchmod(descriptor, 0o666 if is_open else 0o660)
        return descriptor


def lock(path: Path, *, is_shared: bool = False) -> int | None:
    """An inheritable descriptor with the file's lock; None if another has it or the file is gone. Raises OSError."""
    descriptor = open_or_make(path)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        # Someone may have removed the file in between: a lock on a deleted file keeps nobody out.
        if is_at(descriptor, path):
            os.set_inheritable(descriptor, True)
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextlib.contextmanager
def held(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a file of our own while the block runs; `wait` is called first if another process has it.

    Makes the folder if there is none. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_at(descriptor: int, path: Path) -> bool:
    """Is the open file still the one at `path`?"""
    try:
        there, mine = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def is_locked(descriptor: int, *, is_shared: bool = False) -> bool:
    """Does another process hold the lock? Takes it for microseconds. `is_shared`: only an exclusive lock counts."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def write(descriptor: int, said: dict[str, Any]) -> None:
    """Replaces the file's content by one line of JSON; a concurrent reader gets either the old or the new content.

    The line is padded to the old length: a file that is truncated first is empty for a moment.
    """
    line = f"{json.dumps(said)}\n".encode()
    size = os.fstat(descriptor).st_size
    os.pwrite(descriptor, line.ljust(min(size, LONGEST), b" "), 0)


def read(descriptor: int) -> dict[str, Any]:
    """The object written last; empty if there is none, or the content is something else."""
    try:
        said = json.loads(os.pread(descriptor, LONGEST, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def number(said: Mapping[str, Any], name: str) -> float:
    """The finite number of that name; 0 if there is none. Others write into these files."""
    value = said.get(name)
    try:
        found = float(value) if isinstance(value, int | float) else 0.0
    except OverflowError:
        return 0.0
    return found if math.isfinite(found) else 0.0


def read_at(path: Path) -> dict[str, Any]:
    """Like `read`, by path; empty also if there is no such file, or it cannot be opened."""
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except OSError:
        return {}
    try:
        return read(descriptor)
    finally:
        os.close(descriptor)
