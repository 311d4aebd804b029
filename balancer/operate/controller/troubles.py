"""What the controller cannot do at the moment: said once, tried again with back-off, while everything else goes on."""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from balancer.errors import ConfigError
from balancer.operate.engines.engine import CannotStart

# Seconds before a failed piece of work is tried again; doubled each time, up to the longest.
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 10.0


@dataclass(slots=True)
class _Trouble:
    message: str
    since: str  # the time of day
    failures: int = 0
    retry_at: float = 0.0


class Troubles:
    """`say` is called with messages for the user; `clock` is in seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._now: dict[str, _Trouble] = {}

    @property
    def reason(self) -> str:
        """All present troubles in one line, for `status`; empty if there are none."""
        return "; ".join(f"{what}, since {one.since}: {one.message}" for what, one in self._now.items())

    async def attempt(self, what: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Does the work unless its last failure is too recent; returns whether it was done. Never raises.

        `what` names the work, as in "its balancer works again".
        """
        known = self._now.get(what)
        if known is not None and self._clock() < known.retry_at:
            return False
        try:
            await work()
        except Exception as failure:
            self.note(what, failure)
            return False
        if self._now.pop(what, None) is not None:
            self._say(f"{what} works again")
        return True

    async def insist(self, what: str, work: Callable[[], Awaitable[object]], until: Callable[[], bool]) -> bool:
        """Attempts the work until it is done, or `until` says to leave it; returns whether it was done."""
        while not await self.attempt(what, work):
            if until():
                return False
            await asyncio.sleep(_FIRST_BACKOFF)
        return True

    def note(self, what: str, failure: Exception) -> None:
        """Remembers that the work has failed now, and says so if that is news."""
        message = described(failure)
        one = self._now.setdefault(what, _Trouble("", time.strftime("%H:%M:%S")))
        if one.message != message:
            self._say(f"{what} does not work, and is tried again: {message}")
        one.message = message
        one.retry_at = self._clock() + min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(one.failures, 8))
        one.failures += 1


def described(failure: Exception) -> str:
    """The failure in one line; if nobody expected it, with the place in our code."""
    if isinstance(failure, CannotStart | ConfigError):
        return str(failure)
    if isinstance(failure, OSError):
        return f"{failure.filename}: {failure.strerror}" if failure.filename else failure.strerror or str(failure)
    place = traceback.extract_tb(failure.__traceback__)[-1:]
    where = f" ({place[0].filename.rpartition('/')[2]}:{place[0].lineno})" if place else ""
    return f"{type(failure).__name__}: {failure}{where}"
