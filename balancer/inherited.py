"""What a process inherits from its parent: streams that may be closed, signals that may be ignored."""

import contextlib
import errno
import os
import signal
import sys
from typing import TextIO

# Reasons why a write fails now and may succeed later: a full disk, a slow reader.
_TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}


def settle() -> None:
    """Repairs what the parent left closed or ignored. Call it before any file is opened."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file or socket would get this number, and printed text would go into it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open returns the lowest free number
    # Python sets a stream to None if it was closed at the start.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - a descriptor, open to the end
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # While SIGCHLD is ignored, the kernel reports no child's exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def ending() -> list[signal.Signals]:
    """The signals that ask this process to end.

    Signals that the parent ignores stay ignored: SIGHUP under nohup, SIGINT when a shell starts us in the background.
    """
    asked = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGTERM, *asked]


def tell(out: TextIO, text: str) -> None:
    """Prints a line. Never raises: the reader may be gone, and our work goes on regardless."""
    try:
        print(text, file=out, flush=True)
    except (OSError, ValueError) as failure:
        if getattr(failure, "errno", None) not in _TEMPORARY:
            nobody_looks(out)


def nobody_looks(out: TextIO) -> None:
    """Discards everything written to this stream from now on.

    What could not be written is still in its buffer, and would be tried again at each flush and at exit.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)
