"""The services of one process, kept in step with what the relay, the admin port and the sweep know about them."""

import asyncio
import logging
import secrets
import ssl
from collections.abc import Iterator

from balancer.admin.feed import Feed
from balancer.config import Config, for_service
from balancer.errors import ConfigError
from balancer.fleet.dial import Dialer
from balancer.fleet.discovery import Resolve
from balancer.fleet.fleet import Fleet
from balancer.observe.history import History
from balancer.observe.tally import Tallies
from balancer.relay.directory import Destination
from balancer.relay.kept_responses import Hearers, KeptResponses
from balancer.relay.sweep import Job
from balancer.routing.turns import Rules
from balancer.service import Service
from balancer.turn_taking import TurnTaking

log = logging.getLogger("groundserve")


class Services:
    """The services of the process's own configuration, which stay as long as it runs, and those that join it.

    The lists belong together, item by item, and are changed in place, so other parts may keep them. `jobs` are the
    sweep's. `noted` is told who keeps which answer of /v1/responses.
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        dialer: Dialer,
        tls: ssl.SSLContext,
        look_up: Resolve,
        tallies: Tallies,
        noted: Hearers | None = None,
    ) -> None:
        self.all: list[Service] = []
        self.destinations: list[Destination] = []
        self.histories: list[History] = []
        self.feeds: list[Feed] = []
        self.jobs: dict[str, Job] = {}
        self._config = config
        self._loop = loop
        self._dialer = dialer
        self._tls = tls
        self._look_up = look_up
        self._tallies = tallies
        self._noted = noted
        self._endpoint = ""  # empty until the process serves
        self._process = (
            f"{config.name}-{secrets.token_hex(4)}"  # unique: two may share a GPU without knowing each other
        )
        self.turn_taking = TurnTaking(self.still_here, self._rules)
        self.jobs["turns on shared GPUs"] = self.turn_taking.tick
        self._leaving: dict[str, tuple[Service, Destination]] = {}  # finishing their requests
        self._own = [self._add(one) for one in (config, *config.others)]

    @property
    def first(self) -> Service:
        """The service whose settings apply to the endpoint itself."""
        return self.all[0]

    @property
    def share(self) -> float:
        """Which part of a key's limit is ours beside other balancers: the largest that a service with replicas has."""
        return max((service.fleet.share for service in self.all if service.fleet.members), default=1.0)

    def start(self, endpoint: str) -> None:
        """Begins to watch the replicas of all services."""
        self._endpoint = endpoint
        for service in self.all:
            self._start(service)

    def ident(self, service: Service) -> str:
        """What other processes call the service: it stays the same when this one is started anew."""
        return str(self._own.index(service)) if service in self._own else f"+{service.facts.name}"

    def renew(self, config: Config) -> None:
        """Applies a changed configuration to the process's own services; controllers send that of the others."""
        self._config = config
        for service, renewed in zip(self._own, (config, *config.others), strict=True):
            service.renew(renewed)

    def leave(self) -> None:
        """Notes that the process was told to stop."""
        for service in self.all:
            service.facts.is_leaving = True

    async def stop(self) -> None:
        """Stops watching replicas and closes the idle connections to them."""
        await self.turn_taking.stop()
        for service, destination in (*zip(self.all, self.destinations, strict=True), *self._leaving.values()):
            await service.stop()
            destination.pool.close()

    # Services that come and go while the process runs

    def join(self, name: str, text: str, replica_key: str | None) -> None:
        """Serves one more service behind the endpoint, or applies its changed file if it is already served.

        `text` is its service file, `replica_key` its replicas' API key. Raises ConfigError for a file that cannot be
        used, for a service that is still leaving, and for one that the process was started for.
        """
        config = for_service(text, name, replica_key, self._config)
        for service in self.all:
            if service.facts.name == name:
                self._check_joined(service)
                service.renew(config)
                return
        if name in self._leaving:
            raise ConfigError(f"{name} still finishes what it has: try again in a moment")
        self._start(self._add(config))
        log.info("%s is served here too", name)

    async def part(self, name: str) -> int:
        """Takes a service that joined off the endpoint. Returns how many requests it still has: call again until 0.

        Returns 0 for a name that is not served. Raises ConfigError for a service that the process was started for.
        """
        for index, service in enumerate(self.all):
            if service.facts.name == name:
                self._check_joined(service)
                self._leaving[name] = (service, self.destinations[index])
                self.feeds[index].close()
                del self.all[index], self.destinations[index], self.histories[index], self.feeds[index]
                break
        if name not in self._leaving:
            return 0
        service, destination = self._leaving[name]
        if requests := service.fleet.in_flight + service.admission.queue_depth:
            return requests
        del self._leaving[name]
        for job in _JOBS:
            self.jobs.pop(job.format(name), None)
        await service.stop()
        destination.pool.close()
        log.info("%s is not served here any more", name)
        return 0

    def _fleets(self) -> dict[str, Fleet]:
        return {service.facts.name: service.fleet for service in self.all}

    def _check_joined(self, service: Service) -> None:
        if service in self._own:
            raise ConfigError(f"{service.facts.name} is what this balancer was started for: it goes with the process")

    def _add(self, config: Config) -> Service:
        service = Service(config, self._loop.time, self._dialer, self._tls, self._look_up, self._process)
        service.fleet.when_joined.append(self._tallies.member_joined)
        service.fleet.when_left.append(self._tallies.member_left)
        self.turn_taking.watch(service)
        key = config.replica_key
        destination = Destination(service.places, service.settings, self._loop, key, self._tls, self._dialer, service)
        destination.responses = KeptResponses(self._noted)
        history = History(service.fleet, service.admission, self._tallies)
        self.all.append(service)
        self.destinations.append(destination)
        self.histories.append(history)
        facts, fleet, admission = service.facts, service.fleet, service.admission
        self.feeds.append(
            Feed(
                facts,
                fleet,
                admission,
                self._tallies,
                history,
                self._fleets,
                keeps_usage=self._config.state is not None,
            )
        )
        steps: tuple[Job, ...] = (destination.pool.sweep, lambda _: service.admission.expire(), history.take)
        self.jobs |= {job.format(config.name): step for job, step in zip(_JOBS, steps, strict=True)}
        return service

    def still_here(self) -> Iterator[Service]:
        """All services that have, or may have, requests."""
        yield from self.all
        yield from (service for service, _ in self._leaving.values())

    def _rules(self) -> Rules:
        settings = self._config.settings
        return Rules(settings.gpu_slice, settings.max_turn_over)

    def _start(self, service: Service) -> None:
        service.facts.endpoint = self._endpoint
        service.start()


_JOBS = ("connections to replicas of {}", "requests that wait for {}", "the page's history of {}")
