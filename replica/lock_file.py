"""Files that processes of one machine lock and write a line into, in a folder that others may write to as well.

A lock is a flock on an inheritable descriptor: it outlives exec, and the kernel frees it when its process is gone.
"""

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

LONGEST = 4096  # bytes that are read of what a holder wrote


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Opens a plain file of its own; raises OSError for anything that somebody else may have put in its place.

    The folder may be open to all users of the machine, so a link in it could make us write to a file of ours.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "not a plain file of its own")
    return descriptor


def open_or_make(path: Path) -> int:
    """For reading and writing; a new file is for all who may write to its folder. Raises OSError."""
    try:
        # Without O_CREAT first: with it the kernel may refuse another user's file in a sticky folder.
        return open_plain(path, os.O_RDWR)
    except FileNotFoundError:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        # The umask would shut other users out; a folder that is a group's keeps its files to the group.
        is_open = path.parent.stat().st_mode & stat.S_IWOTH
        os.fchmod(descriptor, 0o666 if is_open else 0o660)
        return descriptor


def lock(path: Path, *, is_shared: bool = False) -> int | None:
    """An inheritable descriptor that holds the file's lock, or None while others have it. Raises OSError."""
    descriptor = open_or_make(path)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        # Someone may have removed the file in between: a lock on a file without a name keeps nobody out.
        if is_at(descriptor, path):
            os.set_inheritable(descriptor, True)
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Is this the file that has that name now?"""
    try:
        there, mine = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def is_locked(descriptor: int, *, is_shared: bool = False) -> bool:
    """Does another process hold its lock? `is_shared`: a shared lock is none. Holds it itself for microseconds."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def write(descriptor: int, said: dict[str, Any]) -> None:
    """Puts one line of JSON into the file, in place of what was there; whoever reads meanwhile finds one or the other.

    Padded, because a file that is cut first is empty for a moment.
    """
    line = f"{json.dumps(said)}\n".encode()
    size = os.fstat(descriptor).st_size
    os.pwrite(descriptor, line.ljust(min(size, LONGEST), b" "), 0)


def read(descriptor: int) -> dict[str, Any]:
    """What was written last; empty where nothing was, or it is not ours."""
    try:
        said = json.loads(os.pread(descriptor, LONGEST, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def read_at(path: Path) -> dict[str, Any]:
    """As read, by name; empty where there is no such file, or it cannot be opened."""
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except OSError:
        return {}
    try:
        return read(descriptor)
    finally:
        os.close(descriptor)
