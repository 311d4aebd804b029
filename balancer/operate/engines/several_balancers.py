"""Several balancers in front of the same replicas: all are told the list, and all have to say that one is drained."""

import asyncio
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import httpx

from balancer.contract.listing import Listing, ServiceListing
from balancer.contract.status import Snapshot
from balancer.contract.words import Phase
from balancer.operate.engines import several
from balancer.operate.engines.balancer_handle import BalancerHandle

# Seconds of silence after which a balancer, and the requests that it had, count as lost.
_LOST = 30.0
# Seconds of silence after which the others may use its part of the limits.
_SILENT = 3.0
# Seconds of silence after which what arrived meanwhile is left out, since nobody knows when. One that only answers
# slowly speaks more often.
_UNKNOWN = 10.0
# Seconds for which those that have answered wait for the others.
_PATIENCE = 1.0


class SeveralBalancers(BalancerHandle):
    """Balancers that come and go, each with an admin port of its own; which, the subclass says."""

    def __init__(self, admin: str, key_file: Path, key: str, about: str | None = None) -> None:
        """`admin` is the admin port to name to people; the key is the same for all of them."""
        super().__init__(admin, key_file, key, about)
        # By each one's name: the client of its admin port, what it said last, and when (loop time).
        self._clients: dict[str, tuple[str, httpx.AsyncClient]] = {}
        self._said: dict[str, tuple[float, Snapshot]] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}
        # Generating requests that arrived at any of them, and that any refused, since we began. Their own totals would
        # not do: one that goes or comes back takes all of its own along.
        self._arrived = self._turned_away = 0
        # Each one's part of the limits; those by whose words that was decided.
        self._shares: dict[str, float] = {}
        self._speaking: set[str] = set()
        # Replicas that each of them is to drain, also one that comes later.
        self._draining: set[int] = set()

    @abstractmethod
    def addresses(self) -> Mapping[str, str]:
        """The admin port's HOST:PORT of each balancer that there is, by a name that no later one gets again."""

    async def tell(self, listing: Listing) -> Snapshot | None:
        there = await self._reached()
        began = asyncio.get_running_loop().time()
        self._draining &= {replica.id for replica in listing.replicas if replica.id is not None}
        self._divide(there)
        for name, share in self._shares.items():
            # One that has not answered the last time yet gets the next list after that.
            if name not in self._asked or self._asked[name].done():
                service = replace(listing.service or ServiceListing(), share=share)
                self._asked[name] = asyncio.create_task(self._ask(name, there[name], replace(listing, service=service)))
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=_PATIENCE)
        if not self._heard_since(began) and self._asked:
            await asyncio.wait(self._asked.values())
        if not self._heard_since(began):
            return None
        self.has_answered = True
        # What one said that is silent for a moment still stands: the requests that it has hold on to their replicas.
        together = several.merged([said for at, said in self._said.values() if began - at < _LOST])
        totals = replace(together.service, arrived_total=self._arrived, turned_away_total=self._turned_away)
        return replace(together, service=totals)

    def _divide(self, there: Iterable[str]) -> None:
        """Gives each its part of the limits. While there are no requests, who had the last ones keeps his."""
        loads = {name: self._load_of(name) for name in there}
        speaking = {name for name, load in loads.items() if load is not None}
        if any(loads.values()) or speaking != self._speaking or loads.keys() != self._shares.keys():
            self._speaking = speaking
            self._shares = dict(zip(loads, several.shares(list(loads.values())), strict=True))

    def _load_of(self, name: str) -> int | None:
        """How many requests it has; None if it has said nothing for a while."""
        at, said = self._said.get(name, (-math.inf, None))
        if said is None or asyncio.get_running_loop().time() - at > _SILENT:
            return None
        return said.service.in_flight + said.service.queue_depth

    def _heard_since(self, began: float) -> bool:
        return any(at >= began for at, _ in self._said.values())

    async def _ask(self, name: str, client: httpx.AsyncClient, listing: Listing) -> None:
        snapshot = await self._told(client, listing)
        if snapshot is None:
            return
        self._count(name, snapshot)
        self._said[name] = asyncio.get_running_loop().time(), snapshot
        for row in snapshot.replicas:
            if row.id in self._draining and row.status.phase is not Phase.LEAVING:
                await self._drained(client, row.id)

    def _count(self, name: str, snapshot: Snapshot) -> None:
        """Counts what came since it spoke last, unless that is too long ago."""
        at, last = self._said.get(name, (-math.inf, None))
        if last is None or asyncio.get_running_loop().time() - at > _UNKNOWN:
            return
        arrived, turned_away = snapshot.service.came_since(last.service)
        self._arrived += arrived
        self._turned_away += turned_away

    async def drain(self, id: int) -> bool:
        """Tells those that answered the last time at once, and the others when they answer again."""
        self._draining.add(id)
        there = await self._reached()
        ready = [client for name, client in there.items() if name in self._asked and self._asked[name].done()]
        answers = await asyncio.gather(*(self._drained(client, id) for client in ready))
        return bool(answers) and all(answers)

    async def leave(self) -> None:
        """Closes the connections to them; they go on."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await asyncio.gather(self._client.aclose(), *(client.aclose() for _, client in self._clients.values()))

    async def _reached(self) -> dict[str, httpx.AsyncClient]:
        """A client for each; those of balancers that are gone are closed, and what they said is forgotten."""
        there = self.addresses()
        gone = {name: client for name, (address, client) in self._clients.items() if there.get(name) != address}
        asked = [self._asked.pop(name) for name in gone if name in self._asked]
        for name in gone:
            del self._clients[name]
            self._said.pop(name, None)
        for name, address in there.items():
            if name not in self._clients:
                self._clients[name] = address, self._new_client(address)
        reached = {name: client for name, (_, client) in self._clients.items()}
        # Who still waits for an answer would take the end of its client for a failure of its own.
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.gather(*(client.aclose() for client in gone.values()))
        return reached
