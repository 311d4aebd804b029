"""What a process is handed by whoever starts it: streams that may be closed, signals that may be ignored."""

import contextlib
import errno
import os
import signal
import sys
from typing import TextIO

# Why something cannot be written now and may be later: a full disk, a reader who is slow.
_FOR_NOW = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}


def settle() -> None:
    """Makes it safe to go on with. Call it before any file is opened."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file or socket would get the number, and what is printed would go into it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    # Python has None in place of a stream that was closed.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - a descriptor, open to the end
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # Where it is ignored the kernel tells nobody how a child ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def ending() -> list[signal.Signals]:
    """The signals by which we are asked to end.

    What our starter ignores stays ignored: SIGHUP by nohup, SIGINT by a shell that starts us in the background.
    """
    asked = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGTERM, *asked]


def tell(out: TextIO, text: str) -> None:
    """Prints a line. Never raises: who looked may have gone, and what we do goes on."""
    try:
        print(text, file=out, flush=True)
    except (OSError, ValueError) as failure:
        if getattr(failure, "errno", None) not in _FOR_NOW:
            nobody_looks(out)


def nobody_looks(out: TextIO) -> None:
    """From here on what goes to this stream goes nowhere.

    What could not be written is still in it, and would be tried again at each flush and at the very end.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)
