"""The memory of a simulated GPU, which the processes of a machine share: who holds how much, freed by the kernel."""

import contextlib
import os
from pathlib import Path

from replica import lock_file


class OutOfMemory(Exception):
    """More was asked of a card than it has free."""


class Held:
    """One replica's memory on one card, in bytes. It is free again once the descriptor closes, however that comes."""

    def __init__(self, directory: Path, gpu: str, total: int) -> None:
        self._directory, self._gpu, self._total = directory, gpu, total
        self._path, self._descriptor = _own_file(directory, gpu)
        self.size = 0

    def free(self) -> int:
        """What the card has free for all."""
        return self._total - sum(_said(path) for path in self._directory.glob(f"{self._gpu}.memory-*"))

    def take(self, size: int) -> None:
        """Raises OutOfMemory."""
        if size > (free := self.free()):
            raise OutOfMemory(f"CUDA out of memory: tried to allocate {size} bytes, {free} are free on {self._gpu}")
        self._say(self.size + size)

    def give_back(self, size: int) -> None:
        self._say(self.size - size)

    def close(self) -> None:
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _say(self, size: int) -> None:
        self.size = size
        lock_file.write(self._descriptor, {"bytes": size})


def _own_file(directory: Path, gpu: str) -> tuple[Path, int]:
    for number in range(1000):
        path = directory / f"{gpu}.memory-{number}"
        if (descriptor := lock_file.lock(path)) is not None:
            lock_file.write(descriptor, {"bytes": 0})
            os.set_inheritable(descriptor, False)
            return path, descriptor
    raise AssertionError(f"a thousand replicas on {gpu}")


def _said(path: Path) -> int:
    """What the owner of this file holds; nothing if it has ended."""
    with contextlib.suppress(OSError):
        descriptor = lock_file.open_plain(path, os.O_RDONLY)
        try:
            return int(lock_file.read(descriptor).get("bytes", 0)) if lock_file.is_locked(descriptor) else 0
        finally:
            os.close(descriptor)
    return 0
