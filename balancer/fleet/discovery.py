"""Where the list of replicas comes from, when nobody hands it in: DNS, asked again each second."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from balancer.errors import ConfigError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Listed

log = logging.getLogger("groundserve")

INTERVAL = 1.0
# Longer than a resolver takes to give up a dead name server and ask the next one, in seconds.
LOOK_UP_TIMEOUT = 20.0
# How long an engine's list stands after it was last told, in seconds. A controller tells it twice a second.
TOLD_STANDS = 10.0
# How long the last answer stands when DNS fails or knows no replica; members that answer stay even longer, in seconds.
GRACE = 30.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(name: str, port: int) -> list[str]:
    """All A and AAAA records of `name`, sorted; none where there is no such name. Raises OSError when DNS fails."""
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

    The TTL is not looked at: Docker's says ten minutes, and its answers are true within a second. An engine that tells
    its list knows more, and is believed as long as it goes on telling; DNS takes over when it is gone, and then
    `when_untold` is called.
    """

    def __init__(self, source: str, fleet: Fleet, resolve: Resolve = resolve) -> None:
        match = re.fullmatch(r"dns://((?:[\w-]{1,63}\.)*[\w-]{1,63}\.?):(\d{1,5})", source, re.ASCII)
        if not match or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"'{source}' cannot be discovered: write dns://NAME:PORT")
        self._name, self._port = match[1], int(match[2])
        self._fleet = fleet
        self._resolve = resolve
        self._answered_at = fleet.clock()
        self._told: dict[str, Listed] = {}  # by address, what an engine said of it last
        self._told_until = float("-inf")
        self.when_untold: list[Callable[[], None]] = []
        self._is_failing = False
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

    def told(self, listing: Sequence[Listed]) -> None:
        """An engine says which replicas there are; raises ConfigError as `Fleet.reconcile` does."""
        self._fleet.reconcile(listing)
        self._told = {listed.url: listed for listed in listing}
        self._told_until = self._fleet.clock() + TOLD_STANDS

    async def look_up(self) -> None:
        """Asks once and reconciles; a failure, or an answer without a record, leaves the fleet as it is for a while.

        After that while, those leave that have not answered for as long either: a scaled-down service has no name any
        more, but a name server that is down says nothing about replicas that are up.
        """
        try:
            addresses = await self._resolve(self._name, self._port)
            why = "no such name"
        except OSError as error:
            addresses = []
            why = str(error) or "no answer in time"
        now = self._fleet.clock()
        if now < self._told_until:
            return
        self._engine_is_gone()
        if addresses:
            if self._is_failing:
                log.warning("DNS knows %s again: %d addresses", self._name, len(addresses))
            self._is_failing = False
            self._answered_at = now
            self._fleet.reconcile([self._listed(address) for address in addresses])
            return
        if not self._is_failing:
            log.warning("DNS does not say where %s is (%s); the replicas known so far are kept", self._name, why)
        self._is_failing = True
        if now - self._answered_at > GRACE:
            members = self._fleet.members.values()
            running = [m for m in members if m.listed.state == "RUNNING"]
            self._fleet.reconcile([m.listed for m in running if not m.is_failing_for(GRACE, now)])

    def _engine_is_gone(self) -> None:
        """If there was one: nobody starts a replica now."""
        if self._told_until == float("-inf"):
            return
        self._told_until = float("-inf")
        self._fleet.is_asleep = False
        for hook in self.when_untold:
            hook()

    def _listed(self, address: str) -> Listed:
        place = f"[{address}]:{self._port}" if ":" in address else f"{address}:{self._port}"
        url = f"http://{place}"
        told = self._told.get(url)
        return told if told and told.state == "RUNNING" else Listed(name=place, url=url, infra="dns", is_found=True)
