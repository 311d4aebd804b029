"""A small text file that somebody wrote, read whole within bounds: of time, of memory, and of what may stand in it."""

import contextlib
import errno
import os
import select
import stat
import time
from pathlib import Path

from balancer.errors import ConfigError

# Service files, files of keys and of variables: the largest that people write have some ten KiB. Reading YAML takes
# 1.5 us a byte, so that this much is taken in within half a second.
LARGEST = 256 << 10

# Shells hand over what `<(command)` prints as a pipe, whose other end may take a moment; in seconds.
PATIENCE = 5.0


def read(path: str | Path, name: str, wanted: str = "a text file", patience: float = PATIENCE) -> str:
    """The file's text with \\n at the end of each line, and without a byte order mark.

    Raises ConfigError, one line that begins with `name` and says what is `wanted`, when there is no such text: no file,
    a folder, a pipe out of which nothing comes for `patience` seconds, more than LARGEST bytes, no UTF-8.
    """
    give = f"give the path of {wanted}"
    try:
        data = _bytes(path, patience)
    except ValueError:
        raise ConfigError(f"{name}: no file has such a name: {give}") from None
    except TimeoutError:
        raise ConfigError(f"{name}: nothing comes out of this pipe: {give}") from None
    except OSError as failure:
        raise ConfigError(f"{name}: {failure.strerror}: {give}") from None
    if len(data) > LARGEST:
        raise ConfigError(f"{name}: larger than {LARGEST >> 10} KiB: {give}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text: save it as UTF-8, or {give}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bytes(path: str | Path, patience: float) -> bytes:
    """At most LARGEST bytes and one more. Raises OSError, TimeoutError; ValueError for a name with a NUL."""
    # Not blocking: a named pipe into which nobody writes would hold up whoever opens it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        give_up = time.monotonic() + patience
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        data = bytearray()
        while len(data) <= LARGEST:
            try:
                piece = os.read(descriptor, LARGEST + 1 - len(data))
            except BlockingIOError:
                left = give_up - time.monotonic()
                if left <= 0 or not waiting.poll(left * 1000):
                    raise TimeoutError from None
                continue
            if not piece:
                break
            data += piece
    return bytes(data)
