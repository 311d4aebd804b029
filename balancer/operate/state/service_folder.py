"""The folder of one service under XDG_STATE_HOME: its lock, control socket, logs, keys, and the balancer's file."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from balancer.operate.engines import rotation
from balancer.operate.state.desired import Desired
from balancer.operate.state.holder import Holder
from balancer.operate.state.state_file import BrokenState, broken, read_whole, write_whole

# Seconds for which `claim` tries to get the lock, because `is_up` also holds it for a few microseconds.
_CLAIMING = 0.5
# Logs to keep of replicas that are gone. Updates and drains use new ids, so logs would pile up.
_GONE_LOGS = 20


class AlreadyUp(Exception):
    """Another `groundserve up` runs this service."""


class ServiceFolder:
    """The files of one service. They stay after it has gone down; only the lock shows whether it is up."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / name
        self.socket = self.path / "control.sock"
        # In its own folder, because a container has to mount the folder: a mounted file would never change for it.
        self.service_file = self.path / "balancer" / "service.yaml"
        self.balancer_log = self.path / "balancer.log"
        self.controller_log = self.path / "controller.log"
        # Not one of the *.log that each run begins anew: its files tell of earlier runs, too.
        self.event_log = self.path / "events.jsonl"
        self.admin_key_file = self.path / "admin.key"
        self.replica_key_file = self.path / "replica.key"
        self._lock_file = self.path / "lock"
        # Exists while the service is meant to.
        self._desired_file = self.path / "desired.json"
        self._plan_file = self.path / "mem-fraction"

    def claim(self) -> TextIO:
        """Creates the folder and locks it for as long as the returned file stays open, however the process ends.

        Renames the logs of the previous run to NAME.log.1. Raises AlreadyUp, and OSError if the folder cannot be used.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The folder's mode also protects the control socket in it.
        self.path.chmod(0o700)
        # Not inherited by children (PEP 446): the lock is ours alone.
        lock = self._lock_file.open("a")
        try:
            _lock(lock)
            self.sign(lock)
            for log in {rotation.base(path) for path in self.path.glob("*.log*")}:
                rotation.set_aside(log)
            self.socket.unlink(missing_ok=True)
        except BaseException:
            lock.close()
            raise
        return lock

    def sign(self, lock: TextIO) -> None:
        """Writes our identity into the lock file, so that `down` can signal us if we do not answer."""
        lock.truncate(0)
        lock.write(Holder.ours().to_text())
        lock.flush()

    def holder(self) -> Holder | None:
        """The process that signed the lock, if it still holds it."""
        return self._signed() if self.is_up() else None

    def is_up(self) -> bool:
        """Does a `groundserve up` hold the lock now? Raises BrokenState if that cannot be determined."""
        try:
            with self._lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except BlockingIOError:
            return True
        except OSError as failure:
            raise broken(self._lock_file, failure.strerror) from None
        return False

    @property
    def is_detached(self) -> bool:
        """May the service still serve although its controller is gone? Raises BrokenState if that is unknown."""
        if not os.path.lexists(self._desired_file) or self.is_up():
            return False
        try:
            desired = self.desired
        except BrokenState:
            return True
        return desired is not None and desired.is_left

    @property
    def desired(self) -> Desired | None:
        """What the service is meant to be; None if it is not meant to exist. Raises BrokenState."""
        text = read_whole(self._desired_file) if os.path.lexists(self._desired_file) else None
        if text is None:
            return None
        desired = Desired.from_text(text)
        if desired is None:
            raise BrokenState(f"{self._desired_file} cannot be used (it is not whole): groundserve down {self.name}")
        return desired

    def write_desired(self, desired: Desired) -> None:
        """Call it before anything is started that outlives the controller. Raises BrokenState."""
        write_whole(self._desired_file, desired.to_text())

    def remove_desired(self) -> None:
        """Call it when the service is not meant to exist any more, and nothing of it is running. Raises BrokenState."""
        try:
            self._desired_file.unlink(missing_ok=True)
        except OSError as failure:
            raise broken(self._desired_file, failure.strerror) from None

    @property
    def planned_fraction(self) -> float | None:
        """Its share of each GPU that it shares, as planned with those that it came up with. Raises BrokenState."""
        text = read_whole(self._plan_file)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise broken(self._plan_file, "it is no number") from None

    def write_planned_fraction(self, share: float) -> None:
        """Raises BrokenState."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as failure:
            raise broken(self.path, failure.strerror) from None
        write_whole(self._plan_file, f"{share:g}")

    def write_service_file(self, text: str) -> Path:
        """Replaces the file atomically, because a running balancer rereads it.

        A readiness probe's headers may hold a key. The outer folder's mode keeps other users out; a container mounts
        only the inner folder, where its user can read the file. Raises BrokenState.
        """
        inner = self.service_file.parent
        try:
            # A balancer that starts again needs no room on a disk that is full.
            if self.service_file.read_text("utf-8") == text:
                return self.service_file
        except (OSError, UnicodeDecodeError):
            pass
        try:
            inner.mkdir(exist_ok=True)
            inner.chmod(0o755)
        except OSError as failure:
            raise broken(inner, failure.strerror) from None
        write_whole(self.service_file, text, 0o644)
        return self.service_file

    def replica_log(self, id: int) -> Path:
        return self.path / f"replica-{id}.log"

    def replica_logs(self) -> list[Path]:
        """The logs of all replicas, including past ones, in order of their ids."""
        return [log for _, log in sorted(self._numbered_logs())]

    def trim_replica_logs(self, there: set[int]) -> None:
        """Removes the logs of replicas that are gone, except the newest ones; `there` holds the ids in use."""
        gone = sorted((id, log) for id, log in self._numbered_logs() if id not in there)
        for _, log in gone[:-_GONE_LOGS]:
            rotation.remove(log)

    def log_files(self, log: Path) -> list[Path]:
        """The files that hold the current run's part of a log, oldest first."""
        signed = self._signed()
        return rotation.files(log, since=signed.since if signed is not None else 0.0)

    def _numbered_logs(self) -> Iterator[tuple[int, Path]]:
        for path in self.path.glob("replica-*.log"):
            number = path.stem.removeprefix("replica-")
            if number.isdecimal() and path.is_file():
                yield int(number), path

    def _signed(self) -> Holder | None:
        try:
            return Holder.from_text(read_whole(self._lock_file) or "")
        except BrokenState:
            return None


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that holds a folder for each service."""
    base = environ.get("XDG_STATE_HOME") or ""
    # The XDG specification says to ignore a path that is not absolute.
    home = Path(base) if base.startswith("/") else Path("~/.local/state").expanduser()
    return home / "groundserve"


def folders(root: Path) -> list[ServiceFolder]:
    """Every service that has ever run here, sorted by name; raises BrokenState if that cannot be determined."""
    try:
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not _has_none(path / "lock"))
    except FileNotFoundError:
        return []
    except OSError as failure:
        raise BrokenState(f"{root}: {failure.strerror}: set XDG_STATE_HOME to a folder that can be read") from None
    return [ServiceFolder(root, name) for name in names]


def _has_none(path: Path) -> bool:
    """Does the file certainly not exist?"""
    try:
        path.lstat()
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def _lock(lock: TextIO) -> None:
    """Takes the lock; raises AlreadyUp if it stays held for longer than `is_up` needs."""
    give_up = time.monotonic() + _CLAIMING
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise AlreadyUp from None
            time.sleep(0.002)
        else:
            return
