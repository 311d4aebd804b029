"""The balancer in front of a service's replicas, as the controller uses it."""

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path

import httpx

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.keys import bearing

# Seconds. The balancer answers from memory, so a longer silence on loopback means that it hangs.
_TIMEOUT = 5.0


class BalancerHandle(ABC):
    """One balancer at a fixed endpoint. It is sent the list of replicas and answers with a snapshot."""

    _limits = httpx.Limits()  # for connections to the balancer

    def __init__(self, admin: str, key_file: Path, key: str, about: str | None = None) -> None:
        """`admin` is the admin port's HOST:PORT. Its key is in `key_file`, so that another balancer that ever gets this
        port rejects our requests. `about` names the service that we mean, if the balancer has several.
        """
        self.admin = admin
        self.key_file = key_file
        self.has_answered = False
        # How many processes or containers were started for it.
        self.starts = 0
        self._key = key
        self._about = {"service": about} if about is not None else {}
        self._client = self._new_client()

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """Where clients find it, as a URL."""

    @property
    def is_leaving(self) -> bool:
        """Is a replaced process still finishing its answers? Only that process knows which replicas it still needs."""
        return False

    @abstractmethod
    async def keep_up(self) -> None:
        """Starts it if it is not running; raises CannotStart if it never will."""

    @abstractmethod
    async def renew(self, recipe: Recipe) -> None:
        """Applies this recipe: policy, limits and probe take effect at once; a new certificate needs a new process."""

    @abstractmethod
    async def stop(self, hurry: asyncio.Event) -> None:
        """Stops the balancer and returns when it is gone: after all answers in flight, or at once if `hurry` is set."""

    @abstractmethod
    async def replace(self) -> None:
        """Starts a new process, with the code that is installed now; the old one finishes its answers."""

    async def tell(self, listing: Listing) -> Snapshot | None:
        """Sends the whole list of replicas; returns the balancer's snapshot, or None while it does not answer."""
        snapshot = await self._told(self._client, listing)
        self.has_answered |= snapshot is not None
        return snapshot

    async def _told(self, client: httpx.AsyncClient, listing: Listing) -> Snapshot | None:
        try:
            answer = await client.put("/replicas", params=self._about, json=listing.to_json())
            answer.raise_for_status()
            return Snapshot.from_json(answer.json())
        except (httpx.HTTPError, ValueError):
            return None

    def _new_client(self, admin: str | None = None) -> httpx.AsyncClient:
        """A new client of this admin port, or of `self.admin`, without connections to an earlier process."""
        return httpx.AsyncClient(
            base_url=f"http://{admin or self.admin}",
            headers=bearing(self._key),
            trust_env=False,
            timeout=_TIMEOUT,
            limits=self._limits,
        )

    async def drain(self, id: int) -> bool:
        """Tells the balancer to drain a replica; returns whether it accepted."""
        return await self._drained(self._client, id)

    async def _drained(self, client: httpx.AsyncClient, id: int) -> bool:
        try:
            return (await client.post(f"/replicas/{id}/drain", params=self._about)).is_success
        except httpx.HTTPError:
            return False


def service_file_for(recipe: Recipe) -> str:
    """The service file that the balancer of this recipe is started with."""
    # drain_grace gives a load balancer in front time to notice that this one shuts down; here there is none.
    return recipe.spec.for_balancer(recipe.readiness_probe, {"drain_grace": 0})
