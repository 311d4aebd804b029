"""Requests that kill replicas: one that was in flight at two deaths is refused before it causes a third."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from xxhash import xxh3_128

from balancer.fleet.address import ReplicaAddress

REMEMBERED = 300.0  # seconds that a death is remembered
REFUSED = 60.0  # seconds that a request is refused, from the second death on
FEW = 4  # two deaths with this many requests in common are not blamed on any one of them
MOST = 1024  # different requests remembered per death


def digest_of(path: str, body: Iterable[bytes]) -> bytes:
    """The digest by which a request is recognised when it is sent again."""
    digest = xxh3_128(path.encode() + b"\n")
    for piece in body:
        digest.update(piece)
    return digest.digest()


@dataclass(slots=True, eq=False)
class _Death:
    replica: ReplicaAddress
    at: float
    requests: Counter[bytes] = field(default_factory=Counter)


class Hearers(Protocol):
    """Others who refuse what kills replicas."""

    def noted(self, replica: ReplicaAddress, request: bytes, at: float) -> None: ...

    def acquitted(self, request: bytes) -> None: ...


class Deaths:
    """The requests in flight on replicas when they died. `is_alive` says if a replica has lived since a given time.

    What is noted here is told to the `hearers`, if there are any; `is_heard` says that it came from one of them.

    Times are the loop's, in seconds, and passed in.
    """

    def __init__(self, is_alive: Callable[[ReplicaAddress, float], bool], hearers: Hearers | None = None) -> None:
        self._is_alive = is_alive
        self._hearers = hearers
        self._deaths: list[_Death] = []

    def __bool__(self) -> bool:
        """Are there two deaths to compare? Mostly there are none."""
        return len(self._deaths) > 1

    def note(self, replica: ReplicaAddress, request: bytes, now: float, is_heard: bool = False) -> None:
        """The replica broke off this request, and may have died of it."""
        if self._hearers is not None and not is_heard:
            self._hearers.noted(replica, request, now)
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

    def acquit(self, request: bytes, is_heard: bool = False) -> None:
        """The request was completed after all, so it kills no replica."""
        if self._hearers is not None and not is_heard:
            self._hearers.acquitted(request)
        for death in self._deaths:
            death.requests.pop(request, None)
        self._deaths = [death for death in self._deaths if death.requests]

    def victim(self, name: str, authority: bytes) -> ReplicaAddress | None:
        """The last of this name and Host field that died."""
        died = (death.replica for death in reversed(self._deaths))
        return next((one for one in died if (one.name, one.authority) == (name, authority)), None)

    def kills(self, request: bytes, now: float) -> bool:
        """Was this request in flight at two recent deaths, with fewer than FEW requests in common to both?"""
        there = [death for death in self._deaths if request in death.requests]
        there = [death for death in there if not self._is_alive(death.replica, death.at)]
        for number, later in enumerate(there):
            for earlier in there[:number]:
                common = (earlier.requests & later.requests).total()
                if common < FEW and now - max(earlier.at, later.at) < REFUSED:
                    return True
        return False
