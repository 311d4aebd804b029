"""Reads a small text file that a person wrote, within limits on time and size, and only as UTF-8."""

import contextlib
import errno
import os
import select
import stat
import time
from pathlib import Path

from balancer.errors import ConfigError

# For service files and files of keys or variables; the largest that people write have about ten KiB. Parsing YAML takes
# 1.5 us per byte, so a file of this size is read within half a second.
MAX_BYTES = 256 << 10

# Seconds to wait for a pipe: shells pass the output of `<(command)` as one, and the command may need a moment.
PATIENCE = 5.0


def read(path: str | Path, name: str, wanted: str = "a text file", patience: float = PATIENCE) -> str:
    """The file's text with \\n line ends and without a byte order mark.

    Raises ConfigError, one line that begins with `name` and says what is `wanted`: for a missing file, a folder, a pipe
    that delivers nothing for `patience` seconds, more than MAX_BYTES bytes, or text that is not UTF-8.
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
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES >> 10} KiB: {give}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text: save it as UTF-8, or {give}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bytes(path: str | Path, patience: float) -> bytes:
    """At most MAX_BYTES + 1 bytes. Raises OSError, TimeoutError, and ValueError for a name that contains a NUL."""
    # Non-blocking: opening a named pipe without a writer would otherwise hang.
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
        while len(data) <= MAX_BYTES:
            try:
                piece = os.read(descriptor, MAX_BYTES + 1 - len(data))
            except BlockingIOError:
                left = give_up - time.monotonic()
                if left <= 0 or not waiting.poll(left * 1000):
                    raise TimeoutError from None
                continue
            if not piece:
                break
            data += piece
    return bytes(data)
