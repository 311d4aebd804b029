"""The GPU lease: one flock per GPU in a directory that all replicas of a host share.

Replicas that share a GPU hold its lock as a shared one, which keeps all others out; replica/turn.py decides whose turn
it is among them.

The descriptors stay open across exec, so the kernel frees a GPU when SGLang's main process dies, however it dies: its
children close the descriptors that they inherit, or end with it (replica/plugin.py). Compose gives every replica of a
service all of the machine's GPUs; the lease is what makes each replica use its own.
"""

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from replica import lock_file, placement, turn
from replica.gpu import Gpu
from replica.placement import Want
from replica.turn import TooManyTenantsError, Turn

_POLL = 0.2  # seconds between two searches for a free group
_TURN_POLL = 0.05  # seconds between two tries for the turn
# Minimum seconds for which `take` tries: `holder`, which only asks who has a lease, locks it itself for microseconds.
_GLANCE = 0.1
# A lease that ended within this many seconds was probably a failed start; its GPU then ranks behind others for
# _FAILURE_STANDS seconds.
_FAILED_WITHIN = 120.0
_FAILURE_STANDS = 3600.0


class LeaseError(Exception):
    """No lease can be taken; the message says why, who holds the GPUs, and what to do."""


class AllHeldError(LeaseError):
    """Other replicas hold every suitable GPU; a later try may find one free."""


@dataclass(frozen=True)
class Lease:
    """GPUs leased to this process, also after exec, for as long as it keeps the descriptors open."""

    gpus: tuple[Gpu, ...]
    descriptors: tuple[int, ...]
    # For shared GPUs: this replica's part in the turns; it has the turn.
    turn: Turn | None = None

    def release(self) -> None:
        if self.turn is not None:
            self.turn.leave()
        for descriptor in self.descriptors:
            os.close(descriptor)


def take(
    gpus: Sequence[Gpu],
    want: Want,
    directory: Path,
    *,
    wait: float,
    note: str,
    is_shared: bool = False,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
    tell: Callable[[str], None] = lambda _: None,
) -> Lease:
    """Leases `want.count` of `gpus`: an aligned group (0-1, 2-3, ... for two), all of it or nothing.

    Aligned, because neighbours share the fastest links; all or nothing, because two replicas that each hold half of
    what both need would wait for each other for ever. Among the free groups, those with enough free memory come first,
    then those on which no replica failed to start recently (placement.best_first). If the machine has GPUs of the
    wanted kinds, only those are leased. Waits up to `wait` seconds. `note` tells others who holds the lease. Raises
    LeaseError. `tell` gets a line once it has to wait: for what, and who has it.

    is_shared: share the GPUs with other replicas that share; those with the fewest tenants come first. Also waits for
    its turn there.
    """
    if not placement.groups(gpus, want):
        raise LeaseError(_too_many(gpus, want))
    _make_shared(directory)
    give_up = clock() + max(wait, _GLANCE)
    is_told = False
    while True:
        ranked = best_first(gpus, want, directory, now())
        if is_shared:
            ranked.sort(key=lambda group: max(len(turn.neighbours(directory, gpu.uuid)) for gpu in group))
        for group in ranked:
            descriptors = _lock_all(group, directory, is_shared)
            if descriptors is None:
                continue
            if not is_shared:
                _sign(descriptors, note, now())
                return Lease(tuple(group), descriptors)
            try:
                first = _first_turn(group, directory, note, give_up, clock, pause, now, tell)
            except LeaseError:
                Lease(tuple(group), descriptors).release()
                raise
            return Lease(tuple(group), descriptors, first)
        whole = [gpu for gpu in gpus if not gpu.mig]
        kinds = _of_kind(gpus, want)
        if not is_told and wait > _GLANCE:
            tell(f"waits for {_gpus(want.count)}{kinds} ({_holders(whole, directory)})")
            is_told = True
        if clock() >= give_up:
            holders = _holders(whole, directory)
            raise AllHeldError(
                f"no {_gpus(want.count)} free{kinds} among this machine's {len(whole)} after {wait:g} s ({holders}): "
                "run fewer replicas, or give each fewer GPUs"
            )
        pause(_POLL if wait > _GLANCE else _GLANCE / 10)


def _first_turn(
    group: Sequence[Gpu],
    directory: Path,
    note: str,
    give_up: float,
    clock: Callable[[], float],
    pause: Callable[[float], None],
    now: Callable[[], float],
    tell: Callable[[str], None],
) -> Turn:
    """Waits for the turn, as loading takes the GPU's memory just as serving does. `give_up`: a time of `clock`."""
    mine: Turn | None = None
    try:
        mine = Turn.join(directory, [gpu.uuid for gpu in group], note, now())
        is_told = False
        while not mine.take(now()):
            there = "; ".join(f"GPU {gpu.index}: {', '.join(_others(gpu, mine))}" for gpu in group)
            if not is_told:
                tell(f"waits for its turn to start ({there})")
                is_told = True
            if clock() >= give_up:
                mine.leave()
                raise AllHeldError(f"it is not this replica's turn yet ({there})")
            pause(_TURN_POLL)
    except OSError as error:
        if mine is not None:
            mine.leave()
        raise LeaseError(
            f"cannot take turns in {directory} ({error.strerror}): is LEASE_DIR shared with another user?"
        ) from None
    except TooManyTenantsError as error:
        raise AllHeldError(str(error)) from None
    return mine


def _others(gpu: Gpu, mine: Turn) -> list[str]:
    return [f"{one.note} ({one.state.lower()})" for one in mine.others() if one.gpu == gpu.uuid]


def _failed_at(said: Mapping[str, Any], now: float) -> float:
    """When a replica last failed to start on a GPU, according to its lease file; 0 if not recently."""
    if 0 <= now - lock_file.number(said, "started_at") < _FAILED_WITHIN:
        return lock_file.number(said, "started_at")
    failed_at = lock_file.number(said, "failed_at")
    return failed_at if 0 <= now - failed_at < _FAILURE_STANDS else 0.0


def _holders(gpus: Sequence[Gpu], directory: Path) -> str:
    return "; ".join(f"GPU {gpu.index}: {_state(gpu, directory)}" for gpu in gpus)


def _state(gpu: Gpu, directory: Path) -> str:
    return gpu.problem or holder(gpu, directory) or "free"


def best_first(gpus: Sequence[Gpu], want: Want, directory: Path, now: float) -> list[list[Gpu]]:
    """The groups that may be leased, including held ones, in the order in which `take` tries them without sharing."""
    failures = {gpu: _failed_at(lock_file.read_at(_path(gpu, directory)), now) for gpu in gpus}
    return placement.best_first(placement.groups(gpus, want), want, failures)


def holder(gpu: Gpu, directory: Path, *, is_shared: bool = False) -> str | None:
    """Who holds the lease of a GPU, in words; None if it is free.

    is_shared: asked for a replica that would share it, so replicas that share it do not count.
    """
    path = _path(gpu, directory)
    try:
        descriptor = lock_file.open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"unknown ({error.strerror})"
    try:
        if lock_file.is_locked(descriptor, is_shared=True):
            said = lock_file.read(descriptor)
            try:
                return f"{said['note']} (process {said['pid']} on {said['host']}, since {said['since']})"
            except KeyError:
                return "a replica that has just started"  # locked, not yet signed
        if not is_shared and lock_file.is_locked(descriptor):
            there = sharers(gpu, directory)
            return f"shared by {', '.join(there)}" if there else "a replica that has just started"
    finally:
        os.close(descriptor)
    return None


def sharers(gpu: Gpu, directory: Path) -> list[str]:
    """The replicas that share a GPU: the note and state of each."""
    return [
        f"{one.note}{f' ({one.state.lower()})' if one.state else ''}" for one in turn.neighbours(directory, gpu.uuid)
    ]


def _path(gpu: Gpu, directory: Path) -> Path:
    return directory / f"{gpu.uuid}.lock"


def _make_shared(directory: Path) -> None:
    try:
        try:
            directory.mkdir(parents=True)
            directory.chmod(0o1777)  # like /tmp: other users' replicas lease here as well
        except FileExistsError:
            pass
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "it is no folder, or a link to one")
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise PermissionError(errno.EPERM, "others may remove what lies in it: chmod +t")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LeaseError(
            f"cannot keep leases in {directory} ({error.strerror}): "
            "set LEASE_DIR to a folder that all replicas of this machine share and may write to"
        ) from None


def _lock_all(group: Sequence[Gpu], directory: Path, is_shared: bool) -> tuple[int, ...] | None:
    descriptors: list[int] = []
    for gpu in group:
        path = _path(gpu, directory)
        try:
            descriptor = lock_file.lock(path, is_shared=is_shared)
        except OSError as error:
            _close(descriptors)
            raise LeaseError(
                f"cannot open the lease {path} ({error.strerror}): is LEASE_DIR shared with another user?"
            ) from None
        if descriptor is None:
            _close(descriptors)
            return None
        descriptors.append(descriptor)
    return tuple(descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _sign(descriptors: Sequence[int], note: str, now: float) -> None:
    """Writes who holds the lease, for others to read, and when a replica last failed to start with it."""
    since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    said = {"note": note[:300], "pid": os.getpid(), "host": socket.gethostname(), "since": since, "started_at": now}
    for descriptor in descriptors:
        lock_file.write(descriptor, {**said, "failed_at": _failed_at(lock_file.read(descriptor), now)})


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else f"aligned group of {count} GPUs"


def _of_kind(gpus: Sequence[Gpu], want: Want) -> str:
    """Names the wanted kinds; empty if the machine has none of them, because then any GPU may be leased."""
    is_here = any(want.is_met_by(gpu) for gpu in gpus)
    return f" of kind {' or '.join(want.kinds)}" if want.kinds and is_here else ""


def _too_many(gpus: Sequence[Gpu], want: Want) -> str:
    usable = placement.usable(gpus, want)
    kind = _of_kind(gpus, want)
    can = f"{len(usable)} NVIDIA GPU{'' if len(usable) == 1 else 's'}{kind}"
    there = f"{can} can be leased here, but this replica needs {want.count}"
    if failed := [f"GPU {gpu.index} ({gpu.problem})" for gpu in gpus if gpu.problem]:
        return f"{there}: {', '.join(failed)} cannot be used; reset it (nvidia-smi -r) or reboot"
    if split := sum(gpu.mig for gpu in gpus):
        return f"{there}: {split} more are split by MIG; turn MIG off (nvidia-smi -mig 0)"
    if not gpus:
        return f"{there}: check nvidia-smi and, in a container, that the NVIDIA container toolkit is set up"
    return f"{there}: lower --gpus (GPUS_PER_REPLICA){', or name other kinds' if kind else ''}"
