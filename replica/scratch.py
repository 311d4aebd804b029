"""A temporary folder for each start, for the files that SGLang leaves behind; folders of dead owners are removed.

At each start SGLang creates half a dozen temporary files and one in shared memory, and removes none of them. The lock
on the folder is inherited through exec, like the lease's, so the kernel releases it however the process ends.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "groundserve-scratch-"
# A link in the folder with this prefix points to a file elsewhere that is removed with the folder.
ELSEWHERE = "elsewhere-"
# SGLang creates sockets there, whose paths are limited to 107 bytes.
_MAX_PARENT = 60


def take(parent: Path) -> Path | None:
    """A new folder in `parent`, locked for the life of this process, also after exec; None if it cannot be created."""
    if len(os.fsencode(parent)) > _MAX_PARENT:
        return None
    try:
        sweep(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            held = _lock(folder)
            if held is None or not folder.is_dir():
                continue  # another replica's sweep removed it before we locked it
            os.set_inheritable(held, True)
            return folder
    except OSError:
        return None


def sweep(parent: Path) -> None:
    """Removes the folders that ended replicas of this user left in `parent`."""
    for folder in parent.glob(f"{PREFIX}*"):
        held = _lock(folder)
        if held is None:
            continue
        for link in folder.glob(f"{ELSEWHERE}*"):
            with contextlib.suppress(OSError):
                link.readlink().unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None if another process holds it, or the folder is not ours."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(held).st_uid != os.geteuid():
            raise PermissionError
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held
