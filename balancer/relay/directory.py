"""From a request to the service that it is for. There is one; a second one would be another entry here."""

import asyncio
import ssl

from balancer.fleet.dial import Dialer
from balancer.relay.failover import RetryBudget
from balancer.relay.places import Places
from balancer.relay.pool import ConnectionPool
from balancer.relay.request import Request
from balancer.spec.settings import Settings


class Destination:
    """A service as the relay sees it: places at its replicas, connections to them, and what holds for its requests.

    `replica_key` is the replicas' own API key, `tls` for https replicas, `dialer` connects to all.
    """

    def __init__(
        self,
        places: Places,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        replica_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self.places = places
        self.settings = settings
        self.pool = ConnectionPool(settings, loop, tls, dialer)
        self.budget = RetryBudget()
        self.replica_key = replica_key.encode() if replica_key else None
        places.when_left.append(self.pool.forget)


class Directory:
    """Knows where each request goes."""

    def __init__(self, only: Destination) -> None:
        self._only = only

    def find(self, request: Request) -> Destination:
        """The service that it is for."""
        return self._only
