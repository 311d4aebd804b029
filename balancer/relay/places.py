"""The relay's interface to a service's replicas: a place for each attempt, given back with the attempt's outcome.

The process's own fleet implements it (balancer/routing/places.py), or another process does (balancer/workers). The
relay needs nothing else from the fleet, and stores nothing about a replica.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.routing.admission import Waiter
from balancer.routing.places import Attempt
from balancer.routing.prompt import Prompt


class Place(Protocol):
    """A place at one replica; balancer.routing.places.Place documents each member."""

    replica: ReplicaAddress
    reason: str
    matched: float | None
    waited: float

    @property
    def alive_at(self) -> float: ...

    def away(self, now: float) -> float: ...

    def away_for(self, now: float) -> float: ...

    @property
    def is_answering(self) -> bool: ...

    @property
    def is_leaving(self) -> bool: ...

    @property
    def reasoning_parser(self) -> str | None: ...

    async def continues(self) -> bool: ...

    def doubted(self) -> None: ...

    def heard(self, at: float) -> None: ...

    def begun(self, is_computed: bool) -> None: ...

    def end(self, outcome: Outcome | None, attempt: Attempt) -> None: ...


class Places(Protocol):
    """Hands out places; see balancer.routing.places.Places."""

    when_left: list[Callable[[ReplicaAddress], None]]

    @property
    def is_only_one(self) -> bool: ...

    @property
    def has_any(self) -> bool: ...

    def named(self, name: str, authority: bytes) -> ReplicaAddress | None: ...

    def claim_now(self, waiter: Waiter) -> Place | None: ...

    async def claim(self, waiter: Waiter) -> Place: ...

    def lives(self, replica: ReplicaAddress, since: float) -> bool: ...

    async def may_go_on(self, waiter: Waiter) -> bool: ...

    def retry_turn(self) -> int: ...

    async def read(self, prompt: Prompt, key: Hashable) -> None: ...
