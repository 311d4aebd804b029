"""Tells when a file has changed on disk, so that keys and certificates are reloaded without a restart."""

from pathlib import Path

# What to do about a file that `is_cut_off`.
MOUNT_ITS_FOLDER = (
    "it was replaced outside this container, which sees the old one for good: start the container anew, and \
mount the folder it lies in rather than the file"
)


class FileWatch:
    """Remembers the state of some files. Symbolic links are followed: Kubernetes updates secrets by moving one."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._stamp = self._look()
        self._named = [seen is None or seen[-1] > 0 for seen in self._stamp]

    @property
    def is_cut_off(self) -> bool:
        """Had one of the files lost its last name (a link count of 0) at the last check?

        A single file mounted into a container is bound by its inode: if an editor writes a new file under the old name,
        the container keeps the old one, which nobody can change any more. Files whose link count was 0 from the start
        are ignored: their file system does not count links.
        """
        return any(
            seen is not None and seen[-1] == 0 and named for seen, named in zip(self._stamp, self._named, strict=True)
        )

    def has_changed(self) -> bool:
        """Has any of the files changed since the last call? Costs one stat per file."""
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
