"""Tells when a file changed on disk, so that keys and certificates are taken up without a restart."""

from pathlib import Path


class FileWatch:
    """Remembers what some files looked like. Links are followed: Kubernetes changes secrets by moving one."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._stamp = self._look()

    def has_changed(self) -> bool:
        """Did any of them change since the last call? Costs one stat a file."""
        before, self._stamp = self._stamp, self._look()
        return self._stamp != before

    def _look(self) -> list[tuple[int, ...] | None]:
        stamps: list[tuple[int, ...] | None] = []
        for path in self._paths:
            try:
                seen = path.stat()
            except OSError:
                stamps.append(None)
            else:
                stamps.append((seen.st_mtime_ns, seen.st_size, seen.st_ino, seen.st_dev))
        return stamps
