"""The balancer process in front of a service's replicas: started, told of the replicas, started again if it dies."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from balancer.operate.child import Child, tail
from balancer.operate.engine import CannotStart
from balancer.operate.recipe import Command, python, with_packages
from balancer.views.status import Snapshot

_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 10.0
# It answers from memory; more than this on loopback means that it hangs.
_TIMEOUT = 5.0


class Front:
    """One balancer at a fixed endpoint, known by what it answers to the list of replicas."""

    def __init__(self, listen: str, admin: str, flags: Sequence[str], log: Path, on_change: Callable[[], None]) -> None:
        """`listen` and `admin` are HOST:PORT; `flags` are further flags of `python -m balancer`."""
        self.endpoint = f"http://{listen}"
        self.admin = f"http://{admin}"
        self.log = log
        self.has_answered = False
        self._command = Command(
            (*python("balancer"), "--listen", listen, "--admin", admin, *flags), with_packages({}), Path()
        )
        self._on_change = on_change
        self._child: Child | None = None
        self._failures = 0
        self._start_at = 0.0
        self._client = httpx.AsyncClient(base_url=self.admin, trust_env=False, timeout=_TIMEOUT)

    async def keep_up(self) -> None:
        """Starts the process when none runs and its back-off is over.

        Raises CannotStart when it ended before it ever answered: then it will not do better another time.
        """
        if self._child is not None and self._child.code is not None:
            self._child = None
            if not self.has_answered:
                raise CannotStart(f"the balancer cannot start: {self.last_words()}")
            self._start_at = time.monotonic() + min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(self._failures, 8))
            self._failures += 1
        if self._child is None and time.monotonic() >= self._start_at:
            self._child = await Child.start(self._command, self.log, self._on_change)

    def last_words(self) -> str:
        return next(iter(tail(self.log, 1)), "it printed nothing")

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
        if child is not None and child.code is None:
            stopping = asyncio.create_task(child.stop(grace=None))
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
            hurrying.cancel()
            if not stopping.done():
                await child.kill()
            await stopping
        await self._client.aclose()
