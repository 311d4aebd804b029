"""Requests that kill replicas: known by having been in flight at two deaths, and refused before they cause a third."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from xxhash import xxh3_128

from balancer.fleet.address import ReplicaAddress

REMEMBERED = 300.0  # seconds that a death is
REFUSED = 60.0  # seconds that a request is, from the second death on
FEW = 4  # requests in common: so many at two deaths are no accident of one of them
MOST = 1024  # requests that are remembered of one death


def digest_of(path: str, body: Iterable[bytes]) -> bytes:
    """By which a request is known when it comes again."""
    digest = xxh3_128(path.encode() + b"\n")
    for piece in body:
        digest.update(piece)
    return digest.digest()


@dataclass(slots=True, eq=False)
class _Death:
    replica: ReplicaAddress
    at: float
    requests: Counter[bytes] = field(default_factory=Counter)


class Deaths:
    """Which requests replicas had when they died. `is_alive` tells of a replica whether it lives after all.

    Times are the loop's, in seconds, and passed in.
    """

    def __init__(self, is_alive: Callable[[ReplicaAddress, float], bool]) -> None:
        self._is_alive = is_alive
        self._deaths: list[_Death] = []

    def __bool__(self) -> bool:
        """Is there anything to look for? Two deaths, that is; mostly there are none."""
        return len(self._deaths) > 1

    def note(self, replica: ReplicaAddress, request: bytes, now: float) -> None:
        """The replica broke off that request: perhaps it died of it."""
        self._deaths = [death for death in self._deaths if now - death.at < REMEMBERED]
        death = next((death for death in self._deaths if death.replica is replica), None)
        if death is not None and self._is_alive(replica, death.at):
            self._deaths.remove(death)
            death = None
        if death is None:
            death = _Death(replica, now)
            self._deaths.append(death)
        if len(death.requests) < MOST:
            death.requests[request] += 1

    def acquit(self, request: bytes) -> None:
        """It came to its end elsewhere."""
        for death in self._deaths:
            death.requests.pop(request, None)
        self._deaths = [death for death in self._deaths if death.requests]

    def kills(self, request: bytes, now: float) -> bool:
        """Was it there at two deaths, a short while ago, with hardly any others?"""
        there = [death for death in self._deaths if request in death.requests]
        there = [death for death in there if not self._is_alive(death.replica, death.at)]
        for number, later in enumerate(there):
            for earlier in there[:number]:
                common = (earlier.requests & later.requests).total()
                if common < FEW and now - max(earlier.at, later.at) < REFUSED:
                    return True
        return False
