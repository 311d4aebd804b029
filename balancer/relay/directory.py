"""Finds the service that a request is for: by the model that it names, if there are several services."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from balancer import errors
from balancer.accounts.store import Keeper
from balancer.fleet.dial import Dialer
from balancer.relay.deaths import Deaths
from balancer.relay.failover import RetryBudget
from balancer.relay.kept_responses import KeptResponses, kept_id
from balancer.relay.places import Places
from balancer.relay.pool import ConnectionPool
from balancer.relay.request import Request
from balancer.relay.requested_model import requested_model
from balancer.spec.settings import Settings

KeeperOf = Callable[[str], Awaitable[Keeper | None]]
LOOK_AGAIN = 0.05  # seconds
LOOKS = 100


class Named(Protocol):
    """The part of a service that knows its names."""

    @property
    def has_told_models(self) -> bool:
        """Has any of its replicas reported yet which models it serves?"""

    @property
    def has_replica(self) -> bool:
        """Could one of its replicas get a request now?"""

    def names(self) -> Collection[str]:
        """All names that requests may use for it, as far as they are known."""

    def model_of(self, asked: object) -> str:
        """The model that answers a request which names this one."""


class Destination:
    """A service as the relay sees it: places at its replicas, connections to them, and the state behind its retries.

    `replica_key` is the replicas' own API key, `tls` is for https replicas, `dialer` opens all connections. Requests
    may use any of the names of `service`.
    """

    def __init__(
        self,
        places: Places,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        replica_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        dialer: Dialer | None = None,
        service: Named | None = None,
    ) -> None:
        self.places = places
        self.settings = settings
        self.pool = ConnectionPool(settings, loop, tls, dialer)
        self.budget = RetryBudget()
        self.deaths = Deaths(places.lives)
        self.responses = KeptResponses()
        self.replica_key = replica_key.encode() if replica_key else None
        self.service = service
        places.when_left.append(self.pool.forget)
        places.when_left.append(lambda replica: self.responses.forget(replica))


class Directory:
    """Knows where each request goes. The first destination's settings apply to the endpoint itself.

    `keeper_of` says who keeps an answer of /v1/responses of which this process knows nothing.
    """

    def __init__(self, destinations: Sequence[Destination], keeper_of: KeeperOf | None = None) -> None:
        self.first = destinations[0]
        self._keeper_of = keeper_of
        self._destinations = destinations  # shared with the caller, who adds and removes others

    @property
    def has_several(self) -> bool:
        """Are there several services, so that the model decides?"""
        return len(self._destinations) > 1

    @property
    def lists_models(self) -> bool:
        """Is GET /v1/models answered from what is known here? For several services, or while no replica is ready."""
        service = self.first.service
        return self.has_several or (service is not None and service.has_told_models and not service.has_replica)

    async def recall(self, request: Request) -> None:
        """Learns who keeps the answer that the request is about, if another process has noted that."""
        if self._keeper_of is None or not (id_ := kept_id(request)):
            return
        if any(one.responses.known(id_) is not None for one in self._destinations):
            return
        if (noted := await self._keeper_of(id_)) is None:
            return
        authority = noted.address.encode("latin-1")
        for _ in range(LOOKS):
            for destination in self._destinations:
                if (replica := destination.places.named(noted.replica, authority)) is not None:
                    destination.responses.learn(id_, replica, noted.key, is_heard=True)
                    return
            if any(one.places.has_any for one in self._destinations):
                return  # it has left
            await asyncio.sleep(LOOK_AGAIN)  # this process has just begun, and was told of no replica yet

    def find(self, request: Request) -> Destination:
        """The service that the request is for. Raises ServeError for a model that none has.

        A single service takes any model, unless it is strict.
        """
        if not self.has_several and not (self.first.settings.strict_model and requested_model(request)):
            return self.first
        if request.path.startswith("/v1/responses/"):  # it names no model
            id_, issue = kept_id(request), request.issue
            return next((one for one in self._destinations if one.responses.keeper(id_, issue)), self.first)
        model = requested_model(request)
        known: set[str] = set()
        is_certain = True
        for destination in self._destinations:
            if (service := destination.service) is None:
                continue
            if model in (names := service.names()):
                return destination
            known.update(names)
            is_certain = is_certain and service.has_told_models
        if not model:
            raise errors.model_not_named(sorted(known))
        # A replica that is still starting may turn out to serve it.
        raise errors.model_not_found(model, sorted(known)) if is_certain else errors.model_not_known_yet(model)
