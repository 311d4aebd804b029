"""Where the list of replicas comes from if no controller sends it: DNS, looked up every second."""

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
# Seconds; longer than a resolver takes to give up on a dead name server and ask the next one.
LOOK_UP_TIMEOUT = 20.0
# Seconds for which a controller's list stays valid. It sends one twice a second.
LISTING_STANDS = 10.0
# Seconds for which the last answer stays valid when DNS fails or knows no replica; members that pass stay even longer.
GRACE = 30.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class AddressListing(ReplicaListing):
    """An address that DNS returned: its replica may have others, too."""

    __slots__ = ()
    is_address_only = True


async def resolve(name: str, port: int) -> list[str]:
    """All A and AAAA records of `name`, sorted; none if there is no such name. Raises OSError if DNS fails."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOK_UP_TIMEOUT):
            records = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return []
        raise
    return sorted({str(record[4][0]) for record in records})


class DnsDiscovery:
    """Keeps the fleet in line with `dns://NAME:PORT`: Compose, Swarm's tasks.NAME, or a headless Service of Kubernetes.

    The TTL is ignored: Docker's is ten minutes, though its answers are up to date within a second. A controller that
    sends its list knows more than DNS, so its list is used as long as it goes on sending. When it is gone, DNS takes
    over, and `when_controller_gone` is called.
    """

    def __init__(self, source: str, fleet: Fleet, resolve: Resolve = resolve) -> None:
        match = re.fullmatch(r"dns://((?:[\w-]{1,63}\.)*[\w-]{1,63}\.?):(\d{1,5})", source, re.ASCII)
        if not match or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"'{source}' cannot be discovered: write dns://NAME:PORT")
        self._name, self._port = match[1], int(match[2])
        self._fleet = fleet
        self._resolve = resolve
        self._answered_at = fleet.clock()
        self._listings: dict[str, ReplicaListing] = {}  # as the controller last sent them, by endpoint
        self._listings_until = float("-inf")
        self.when_controller_gone: list[Callable[[], None]] = []
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
        """Takes a controller's list of the replicas; raises ConfigError as `Fleet.reconcile` does."""
        self._fleet.reconcile(listings)
        self._listings = {listing.endpoint: listing for listing in listings}
        self._listings_until = self._fleet.clock() + LISTING_STANDS

    async def look_up(self) -> None:
        """Looks the name up once and reconciles. After a failure, or an answer without records, the fleet stays as it
        is for a while.

        After that, members leave if their probes have failed for as long: a service scaled to zero has no name any
        more, but a name server that is down says nothing about replicas that are up.
        """
        try:
            addresses = await self._resolve(self._name, self._port)
            why = "no such name"
        except OSError as error:
            addresses = []
            why = str(error) or "no answer in time"
        now = self._fleet.clock()
        if now < self._listings_until:
            return
        self._end_controllers_list()
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

    def _end_controllers_list(self) -> None:
        """Drops the controller's list, if there was one. Without a controller, requests do not start replicas."""
        if self._listings_until == float("-inf"):
            return
        self._listings_until = float("-inf")
        self._fleet.is_asleep = False
        for hook in self.when_controller_gone:
            hook()

    def _listing(self, address: str) -> ReplicaListing:
        place = f"[{address}]:{self._port}" if ":" in address else f"{address}:{self._port}"
        url = f"http://{place}"
        known = self._listings.get(url)
        return known if known and known.state is State.RUNNING else AddressListing(place, url, infra="dns")
