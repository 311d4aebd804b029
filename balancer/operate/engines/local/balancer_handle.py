"""The local engine's balancer: a child process of `groundserve up`, started again if it dies."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.operate.engines.addresses import Addresses
from balancer.operate.engines.balancer_handle import BalancerHandle, service_file_for
from balancer.operate.engines.child import Child, tail
from balancer.operate.engines.engine import CannotStart
from balancer.operate.recipe.recipe import Invocation, Recipe, python, with_packages
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder

_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 10.0


class LocalBalancer(BalancerHandle):
    """`on_change` is called when the process ended; `replica_key` is the file with the key that replicas ask for."""

    def __init__(
        self,
        folder: ServiceFolder,
        where: Addresses,
        recipe: Recipe,
        replica_key: Path | None,
        on_change: Callable[[], None],
    ) -> None:
        file = Path(where.admin_key).absolute() if where.admin_key else folder.admin_key_file
        super().__init__(where.admin, file, keys.given(file, "--admin-key") if where.admin_key else keys.drawn(file))
        self._replica_key = replica_key
        self._folder = folder
        self._where = where
        self._recipe = recipe
        self._on_change = on_change
        self._child: Child | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._left_in_hurry = asyncio.Event()
        self._failures = 0
        self._start_at = 0.0

    @property
    def endpoint(self) -> str:
        return self._where.endpoint(self._recipe)

    @property
    def is_leaving(self) -> bool:
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
            self._child = await Child.start(self._invocation(), self._folder.balancer_log, self._on_change)

    async def renew(self, recipe: Recipe) -> None:
        is_same_process = recipe.spec.tls == self._recipe.spec.tls
        self._recipe = recipe
        self._folder.write_service_file(service_file_for(recipe))
        if is_same_process or self._child is None:
            return
        leaving, self._child = self._child, None
        task = asyncio.create_task(self._leave(leaving, self._left_in_hurry))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await self.keep_up()

    async def tell(self, listing: Listing) -> Snapshot | None:
        snapshot = await super().tell(listing)
        if snapshot is not None:
            self._failures = 0
        return snapshot

    async def stop(self, hurry: asyncio.Event) -> None:
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

    def _invocation(self) -> Invocation:
        where = self._where
        flags = ["--listen", where.listen, "--admin", where.admin]
        if where.is_open:
            flags.append("--open")
        if where.api_keys is not None:
            flags += ["--api-keys", where.api_keys]
        flags += ["--admin-key", str(self.key_file)]
        if self._replica_key is not None:
            flags += ["--replica-key", str(self._replica_key)]
        flags += ["--service", str(self._folder.write_service_file(service_file_for(self._recipe)))]
        if self._recipe.spec.tls is not None:
            certificate, key = self._recipe.spec.tls
            flags += ["--tls-cert", str(certificate), "--tls-key", str(key)]
        return Invocation((*python("balancer"), *flags), with_packages({}), Path())

    def _last_words(self) -> str:
        return next(iter(tail(self._folder.balancer_log, 1)), "it printed nothing")
