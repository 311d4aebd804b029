"""The requests in flight at deaths of replicas, as the processes of one balancer tell each other: each counts once."""

import secrets
from collections.abc import Callable
from typing import Any

from balancer.relay.deaths import REMEMBERED
from balancer.workers.link import Message

MOST_DEATHS = 4096  # requests in flight at deaths, kept for processes that come later


class ToldDeaths:
    """What follows Asked.DIED or Told.DIED in each message. `clock` gives the loop's time in seconds.

    Every process tells a new one what it knows, so most is told several times. Alike requests that end in the same
    millisecond differ in nothing but an identifier, and each of them has to count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[str, Message | None] = {}  # by identifier, oldest first; None: completed after all

    def new(self, *said: Any) -> Message:
        """Learns, and gives an identifier to, what this process has seen itself."""
        died = [*said, secrets.token_hex(8)]
        self.learn(died)
        return died

    def learn(self, died: Message) -> bool:
        """Returns whether this is news."""
        if died[-1] in self._known:
            return False
        self._known[died[-1]] = died
        if len(self._known) > MOST_DEATHS:
            del self._known[next(iter(self._known))]
        return True

    def acquit(self, digest: str) -> None:
        """The request with this digest kills no replica. Its deaths are no news if they are told again."""
        for id_, died in self._known.items():
            if died is not None and died[-3] == digest:
                self._known[id_] = None

    def lately(self) -> list[Message]:
        """Those that are still remembered."""
        now = self._clock()
        return [died for died in self._known.values() if died is not None and now - died[-2] < REMEMBERED]
