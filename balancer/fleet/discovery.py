"""Where the list of replicas comes from, when nobody hands it in: DNS, asked again each second."""

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from balancer.errors import ConfigError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Listed

INTERVAL = 1.0
LOOK_UP_TIMEOUT = 5.0
# How long the last answer stands when DNS itself fails; members that are ready stay even longer.
GRACE = 30.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(name: str, port: int) -> list[str]:
    """All A and AAAA records of `name`, sorted; empty when it has none (NXDOMAIN); OSError when DNS fails."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOK_UP_TIMEOUT):
            found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return []
        raise
    return sorted({str(entry[4][0]) for entry in found})


class DnsDiscovery:
    """Keeps a fleet at what `dns://NAME:PORT` says. Works for Compose, Swarm's tasks.NAME, a headless Service.

    The TTL is not looked at: Docker's says ten minutes, and its answers are true within a second.
    """

    def __init__(self, source: str, fleet: Fleet, resolve: Resolve = resolve) -> None:
        match = re.fullmatch(r"dns://([\w.-]+):(\d{1,5})", source)
        if not match or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"'{source}' cannot be discovered: write dns://NAME:PORT")
        self._name, self._port = match[1], int(match[2])
        self._fleet = fleet
        self._resolve = resolve
        self._answered_at = fleet.clock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await self.look_up()
            await asyncio.sleep(INTERVAL)

    async def look_up(self) -> None:
        """Asks once and reconciles; a failure, or an answer without a record, leaves the fleet as it is for a while."""
        now = self._fleet.clock()
        try:
            addresses = await self._resolve(self._name, self._port)
        except (OSError, TimeoutError):
            addresses = []
        if addresses:
            self._answered_at = now
            self._fleet.reconcile([self._listed(address) for address in addresses])
        elif now - self._answered_at > GRACE:
            alive = [m.listed for m in self._fleet.members.values() if m.is_available(now)]
            self._fleet.reconcile(alive)

    def _listed(self, address: str) -> Listed:
        host = f"[{address}]" if ":" in address else address
        return Listed(name=f"{address}:{self._port}", url=f"http://{host}:{self._port}", infra="dns")
