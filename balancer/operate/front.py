"""The balancer process in front of a service's replicas: started, told of the replicas, started again if it dies."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from balancer.operate.child import Child, tail
from balancer.operate.engine import CannotStart
from balancer.operate.recipe import Command, Recipe, python, with_packages
from balancer.operate.state import ServiceFolder
from balancer.views.status import Snapshot

_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 10.0
# It answers from memory; more than this on loopback means that it hangs.
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the balancer listens, HOST:PORT each, and the flags that say who may come in."""

    listen: str
    admin: str
    doors: tuple[str, ...] = ()


class Front:
    """One balancer at a fixed endpoint, known by what it answers to the list of replicas."""

    def __init__(self, folder: ServiceFolder, where: Addresses, recipe: Recipe, on_change: Callable[[], None]) -> None:
        """`on_change` is called when the process ended."""
        self.has_answered = False
        self._folder = folder
        self._where = where
        self._flags = ("--listen", where.listen, "--admin", where.admin, *where.doors)
        self._recipe = recipe
        self._on_change = on_change
        self._child: Child | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._left_in_hurry = asyncio.Event()
        self._failures = 0
        self._start_at = 0.0
        self._client = httpx.AsyncClient(base_url=f"http://{where.admin}", trust_env=False, timeout=_TIMEOUT)

    @property
    def endpoint(self) -> str:
        return f"{'http' if self._recipe.spec.tls is None else 'https'}://{self._where.listen}"

    @property
    def is_leaving(self) -> bool:
        """Does an earlier process still finish the answers that it began? It alone knows which replicas they need."""
        return bool(self._leaving)

    async def keep_up(self) -> None:
        """Starts the process when none runs and its back-off is over.

        Raises CannotStart when it ended before it ever answered: then it will not do better another time.
        """
        if self._child is not None and self._child.code is not None:
            self._child = None
            if not self.has_answered:
                raise CannotStart(f"the balancer cannot start: {self._last_words()}")
            self._start_at = time.monotonic() + min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(self._failures, 8))
            self._failures += 1
        if self._child is None and time.monotonic() >= self._start_at:
            self._child = await Child.start(self._command(), self._folder.balancer_log, self._on_change)

    async def renew(self, recipe: Recipe) -> None:
        """Has the next process do as this recipe says; the present one leaves, if it would do otherwise."""
        is_same = _said(recipe) == _said(self._recipe)
        self._recipe = recipe
        if is_same or self._child is None:
            return
        leaving, self._child = self._child, None
        task = asyncio.create_task(self._leave(leaving, self._left_in_hurry))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await self.keep_up()

    async def tell(self, service: dict[str, Any], replicas: list[dict[str, Any]]) -> Snapshot | None:
        """Hands over the whole list of replicas; what the balancer makes of it, or None while it does not answer."""
        try:
            answer = await self._client.put("/replicas", json={"service": service, "replicas": replicas})
            answer.raise_for_status()
            snapshot = Snapshot.from_json(answer.json())
        except (httpx.HTTPError, ValueError):
            return None
        self.has_answered = True
        self._failures = 0
        return snapshot

    async def drain(self, id: int) -> bool:
        """Whether the balancer took note of it."""
        try:
            return (await self._client.post(f"/replicas/{id}/drain")).is_success
        except httpx.HTTPError:
            return False

    async def stop(self, hurry: asyncio.Event) -> None:
        """Returns when it is gone: once every answer in flight is finished, or at once when `hurry` is set."""
        child, self._child = self._child, None
        if child is not None:
            await self._leave(child, hurry)
        hurrying = asyncio.create_task(hurry.wait())
        hurrying.add_done_callback(lambda _: self._left_in_hurry.set() if hurry.is_set() else None)
        await asyncio.gather(*self._leaving)
        hurrying.cancel()
        await self._client.aclose()

    @staticmethod
    async def _leave(child: Child, hurry: asyncio.Event) -> None:
        stopping = asyncio.create_task(child.stop(grace=None))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not stopping.done():
            await child.kill()
        await stopping

    def _command(self) -> Command:
        text, flags = _said(self._recipe)
        service = ("--service", str(self._folder.write_service_file(text)))
        return Command((*python("balancer"), *self._flags, *service, *flags), with_packages({}), Path())

    def _last_words(self) -> str:
        return next(iter(tail(self._folder.balancer_log, 1)), "it printed nothing")


def _said(recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """All that the balancer is told of a recipe: its service file, and flags."""
    spec = recipe.spec
    flags: tuple[str, ...] = ()
    if spec.tls is not None:
        certificate, key = spec.tls
        flags = ("--tls-cert", str(certificate), "--tls-key", str(key))
    if "drain_grace" not in spec.settings.model_fields_set:
        # There is no other load balancer in front that has to notice first that this one leaves.
        flags += ("--set", "drain_grace=0")
    return spec.for_balancer(recipe.readiness_probe), flags
