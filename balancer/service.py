"""One service: its replicas, their probes, the requests that wait for a place there, and the routing policy."""

import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from balancer.config import Config
from balancer.contract.listing import ReplicaListing, ServiceListing
from balancer.fleet.dial import Dialer
from balancer.fleet.discovery import DnsDiscovery, Resolve, resolve
from balancer.fleet.fleet import Clock, Fleet
from balancer.fleet.prober import Prober
from balancer.routing.admission import Admission
from balancer.routing.places import Places
from balancer.routing.policies import InstanceAwareLeastLoad, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import PrefixAware


@dataclass(slots=True)
class ServiceFacts:
    """What the balancer was told about the service."""

    name: str = "groundserve"
    version: str = "1"
    endpoint: str = ""
    # The status that the controller set, if any (FAILED, SHUTTING_DOWN, CONTROLLER_INIT), and its reason.
    status: str = ""
    reason: str = ""
    is_leaving: bool = False  # the balancer was told to stop: every answer closes its connection

    def take(self, service: ServiceListing) -> None:
        """Takes over what the controller says about the service."""
        self.name = service.name or self.name
        self.version = str(service.version or self.version)
        self.endpoint = service.endpoint or self.endpoint
        self.status, self.reason = service.status, service.reason

    def forget(self) -> None:
        """Drops the controller's status and reason, because the controller is gone."""
        self.status = self.reason = ""


class Service:
    """The parts of one service. `start` begins to watch its replicas, `stop` ends that.

    `clock` is the loop's time in seconds, `dialer` connects to replicas, `tls` checks https replicas, `look_up`
    resolves the name that replicas are discovered by. By the name `process`, replicas that share their GPUs know
    whose orders they follow.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        dialer: Dialer | None = None,
        tls: ssl.SSLContext | None = None,
        look_up: Resolve = resolve,
        process: str = "groundserve",
    ) -> None:
        self.config = config
        self.settings = config.settings
        self.facts = ServiceFacts(config.name)
        self.fleet = Fleet(self.settings, config.readiness, clock)
        self.admission = Admission(self.fleet, policy_of(config))
        self.places = Places(self.fleet, self.admission)
        self.prober = Prober(self.fleet, config.replica_key, tls, dialer=dialer, balancer=process)
        self.discovery = DnsDiscovery(config.discover, self.fleet, look_up) if config.discover else None
        if self.discovery is not None:
            self.discovery.when_controller_gone.append(self.facts.forget)

    def start(self) -> None:
        """Adds the configured replicas, begins to watch them, and starts discovery."""
        if self.config.replicas:
            self.fleet.reconcile(self.config.replicas)
        self.prober.start()
        if self.discovery is not None:
            self.discovery.start()

    def names(self) -> Collection[str]:
        """The names that requests may use for it: its own, its aliases, and the models that its replicas list."""
        return {self.facts.name, *self.settings.aliases, *self.fleet.models}

    def model_of(self, asked: object) -> str:
        """The model that answers a request which names this one: SGLang serves its own to whoever names another."""
        return answering(asked, self.fleet.models, self.settings.aliases, self.facts.name)

    @property
    def has_told_models(self) -> bool:
        """Has any of its replicas listed its models yet?"""
        return bool(self.fleet.models)

    @property
    def replica_key(self) -> str | None:
        """The API key that its replicas ask for."""
        return self.config.replica_key

    @property
    def has_replica(self) -> bool:
        """Could one of its replicas get a request now?"""
        return bool(self.fleet.available())

    async def stop(self) -> None:
        """Stops watching the replicas."""
        if self.discovery is not None:
            await self.discovery.stop()
        await self.prober.stop()

    def list_replicas(self, listing: Sequence[ReplicaListing]) -> None:
        """Takes an engine's list of the replicas; raises ConfigError as `Fleet.reconcile` does."""
        if self.discovery is not None:
            self.discovery.reconcile(listing)
        else:
            self.fleet.reconcile(listing)

    def renew(self, config: Config) -> None:
        """Applies a new policy, new settings, a new readiness probe and name while requests continue."""
        before, self.config = self.config, config
        self.settings.renew(config.settings)
        self.fleet.renew(config.readiness)
        if (config.policy, config.target_qps) != (before.policy, before.target_qps):
            self.admission.policy = policy_of(config)
        if config.name != before.name:
            self.facts.name = config.name


def answering(asked: object, models: Collection[str], aliases: Collection[str], name: str) -> str:
    """Which model of a service answers a request that names `asked`. `name` is the service's own."""
    if isinstance(asked, str) and (asked in models or asked in aliases):
        return asked
    return next(iter(models), name)


def policy_of(config: Config) -> Policy:
    """A new policy of the configured name."""
    match config.policy:
        case "round_robin":
            return RoundRobin()
        case "least_load":
            return LeastLoad()
        case "prefix_aware":
            return PrefixAware()
        case "instance_aware_least_load":
            return InstanceAwareLeastLoad(config.target_qps)
