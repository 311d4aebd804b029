"""Small files of a service's state: written atomically, with a clear message for one that cannot be used."""

import os
from pathlib import Path

from balancer.errors import ConfigError


class BrokenState(ConfigError):
    """A state file that cannot be used. The message is one line that names it."""


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes the file atomically: even after a power failure it is either old or new. Raises BrokenState."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        _write(fresh, path, text, mode)
    except OSError as failure:
        raise BrokenState(f"{path} cannot be written: {failure.strerror}") from None


def _write(fresh: Path, path: Path, text: str, mode: int) -> None:
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # regardless of the umask and of a file left by an earlier attempt
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    # The rename has to reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_whole(path: Path) -> str | None:
    """The content of the file, or None if there is no file; raises BrokenState."""
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as failure:
        raise broken(path, getattr(failure, "strerror", None) or "it is not text") from None


def broken(path: Path, why: str | None) -> BrokenState:
    return BrokenState(f"{path} cannot be used ({why}): remove it")
