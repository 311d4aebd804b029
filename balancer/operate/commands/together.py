"""Signals to a command in the foreground that brought several services up: they reach these services, whose processes
are in sessions of their own.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from balancer.inherited import ending
from balancer.operate.commands.detach import AskedToEnd
from balancer.operate.state.service_folder import ServiceFolder, state_root
from balancer.operate.state.state_file import BrokenState

# Seconds between two looks whether a service still ends.
_LOOK = 0.1
# Seconds that a service has to end at once. One that takes longer hangs.
_AT_ONCE = 5.0


def raise_when_asked() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, and the other signals that ask us to end raise AskedToEnd."""

    def asked(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else AskedToEnd

    for number in ending():
        signal.signal(number, asked)


@contextlib.contextmanager
def passed_on(names: Sequence[str]) -> Iterator[None]:
    """Meanwhile, any of these signals is passed on to the services: asked once more, they end at once.

    The next signal after that raises SystemExit if one of them hangs, which it names. Afterwards all are ignored: this
    process would die of one that comes while Python ends, and its exit status would be lost.
    """
    passed: list[float] = []

    def again(_: int, __: FrameType | None) -> None:
        # By the second of them, all have been asked twice.
        is_late = len(passed) > 1 and time.monotonic() > passed[1] + _AT_ONCE
        if is_late and (left := [name for name in names if is_up(name, if_broken=False)]):
            raise SystemExit(f"{', '.join(left)} did not end: groundserve down {' '.join(left)} ends what hangs")
        passed.append(time.monotonic())
        for name in names:
            _ask_to_end(name)

    heeded = ending()
    for each in heeded:
        signal.signal(each, again)
    try:
        yield
    finally:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)


def end_and_keep(name: str) -> None:
    """Ends a service that stays meant to exist. Returns when it is not up any more."""
    _ask_to_end(name)
    while is_up(name, if_broken=False):
        time.sleep(_LOOK)
    print(f"{name} is down: groundserve up {name} resumes it", flush=True)


def _ask_to_end(name: str) -> None:
    """By SIGTERM, which leaves it meant to exist. Nothing happens if its controller is out of reach."""
    with contextlib.suppress(BrokenState, PermissionError):
        holder = ServiceFolder(state_root(), name).holder()
        if holder is not None and holder.pid != os.getpid():
            holder.signal(signal.SIGTERM)


def is_up(name: str, if_broken: bool) -> bool:
    """Is the service up? `if_broken` is the answer where its folder does not tell."""
    try:
        return ServiceFolder(state_root(), name).is_up()
    except BrokenState:
        return if_broken
