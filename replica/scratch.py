"""A temporary folder of this start's own, for what SGLang leaves lying there; and the end of those whose owner is gone.

SGLang makes half a dozen temporary files at each start, and one in shared memory, and removes none of them. The lock on
the folder is inherited through exec, as the lease's is, so the kernel says who is gone, however it went.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "groundserve-scratch-"
# A file in the folder whose name begins so is a link to a file elsewhere that goes with it.
ELSEWHERE = "elsewhere-"
# The sockets that SGLang makes there may have names of 107 bytes.
_LONGEST_PARENT = 60


def take(parent: Path) -> Path | None:
    """A new folder in `parent`, locked for as long as this process or what it becomes lives; None where none can be."""
    if len(os.fsencode(parent)) > _LONGEST_PARENT:
        return None
    try:
        sweep(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            held = _lock(folder)
            if held is None or not folder.is_dir():
                continue  # another replica's sweep was quicker than the lock
            os.set_inheritable(held, True)
            return folder
    except OSError:
        return None


def sweep(parent: Path) -> None:
    """Removes what replicas of this user left in `parent` when they ended."""
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
    """A descriptor that holds it; None when somebody else does, or it is not ours."""
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
