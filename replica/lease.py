"""The GPU lease: one flock per GPU in a directory that all replicas of a host share.

The descriptors stay open over exec, so the kernel frees a GPU when SGLang's main process dies, however it dies: its
children close what they inherit, or end with it (replica/plugin.py). Compose gives each replica of a service the same
devices, all of them; this is what makes one replica use one GPU.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from replica.gpu import Gpu

_POLL = 0.2  # seconds between two looks for a free group


class LeaseError(Exception):
    """There is no lease to be had; the message says why, who holds the GPUs, and what to do."""


@dataclass(frozen=True)
class Lease:
    """GPUs that are this process's own while it, or what it becomes by exec, holds the descriptors."""

    gpus: tuple[Gpu, ...]
    descriptors: tuple[int, ...]

    def release(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def take(
    gpus: Sequence[Gpu],
    count: int,
    directory: Path,
    *,
    wait: float,
    note: str,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Lease:
    """Leases `count` of `gpus`: an aligned group (0-1, 2-3, ... for two), all of it or nothing.

    Aligned, because neighbours share the fastest links; all or nothing, because two replicas that each hold
    half of what both need would wait for each other for ever. Waits up to `wait` seconds. `note` tells others
    who holds it. Raises LeaseError.
    """
    whole = [gpu for gpu in gpus if not gpu.mig]
    if count > len(whole):
        raise LeaseError(_too_many(gpus, whole, count))
    groups = [whole[start : start + count] for start in range(0, len(whole) - count + 1, count)]
    _make_shared(directory)
    give_up = clock() + wait
    while True:
        for group in groups:
            descriptors = _lock_all(group, directory)
            if descriptors is not None:
                _sign(descriptors, note)
                return Lease(tuple(group), descriptors)
        if clock() >= give_up:
            holders = "; ".join(f"GPU {gpu.index}: {holder(gpu, directory) or 'free'}" for gpu in whole)
            raise LeaseError(
                f"no {_gpus(count)} free among this machine's {len(whole)} after {wait:g} s ({holders}): "
                "run fewer replicas, or give each fewer GPUs"
            )
        pause(_POLL)


def holder(gpu: Gpu, directory: Path) -> str | None:
    """Who holds the lease of a GPU, in words; None when it is free."""
    path = _path(gpu, directory)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"unknown ({error.strerror})"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            said = json.loads(path.read_text())
            return f"{said['note']} (process {said['pid']} on {said['host']}, since {said['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "a replica that has just started"  # locked, not yet signed
    finally:
        os.close(descriptor)
    return None


def _path(gpu: Gpu, directory: Path) -> Path:
    return directory / f"{gpu.uuid}.lock"


def _make_shared(directory: Path) -> None:
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o1777)  # like /tmp: other users' replicas lease here as well
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LeaseError(
            f"cannot keep leases in {directory} ({error.strerror}): "
            "set LEASE_DIR to a folder that all replicas of this machine share and may write to"
        ) from None


def _lock_all(group: Sequence[Gpu], directory: Path) -> tuple[int, ...] | None:
    descriptors: list[int] = []
    for gpu in group:
        descriptor = _lock(_path(gpu, directory))
        if descriptor is None:
            for other in descriptors:
                os.close(other)
            return None
        descriptors.append(descriptor)
    return tuple(descriptors)


def _lock(path: Path) -> int | None:
    """An inheritable descriptor that holds the file's lock, or None when another process has it."""
    try:
        try:
            # Without O_CREAT first: with it the kernel may refuse another user's file in a sticky folder.
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            os.fchmod(descriptor, 0o666)  # the umask would shut other users out
    except OSError as error:
        raise LeaseError(
            f"cannot open the lease {path} ({error.strerror}): is LEASE_DIR shared with another user?"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Someone may have removed the file in between: a lock on a file without a name keeps nobody out.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            os.set_inheritable(descriptor, True)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _sign(descriptors: Sequence[int], note: str) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    said = json.dumps({"note": note, "pid": os.getpid(), "host": socket.gethostname(), "since": since})
    for descriptor in descriptors:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{said}\n".encode(), 0)


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else f"aligned group of {count} GPUs"


def _too_many(gpus: Sequence[Gpu], whole: Sequence[Gpu], count: int) -> str:
    can = f"{len(whole)} NVIDIA GPU{'' if len(whole) == 1 else 's'}"
    there = f"{can} can be leased here, but this replica needs {count}"
    if len(whole) < len(gpus):
        return f"{there}: {len(gpus) - len(whole)} more are split by MIG; turn MIG off (nvidia-smi -mig 0)"
    if not whole:
        return f"{there}: check nvidia-smi and, in a container, that the NVIDIA container toolkit is set up"
    return f"{there}: lower --gpus (GPUS_PER_REPLICA)"
