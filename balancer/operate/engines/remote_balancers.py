"""Balancers that somebody else started, on other hosts as a rule: the service joins them all, and parts from all."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.balancer_handle import service_file_for
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.several_balancers import SeveralBalancers
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys

_LOOK = 0.1  # seconds between two checks whether the last answers have ended


def addresses_of(flags: AddressFlags) -> Addresses:
    """The service's addresses, where its balancers run already. Raises ConfigError if the flags do not say enough."""
    if flags.join is not None or flags.api_keys is not None or flags.is_open or flags.admin is not None:
        raise ConfigError("--balancers: who may use them, and where they listen, is said where they are started")
    if flags.listen is None or flags.admin_key is None:
        raise ConfigError(
            "--balancers: give --listen, the address that clients use, and --admin-key, the key of them all"
        )
    return flags.resolved(flags.listen, flags.balancers[0])


class RemoteBalancers(SeveralBalancers):
    """`balancers` are their admin ports, HOST:PORT each; `replica_key` is the file with the key of the replicas.

    `say` is called with messages for the user.
    """

    def __init__(
        self,
        balancers: Sequence[str],
        where: Addresses,
        recipe: Recipe,
        replica_key: Path | None,
        say: Callable[[str], None],
    ) -> None:
        assert where.admin_key is not None
        file = Path(where.admin_key).absolute()
        super().__init__(where.admin, file, keys.given(file, "--admin-key"), about=recipe.spec.name)
        self._balancers = {address: address for address in balancers}
        self._where = where
        self._recipe = recipe
        self._replica_key = replica_key
        self._say = say
        # Those that know the service as its file is now.
        self._joined: set[httpx.AsyncClient] = set()
        # Why one does not take the service, by its address.
        self._refusals: dict[str, str] = {}

    @property
    def endpoint(self) -> str:
        return self._where.endpoint(self._recipe)

    def addresses(self) -> Mapping[str, str]:
        return self._balancers

    async def keep_up(self) -> None:
        """Whoever started them does. Raises CannotStart while one of several does not take the service."""
        if self._refusals and self.has_answered:
            raise CannotStart("; ".join(self._refusals.values()))

    async def renew(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._joined.clear()

    async def replace(self) -> None:
        raise ConfigError(
            f"{self._recipe.spec.name}: its balancers run on {', '.join(self._balancers)}: start them anew there"
        )

    async def stop(self, hurry: asyncio.Event) -> None:
        """Parts from all, and returns when they have finished its answers, or at once if `hurry` is set."""
        there = await self._reached()
        await asyncio.gather(*(self._part(client, hurry) for client in there.values()))
        await self.leave()

    async def _told(self, client: httpx.AsyncClient, listing: Listing) -> Snapshot | None:
        if client not in self._joined and not await self._join(client):
            return None
        snapshot = await super()._told(client, listing)
        if snapshot is None:
            self._joined.discard(client)  # one that was started anew does not know the service
        return snapshot

    async def _join(self, client: httpx.AsyncClient) -> bool:
        address = client.base_url.netloc.decode()
        why = ""
        try:
            key = keys.given(self._replica_key, keys.KEY_FILE) if self._replica_key is not None else None
            body = {"file": service_file_for(self._recipe), "replica_key": key}
            answer = await client.put(f"/services/{self._recipe.spec.name}", json=body)
        except ConfigError as failure:
            why = str(failure)
        except httpx.HTTPError:
            pass
        else:
            if answer.is_success:
                self._joined.add(client)
            else:
                why = f"{address} does not take {self._recipe.spec.name}: {answer.text[:300]}"
        self._note(address, why)
        return client in self._joined

    def _note(self, address: str, why: str) -> None:
        """Remembers why one does not take the service, if it does not; before any does, only this tells of it."""
        if why and not self.has_answered and self._refusals.get(address) != why:
            self._say(why)
        self._refusals.pop(address, None)
        if why:
            self._refusals[address] = why

    async def _part(self, client: httpx.AsyncClient, hurry: asyncio.Event) -> None:
        while not hurry.is_set():
            try:
                answer = await client.delete(f"/services/{self._recipe.spec.name}")
                if not answer.is_success or not answer.json()["in_flight"]:
                    return
            except (httpx.HTTPError, ValueError, LookupError):
                return
            await asyncio.sleep(_LOOK)
