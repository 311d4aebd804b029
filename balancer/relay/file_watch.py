"""Tells when a file changed on disk, so that keys and certificates are taken up without a restart."""

from pathlib import Path

# What to do about a file that `is_cut_off`.
MOUNT_ITS_FOLDER = (
    "it was replaced outside this container, which sees the old one for good: start the container anew, and \
mount the folder it lies in rather than the file"
)


class FileWatch:
    """Remembers what some files looked like. Links are followed: Kubernetes changes secrets by moving one."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._stamp = self._look()
        self._named = [seen is None or seen[-1] > 0 for seen in self._stamp]

    @property
    def is_cut_off(self) -> bool:
        """Did one of them lose its last name, as it stood at the last look?

        A container sees a single file that is mounted into it by its inode: an editor that writes a new file under the
        old name leaves it the old one, which nobody can change any more. Not told where names were never counted.
        """
        return any(
            seen is not None and seen[-1] == 0 and named for seen, named in zip(self._stamp, self._named, strict=True)
        )

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
                stamps.append((seen.st_mtime_ns, seen.st_size, seen.st_ino, seen.st_dev, min(seen.st_nlink, 1)))
        return stamps
