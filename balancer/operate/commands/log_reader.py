"""Reads one rotating log: all of it or its last lines, then the lines that are appended later."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from balancer.operate.engines import rotation

_BLOCK = 64 * 1024


class LogReader:
    """`files` are the log's files at first, oldest first; empty if there is no log yet. Use it in a `with`."""

    def __init__(self, log: Path, files: Sequence[Path]) -> None:
        self._log = log
        self._file: BinaryIO | None = None
        self._before: list[BinaryIO] = []
        self._rest = b""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                self._before.append(file.open("rb"))
        if self._before:
            self._file = self._before.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._before, self._file):
            if file is not None:
                file.close()

    def all(self) -> Iterator[str]:
        """All lines so far. An unfinished line is kept for `more`."""
        for file in self._before:
            yield from self._read(file)
            file.close()
        if self._file is not None:
            yield from self._read(self._file)

    def last(self, count: int) -> list[str]:
        """The last lines, read from the end, so that a large log takes no longer than a short one."""
        blocks: list[bytes] = []
        ends = 0
        there = [*self._before, *([self._file] if self._file is not None else [])]
        end = [file.seek(0, os.SEEK_END) for file in there]
        for file, size in zip(reversed(there), reversed(end), strict=True):
            position = size
            while position > 0 and ends <= count:
                start = max(0, position - _BLOCK)
                file.seek(start)
                blocks.append(file.read(position - start))
                ends += blocks[-1].count(b"\n")
                position = start
            file.seek(size)
        lines = _lines(b"".join(reversed(blocks)))
        return lines[max(0, len(lines) - count) :]

    def more(self) -> Iterator[str]:
        """The lines completed since the last call, even if the log has been rotated meanwhile."""
        if self._file is None:
            self._file = _opened(self._log)
        while self._file is not None:
            there = os.fstat(self._file.fileno())
            # Opened before the rest is read, because a file that has been rotated gets no more lines.
            newer = self._newer(there)
            if there.st_size < self._file.tell():
                self._file.seek(0)  # the file was truncated
            yield from self._read(self._file)
            if newer is None:
                return
            self._file.close()
            self._file = newer

    def rest(self) -> list[str]:
        """The last line, if it is unfinished."""
        lines, self._rest = _lines(self._rest), b""
        return lines

    def _read(self, file: BinaryIO) -> Iterator[str]:
        while block := file.read(_BLOCK):
            self._rest += block
            # A progress bar ends its lines with a carriage return.
            if cut := max(self._rest.rfind(b"\n"), self._rest.rfind(b"\r")) + 1:
                lines, self._rest = _lines(self._rest[:cut]), self._rest[cut:]
                yield from lines

    def _newer(self, mine: os.stat_result) -> BinaryIO | None:
        """The file that continues ours, opened; None if ours is the newest, or if there are no files.

        Read from the newest to the oldest, the way that files move, a rotation meanwhile hides no file: at most one is
        seen twice.
        """
        newer = None
        for path in rotation.newest_first(self._log):
            if (file := _opened(path)) is None:
                continue
            if _same(seen := os.fstat(file.fileno()), mine):
                file.close()
                return newer
            if newer is not None and _same(seen, os.fstat(newer.fileno())):
                file.close()
                continue
            if newer is not None:
                newer.close()
            newer = file
        return newer  # ours is gone: continue with the oldest file


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _opened(file: Path) -> BinaryIO | None:
    try:
        return file.open("rb")
    except FileNotFoundError:
        return None


def _lines(text: bytes) -> list[str]:
    return [line.decode(errors="replace") for line in text.splitlines()]
