"""Logs of bounded size: NAME.log, then NAME.log.1 and NAME.log.2, with the limits that compose.yaml sets.

The leash imports this without site packages, so it needs only the standard library.
"""

import contextlib
import os
import re
from pathlib import Path

# As in compose.yaml for containers: max-size 10m, max-file 3.
MAX_BYTES = 10 << 20
FILES = 3

_NUMBERED = re.compile(r"\.\d+$")


class RotatedLog:
    """Appends to a log whose files are bounded in size and number. Drops what cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def write(self, data: bytes) -> OSError | None:
        """Never raises: returns what kept it from writing all, such as a full disk. The next call tries again."""
        try:
            while data:
                data = data[self._write_some(data) :]
        except OSError as failure:
            with contextlib.suppress(OSError):
                self.close()
            return failure
        return None

    def close(self) -> None:
        """Raises OSError if what was written last is lost; it is closed even so, and its number may be another's."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _write_some(self, data: bytes) -> int:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        there = os.fstat(self._file)
        room = MAX_BYTES - there.st_size
        if len(data) > room:
            # Split at the end of a line; a line longer than a whole file is split anywhere.
            room = data.rfind(b"\n", 0, max(0, room)) + 1 or (room if there.st_size == 0 else 0)
            if room == 0:
                self._turn(there)
                return 0
        return os.write(self._file, data[:room] if len(data) > room else data)

    def _turn(self, full: os.stat_result) -> None:
        """Makes the next write go to an empty file."""
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            now = self._path.stat()
            if (now.st_dev, now.st_ino) == (full.st_dev, full.st_ino):  # else another writer has rotated it already
                try:
                    shift(self._path)
                except OSError:
                    os.ftruncate(self._file, 0)  # an unwritable folder: a log's end matters more than its beginning
                    return
        self.close()


def shift(log: Path) -> None:
    """Renames NAME.log to NAME.log.1, that to NAME.log.2, and so on; the oldest is deleted. Raises OSError."""
    aside = _aside(log)
    for older, newer in zip(reversed(aside), [*reversed(aside[:-1]), log], strict=True):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(older)


def take_back(log: Path) -> None:
    """Undoes `shift`, for a log that its writer still has open. Raises OSError."""
    if log.exists():
        return
    aside = _aside(log)
    for older, newer in zip(aside, [log, *aside[:-1]], strict=True):
        with contextlib.suppress(FileNotFoundError):
            older.replace(newer)


def set_aside(log: Path) -> None:
    """Rotates the log of the previous run; without a NAME.log, deletes the older files. Raises OSError."""
    if log.is_file():
        shift(log)
    else:
        remove(log)


def remove(log: Path) -> None:
    for file in (log, *_aside(log)):
        file.unlink(missing_ok=True)


def base(path: Path) -> Path:
    """The log that a file belongs to: NAME.log, also for NAME.log.1."""
    return path.with_name(_NUMBERED.sub("", path.name))


def files(log: Path, since: float = 0.0) -> list[Path]:
    """The log's files, oldest first; rotated ones only if written at or after `since`, in seconds since the epoch."""
    there = []
    for file in reversed(_aside(log)):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime >= since:
                there.append(file)
    return [*there, *([log] if log.is_file() else [])]


def newest_first(log: Path) -> list[Path]:
    """Where the log's files may be, from the one being written to the oldest."""
    return [log, *_aside(log)]


def _aside(log: Path) -> list[Path]:
    return [log.with_name(f"{log.name}.{number}") for number in range(1, FILES)]
