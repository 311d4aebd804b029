"""Where the list of replicas comes from, when nobody hands it in: DNS, asked again each second."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.fleet.fleet import Fleet

log = logging.getLogger("groundserve")

INTERVAL = 1.0
# Longer than a resolver takes to give up a dead name server and ask the next one, in seconds.
LOOK_UP_TIMEOUT = 20.0
# How long an engine's list stands after it last came, in seconds. A controller sends it twice a second.
ENGINE_STANDS = 10.0
# How long the last answer stands when DNS fails or knows no replica; members that answer stay even longer, in seconds.
GRACE = 30.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class AddressListing(ReplicaListing):
    """An address that DNS gives: perhaps not the only one of its replica."""

    __slots__ = ()
    is_address_only = True


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

    The TTL is not looked at: Docker's says ten minutes, and its answers are true within a second. An engine that
    sends its list knows more, and is believed as long as it goes on sending; DNS takes over when it is gone, and then
    `when_engine_gone` is called.
    """

    def __init__(self, source: str, fleet: Fleet, resolve: Resolve = resolve) -> None:
        match = re.fullmatch(r"dns://((?:[\w-]{1,63}\.)*[\w-]{1,63}\.?):(\d{1,5})", source, re.ASCII)
        if not match or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"'{source}' cannot be discovered: write dns://NAME:PORT")
        self._name, self._port = match[1], int(match[2])
        self._fleet = fleet
        self._resolve = resolve
        self._answered_at = fleet.clock()
        self._by_engine: dict[str, ReplicaListing] = {}  # its last list, by endpoint
        self._by_engine_until = float("-inf")
        self.when_engine_gone: list[Callable[[], None]] = []
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

    def reconcile(self, listings: Sequence[ReplicaListing]) -> None:
        """An engine says which replicas there are; raises ConfigError as `Fleet.reconcile` does."""
        self._fleet.reconcile(listings)
        self._by_engine = {listing.endpoint: listing for listing in listings}
        self._by_engine_until = self._fleet.clock() + ENGINE_STANDS

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
        if now < self._by_engine_until:
            return
        self._engine_is_gone()
        if addresses:
            if self._is_failing:
                log.warning("DNS knows %s again: %d addresses", self._name, len(addresses))
            self._is_failing = False
            self._answered_at = now
            self._fleet.reconcile([self._listing(address) for address in addresses])
            return
        if not self._is_failing:
            log.warning("DNS does not say where %s is (%s); the replicas known so far are kept", self._name, why)
        self._is_failing = True
        if now - self._answered_at > GRACE:
            members = self._fleet.members.values()
            running = [m for m in members if m.listing.state is State.RUNNING]
            self._fleet.reconcile([m.listing for m in running if not m.is_failing_for(GRACE, now)])

    def _engine_is_gone(self) -> None:
        """If there was one: nobody starts a replica now."""
        if self._by_engine_until == float("-inf"):
            return
        self._by_engine_until = float("-inf")
        self._fleet.is_asleep = False
        for hook in self.when_engine_gone:
            hook()

    def _listing(self, address: str) -> ReplicaListing:
        place = f"[{address}]:{self._port}" if ":" in address else f"{address}:{self._port}"
        url = f"http://{place}"
        known = self._by_engine.get(url)
        return known if known and known.state is State.RUNNING else AddressListing(place, url, infra="dns")
