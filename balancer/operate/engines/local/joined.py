"""Another service's balancer that serves this one too: one endpoint, where the model's name picks the service."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.errors import ConfigError
from balancer.operate.engines.balancer_handle import BalancerHandle, service_file_for
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import control_socket, keys
from balancer.operate.state.service_folder import ServiceFolder

_SILENCE = 5.0  # seconds without an answer, after which the host is asked where its balancer is now
_LOOK = 0.1  # seconds between two checks whether the last answers have ended


@dataclass(frozen=True, slots=True)
class Host:
    """A service that is up, and its balancer: endpoint as a URL, admin port as HOST:PORT, file of the admin key."""

    name: str
    endpoint: str
    admin: str
    key_file: Path

    @classmethod
    def find(cls, folder: ServiceFolder) -> "Host":
        """Asks the service's controller; raises ConfigError if it is not up."""
        try:
            told = control_socket.ask(folder.socket, {"do": "balancer"})
        except control_socket.NotUp:
            raise ConfigError(f"--join {folder.name}: no service {folder.name} is up here: bring it up first") from None
        return cls(folder.name, str(told["endpoint"]), str(told["admin"]), Path(told["key_file"]))


class JoinedBalancer(BalancerHandle):
    """`replica_key` is the file with the key that replicas require; `say` is called with messages for the user."""

    # A new connection each time: a kept one may lead to a process that has been replaced in the meantime.
    _limits = httpx.Limits(max_keepalive_connections=0)

    def __init__(
        self, host: Host, folder: ServiceFolder, recipe: Recipe, replica_key: Path | None, say: Callable[[str], None]
    ) -> None:
        super().__init__(host.admin, host.key_file, keys.given(host.key_file, "--join"), about=recipe.spec.name)
        self._host = host
        self._folder = folder
        self._recipe = recipe
        self._replica_key = replica_key
        self._say = say
        self._has_joined = False
        self._answered_at = time.monotonic()

    @property
    def endpoint(self) -> str:
        return self._host.endpoint

    async def keep_up(self) -> None:
        """Starts nothing. If the host has been silent for a while, looks up where it is now.

        Raises ConfigError if it is not up any more.
        """
        if time.monotonic() - self._answered_at < _SILENCE:
            return
        self._answered_at = time.monotonic()
        try:
            host = await asyncio.to_thread(Host.find, ServiceFolder(self._folder.path.parent, self._host.name))
            key = keys.given(host.key_file, "--join")
        except ConfigError:
            self._has_joined = False
            if not self.has_answered:
                return
            name = self._recipe.spec.name
            raise ConfigError(f"{self._host.name} is not up: {name} has no endpoint until it is") from None
        self._host, self._has_joined = host, False
        before, self.admin, self._key = self._client, host.admin, key
        self.key_file = host.key_file
        self._client = self._new_client()
        await before.aclose()

    async def renew(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._has_joined = False

    async def replace(self) -> None:
        name = self._host.name
        raise ConfigError(f"{self._recipe.spec.name} has the balancer of {name}: groundserve down {name} --balancer")

    async def tell(self, listing: Listing) -> Snapshot | None:
        if not self._has_joined and not await self._join():
            return None
        snapshot = await super().tell(listing)
        if snapshot is not None:
            self._answered_at = time.monotonic()
        self._has_joined = snapshot is not None  # a restarted balancer does not know this service
        return snapshot

    async def _join(self) -> bool:
        key = keys.given(self._replica_key, keys.KEY_FILE) if self._replica_key is not None else None
        body = {"file": service_file_for(self._recipe), "replica_key": key}
        try:
            answer = await self._client.put(f"/services/{self._recipe.spec.name}", json=body)
        except httpx.HTTPError:
            return False
        if answer.is_success:
            return True
        self._say(f"{self._host.name} does not take {self._recipe.spec.name}: {answer.text[:300]}")
        return False

    async def stop(self, hurry: asyncio.Event) -> None:
        while not hurry.is_set():
            try:
                answer = await self._client.delete(f"/services/{self._recipe.spec.name}")
                if not answer.is_success or not answer.json()["in_flight"]:
                    break
            except (httpx.HTTPError, ValueError, LookupError):
                break
            await asyncio.sleep(_LOOK)
        await self._client.aclose()
