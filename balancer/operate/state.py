"""The folder of one service under XDG_STATE_HOME: its lock, control socket, logs, and the balancer's service file."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO


class AlreadyUp(Exception):
    """Another `groundserve up` runs this service."""


@dataclass(frozen=True, slots=True)
class Left:
    """Where a balancer that outlived its controller listens, HOST:PORT each."""

    listen: str
    admin: str


class ServiceFolder:
    """Where one service keeps its files. They stay after it went down; only the lock says that it is up."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / name
        self.socket = self.path / "control.sock"
        # A folder of its own, because a container is given folders: a file it would go on seeing as it was.
        self.service_file = self.path / "balancer" / "service.yaml"
        self.balancer_log = self.path / "balancer.log"
        self.controller_log = self.path / "controller.log"
        self.admin_key_file = self.path / "admin.key"
        # What outlives its controller says here where it is found; only while it is to be there.
        self._left_file = self.path / "left.json"

    def claim(self) -> TextIO:
        """Makes the folder and locks it for as long as the file stays open, however the process ends.

        Logs of an earlier life are removed. Raises AlreadyUp.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # The control socket in it is as private as the folder.
        self.path.chmod(0o700)
        # Not inherited by children (PEP 446): the lock is ours alone.
        lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise AlreadyUp from None
        for old in (*self.path.glob("*.log"), self.socket):
            old.unlink(missing_ok=True)
        return lock

    def sign(self, lock: TextIO) -> None:
        """Leaves our process id in the lock, for `down` to use when nothing else works."""
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

    def holder(self) -> int | None:
        """The process that signed the lock, if it still holds it."""
        signed = (self.path / "lock").read_text().strip() if self.is_up() else ""
        return int(signed) if signed.isdecimal() else None

    def is_up(self) -> bool:
        """Does a `groundserve up` hold the lock now?"""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def left(self) -> Left | None:
        """Where the service serves on without its controller; None where nothing was left."""
        if self.is_up() or not self._left_file.exists():
            return None
        return Left(**json.loads(self._left_file.read_text()))

    def leave(self, left: Left) -> None:
        """From now on the service would outlive its controller."""
        self._left_file.write_text(json.dumps(asdict(left)))

    def left_nothing(self) -> None:
        self._left_file.unlink(missing_ok=True)

    def write_service_file(self, text: str) -> Path:
        """Makes the file anew, whole at any moment, for a balancer that looks at it again and again.

        A readiness probe's headers may hold a key. Other users are kept from it by our own folder's mode; inside a
        container that is given only the inner folder, its user can read it.
        """
        inner = self.service_file.parent
        inner.mkdir(exist_ok=True)
        inner.chmod(0o755)
        fresh = self.service_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.replace(self.service_file)
        return self.service_file

    def replica_log(self, id: int) -> Path:
        return self.path / f"replica-{id}.log"

    def replica_logs(self) -> list[Path]:
        """Of all replicas that there were, in order of their numbers."""
        return sorted(self.path.glob("replica-*.log"), key=lambda path: int(path.stem.removeprefix("replica-")))


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder with one folder a service."""
    base = environ.get("XDG_STATE_HOME") or ""
    # The specification: a path that is not absolute is to be ignored.
    home = Path(base) if base.startswith("/") else Path("~/.local/state").expanduser()
    return home / "groundserve"


def folders(root: Path) -> list[ServiceFolder]:
    """All services that ever were, in order of their names."""
    return [ServiceFolder(root, path.parent.name) for path in sorted(root.glob("*/lock"))]
