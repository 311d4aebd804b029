"""The local engine's balancer: a child process of `groundserve up`, restarted if it dies."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.contract.words import ServiceStatus
from balancer.operate.engines.addresses import Addresses, Listeners
from balancer.operate.engines.balancer_handle import BalancerHandle, service_file_for
from balancer.operate.engines.child import Child, tail
from balancer.operate.engines.engine import CannotStart
from balancer.operate.recipe.recipe import Invocation, Recipe, python, with_packages
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import BrokenState
from balancer.spec.local_disk import network_type

T = TypeVar("T")

# The first restart in a row is immediate; the second waits this many seconds, and each further one twice as long.
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 10.0
# Seconds after its start before a process gets its first request. It takes longer than that to start, and its
# predecessor has released the port by then.
_FIRST_WORDS = 0.2
# Maximum number of seconds for which a new process keeps clients waiting until it knows a replica that is ready.
_UNTIL_READY = 10.0
# Seconds without an answer of a process that has answered before, after which it hangs and is killed.
_HUNG = 30.0


class LocalBalancer(BalancerHandle):
    """Its ports are `listeners`, which stay open from one process to the next; clients that connect in between wait.

    `on_change` is called when the process has ended; `replica_key` is the file with the key that replicas require.
    """

    def __init__(
        self,
        folder: ServiceFolder,
        addresses: Addresses,
        listeners: Listeners,
        recipe: Recipe,
        replica_key: Path | None,
        on_change: Callable[[], None],
    ) -> None:
        given = addresses.admin_key
        file = Path(given).absolute() if given else folder.admin_key_file
        super().__init__(addresses.admin, file, keys.given(file, "--admin-key") if given else keys.drawn(file))
        self._replica_key = replica_key
        self._folder = folder
        self._addresses = addresses
        self._listeners = listeners
        self._recipe = recipe
        self._on_change = on_change
        self._child: Child | None = None
        self._started = 0.0
        self._introduction: asyncio.Task[None] | None = None
        self._answers = False  # whether the current process has answered yet
        self._heard_at = 0.0  # when it last did
        self._is_outdated = False  # the current process is to be replaced
        self._has_ready_replica = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._left_in_hurry = asyncio.Event()
        self._failures = 0
        self._start_at = 0.0

    @property
    def endpoint(self) -> str:
        return self._addresses.endpoint(self._recipe)

    @property
    def is_leaving(self) -> bool:
        return bool(self._leaving)

    async def keep_up(self) -> None:
        """Starts the process if none is running and the back-off is over; the first restart in a row is immediate.

        Raises CannotStart if the balancer ended before it ever answered, as another start would end the same way.
        """
        if self._child is not None and self._answers and time.monotonic() - self._heard_at > _HUNG:
            await self._child.kill()
        if self._child is not None and self._child.code is not None:
            self._child = None
            if not self.has_answered:
                raise CannotStart(f"the balancer cannot start: {self._last_words()}")
            self._back_off()
        if self._child is None:
            if time.monotonic() >= self._start_at:
                await self._start()
        elif self._is_outdated:
            await self._hand_over()

    async def _start(self) -> None:
        await self._forget_process()
        self._is_outdated = False
        listeners = (self._listeners.endpoint.fileno(), self._listeners.admin.fileno())
        log = self._folder.balancer_log
        try:
            self._child = await Child.start(self._invocation(), log, self._on_change, listeners)
            self.starts += 1
        except (CannotStart, BrokenState):
            if not self.has_answered:
                raise
            self._back_off()  # a temporary shortage on this machine: clients wait, and the service stays up
        self._started = time.monotonic()

    def _back_off(self) -> None:
        backoff = _FIRST_BACKOFF * 2.0 ** min(self._failures - 1, 8) if self._failures else 0.0
        self._start_at = time.monotonic() + min(_LONGEST_BACKOFF, backoff)
        self._failures += 1

    async def renew(self, recipe: Recipe) -> None:
        is_same_process = recipe.spec.tls == self._recipe.spec.tls
        self._folder.write_service_file(service_file_for(recipe))
        self._recipe = recipe  # only now: a file that could not be written leaves it as it was
        if not is_same_process:
            await self.replace()

    async def replace(self) -> None:
        """Asks `keep_up` for a new process; only `keep_up` starts processes."""
        self._is_outdated = True
        self._on_change()

    async def _hand_over(self) -> None:
        """Passes the ports on to the next process; clients that arrive before it accepts connections wait."""
        assert self._child is not None
        leaving, self._child = self._child, None
        task = asyncio.create_task(self._leave(leaving, self._left_in_hurry, signal.SIGUSR1))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await self._start()

    async def tell(self, listing: Listing) -> Snapshot | None:
        """Sends the list in the background while the process starts, because its open port does not answer yet."""
        if not self._answers:
            self._introduce(listing)
            return None
        snapshot = await self._unless_it_ends(super().tell(listing))
        if snapshot is None:
            return None
        if _is_leaving(snapshot, listing):
            await self.replace()  # somebody stopped that process, but the service is to go on
            return None
        self._heard_at = time.monotonic()
        self._failures = 0
        self._has_ready_replica = snapshot.service.ready > 0
        return snapshot

    async def drain(self, id: int) -> bool:
        return self._answers and bool(await self._unless_it_ends(super().drain(id)))

    def _introduce(self, listing: Listing) -> None:
        is_there = self._child is not None and time.monotonic() > self._started + _FIRST_WORDS
        if not is_there or (self._introduction is not None and not self._introduction.done()):
            return

        async def introduce() -> None:
            snapshot = await BalancerHandle.tell(self, listing)
            if snapshot is not None and not _is_leaving(snapshot, listing):
                self._answers, self._heard_at = True, time.monotonic()
                self._on_change()

        self._introduction = asyncio.create_task(introduce())

    async def _forget_process(self) -> None:
        """Drops the connections and the pending request to a process that has ended or is being replaced."""
        self._answers = False
        if self._introduction is not None:
            self._introduction.cancel()
            await asyncio.gather(self._introduction, return_exceptions=True)
            self._introduction = None
        await self._client.aclose()
        self._client = self._new_client()

    async def _unless_it_ends(self, asking: Coroutine[Any, Any, T]) -> T | None:
        """The answer, or None if the process ends first, which no connection error reveals while the port is open."""
        if self._child is None:
            asking.close()
            return None
        answer, end = asyncio.create_task(asking), asyncio.create_task(self._child.ended())
        try:
            await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            end.cancel()
            await asyncio.gather(answer, end, return_exceptions=True)

    async def stop(self, hurry: asyncio.Event) -> None:
        self._listeners.close()  # once the process closes them too, no new connection is possible
        child, self._child = self._child, None
        if child is not None:
            await self._leave(child, hurry)
        hurrying = asyncio.create_task(hurry.wait())
        hurrying.add_done_callback(lambda _: self._left_in_hurry.set() if hurry.is_set() else None)
        await asyncio.gather(*self._leaving)
        hurrying.cancel()
        await self._forget_process()
        await self._client.aclose()

    @staticmethod
    async def _leave(child: Child, hurry: asyncio.Event, how: signal.Signals = signal.SIGTERM) -> None:
        stopping = asyncio.create_task(child.stop(None, how))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not stopping.done():
            await child.kill()
        await stopping

    def _invocation(self) -> Invocation:
        where, listeners = self._addresses, self._listeners
        flags = ["--listen", where.listen, "--listen-fd", str(listeners.endpoint.fileno())]
        flags += ["--admin", where.admin, "--admin-fd", str(listeners.admin.fileno())]
        if self._has_ready_replica:
            flags += ["--accept-when-ready", f"{_UNTIL_READY:g}"]
        if where.is_open:
            flags.append("--open")
        if where.api_keys is not None:
            flags += ["--api-keys", where.api_keys]
        if not network_type(self._folder.path):
            flags += ["--state", str(self._folder.path / "accounts")]
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


def _is_leaving(snapshot: Snapshot, listing: Listing) -> bool:
    """Is the process shutting down although the service is not?"""
    is_told = listing.service is not None and listing.service.status == ServiceStatus.SHUTTING_DOWN
    return snapshot.service.status is ServiceStatus.SHUTTING_DOWN and not is_told
