"""Whose turn it is on GPUs that several replicas share, and who waits: one lock for the turn, a file for each tenant.

A tenant's weights stay on the GPU unless it is asleep; its KV cache is there only while it has the turn. Each GPU has

    UUID.lock        the lease: shared by its tenants, exclusive for a replica that does not share (replica/lease.py)
    UUID.turn        the turn: exclusive, held while starting or awake
    UUID.tenant-N    one tenant's own, locked as long as it lives: who it is, its state, and since when it waits

Only locks keep others out; the content of a tenant's file is information. It counts only while the file is locked, so
that a killed tenant leaves nothing behind.
"""

import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from replica import lock_file

# The variable that tells a replica that shares, after exec, which locks it holds.
HELD = "REPLICA_TURN"
MOST_TENANTS = 16  # per GPU
# A waiting tenant that has not renewed its file for this many seconds is passed over: it was stopped, or hangs.
_SILENT = 2.0
_SAY_AGAIN = 0.5
_LONGEST_NOTE = 300
_AHEAD = 1.0  # before anybody can have begun to wait, in seconds since the epoch


class TooManyTenantsError(Exception):
    """A GPU has no place for another tenant; the message names it."""


@dataclass(frozen=True)
class Neighbour:
    """Another tenant of one of our GPUs. Times in seconds since the epoch.

    by: the name of the balancer that orders its turns; empty: none. waiting_since: 0 while it does not wait for its
    turn. entered_at: when it entered its state. lacked_at: when it last looked for memory to start with, and this GPU
    had too little; 0 if it had enough.
    """

    gpu: str
    note: str
    pid: int
    host: str
    state: str
    by: str
    waiting_since: float
    said_at: float
    entered_at: float
    lacked_at: float

    def waits(self, now: float) -> bool:
        return self.waiting_since > 0 and now - self.said_at < _SILENT


class Turn:
    """One tenant's part in the turns on its GPUs. It gets the turn on all of them at once or on none."""

    def __init__(self, directory: Path, gpus: Sequence[str], turns: Sequence[int], own: Mapping[str, int], note: str):
        # In the order of their UUIDs: two tenants that want the same pair must not each take one half.
        self.gpus = tuple(sorted(gpus))
        self.is_mine = True
        self._directory = directory
        self._turns = dict(zip(self.gpus, turns, strict=True))
        self._own = dict(own)  # descriptors of its own files by name: "UUID.tenant-3"
        self._said: dict[str, Any] = {
            "note": note[:_LONGEST_NOTE],
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "state": "STARTING",
            "by": "",
            "waiting_since": 0.0,
            "said_at": 0.0,
            "entered_at": 0.0,
            "lacks": {},
        }

    @classmethod
    def join(cls, directory: Path, gpus: Sequence[str], note: str, now: float) -> Self:
        """A new tenant of these GPUs, which does not have the turn yet. Raises OSError and TooManyTenantsError."""
        own: dict[str, int] = {}
        turns: list[int] = []
        try:
            for gpu in sorted(gpus):
                name, descriptor = _free_place(directory, gpu)
                own[name] = descriptor
                turns.append(_opened(directory / f"{gpu}.turn"))
        except BaseException:
            for descriptor in (*own.values(), *turns):
                os.close(descriptor)
            raise
        made = cls(directory, gpus, turns, own, note)
        made.is_mine = False
        made.say(now)
        return made

    @classmethod
    def inherit(cls, environ: Mapping[str, str]) -> Self:
        """The tenant that this process was before exec, which has joined and taken the turn."""
        held = json.loads(environ[HELD])
        return cls(Path(held["directory"]), held["gpus"], held["turns"], held["own"], held["note"])

    def environ(self) -> dict[str, str]:
        held = {
            "directory": str(self._directory),
            "gpus": self.gpus,
            "turns": [self._turns[gpu] for gpu in self.gpus],
            "own": self._own,
            "note": self._said["note"],
        }
        return {HELD: json.dumps(held)}

    @property
    def note(self) -> str:
        return str(self._said["note"])

    @property
    def waiting_since(self) -> float:
        return float(self._said["waiting_since"])

    def say(self, now: float, **changed: str | float | Mapping[str, float]) -> None:
        """Updates its own files. On a full disk others read outdated content; no lock depends on it."""
        if "state" in changed:
            self._said["entered_at"] = now
        self._said |= changed
        self._said["said_at"] = now
        since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        self._said.setdefault("since", since)
        for name in list(self._own):
            with suppress(OSError):
                self._own[name] = _in_place(self._own[name], self._directory / name)
                lock_file.write(self._own[name], self._said)

    def take(self, now: float, by: str = "", *, is_ahead: bool = False) -> bool:
        """Takes the turn, or waits for it from now on: tenants that have waited longer go first. Raises OSError.

        is_ahead: it waits as if it had waited longer than any other. One that cannot take the turn (OSError) does not
        wait, and keeps none of it: it would be in the way of those that can.
        """
        if self.is_mine:
            return True
        if not self.waiting_since or (is_ahead and self.waiting_since > _AHEAD):
            self.say(now, waiting_since=_AHEAD if is_ahead else now, by=by)
        elif now - self._said["said_at"] > _SAY_AGAIN or by != self._said["by"]:
            self.say(now, by=by)
        mine = (self.waiting_since, self._said["host"], self._said["pid"])
        if any((other.waiting_since, other.host, other.pid) < mine for other in self.others() if other.waits(now)):
            return False
        try:
            self._lock_all()
        except BlockingIOError:
            return False
        except OSError:
            self.stop_waiting(now)
            raise
        self.is_mine = True
        self.say(now, waiting_since=0.0)
        return True

    def _lock_all(self) -> None:
        """Takes all of its locks or none. Raises BlockingIOError if another has one, and OSError."""
        taken: list[int] = []
        try:
            for gpu in self.gpus:
                path = self._directory / f"{gpu}.turn"
                if not lock_file.is_at(self._turns[gpu], path):
                    # The new one first: a number that is closed and kept would soon be another file's.
                    stale, self._turns[gpu] = self._turns[gpu], _opened(path)
                    os.close(stale)
                fcntl.flock(self._turns[gpu], fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken.append(self._turns[gpu])
        except OSError:
            for descriptor in taken:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            raise

    def is_asked_for_memory(self, now: float) -> bool:
        """Is it up to this tenant, which dozes, to move its weights away, because one that starts lacks memory?

        Those that doze are asked one after the other, the one that has dozed longest first.
        """
        others = self.others()
        mine = (self._said["entered_at"], self._said["host"], self._said["pid"])
        for asks in others:
            if not asks.lacked_at or now - asks.said_at >= _SILENT:
                continue
            there = [one for one in others if one.gpu == asks.gpu]
            given_at = max((one.entered_at for one in there if one.state == "ASLEEP"), default=0.0)
            dozing = [(one.entered_at, one.host, one.pid) for one in there if one.state == "DOZING"]
            if asks.lacked_at > given_at and all(mine < one for one in dozing):
                return True
        return False

    def stop_waiting(self, now: float) -> None:
        if self.waiting_since:
            self.say(now, waiting_since=0.0)

    def give_up(self) -> None:
        for descriptor in self._turns.values():
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        self.is_mine = False

    def leave(self) -> None:
        """Closes all descriptors, which frees the turn and its place."""
        for descriptor in (*self._turns.values(), *self._own.values()):
            os.close(descriptor)
        self._turns, self._own, self.is_mine = {}, {}, False

    def others(self) -> list[Neighbour]:
        """The other tenants of its GPUs; one that shares two with us is listed twice."""
        return [one for gpu in self.gpus for one in neighbours(self._directory, gpu, set(self._own))]


def neighbours(directory: Path, gpu: str, leave_out: set[str] | None = None) -> list[Neighbour]:
    """The tenants of a GPU now, according to their files; one that has just joined may not have written its own."""
    found = []
    for name in _places(gpu):
        if leave_out and name in leave_out:
            continue
        try:
            descriptor = lock_file.open_plain(directory / name, os.O_RDONLY)
        except OSError:
            continue
        try:
            if lock_file.is_locked(descriptor):
                found.append(_neighbour(gpu, lock_file.read(descriptor)))
        finally:
            os.close(descriptor)
    return found


def _neighbour(gpu: str, said: Mapping[str, Any]) -> Neighbour:
    def text(name: str) -> str:
        value = said.get(name)
        return value if isinstance(value, str) else ""

    note = text("note") or "a replica that has just started"
    lacks = said.get("lacks")
    return Neighbour(
        gpu,
        note,
        int(lock_file.number(said, "pid")),
        text("host"),
        text("state"),
        text("by"),
        waiting_since=lock_file.number(said, "waiting_since"),
        said_at=lock_file.number(said, "said_at"),
        entered_at=lock_file.number(said, "entered_at"),
        lacked_at=lock_file.number(lacks, gpu) if isinstance(lacks, dict) else 0.0,
    )


def _places(gpu: str) -> list[str]:
    return [f"{gpu}.tenant-{number}" for number in range(MOST_TENANTS)]


def _free_place(directory: Path, gpu: str) -> tuple[str, int]:
    for name in _places(gpu):
        try:
            descriptor = lock_file.lock(directory / name)
        except OSError:
            continue  # somebody put a link or the like in its place
        if descriptor is not None:
            return name, descriptor
    raise TooManyTenantsError(f"GPU {gpu} has {MOST_TENANTS} tenants, and no place for another")


def _opened(path: Path) -> int:
    """A descriptor of a turn's file that outlives exec. Raises OSError."""
    descriptor = lock_file.open_or_make(path)
    os.set_inheritable(descriptor, True)
    return descriptor


def _in_place(descriptor: int, path: Path) -> int:
    """A descriptor with the same lock, on a new file if somebody has removed the old one."""
    if lock_file.is_at(descriptor, path):
        return descriptor
    again = lock_file.lock(path)
    if again is None:
        return descriptor
    os.close(descriptor)
    return again
