"""One service: its replicas and what keeps an eye on them, who waits for a place there, and by which rules."""

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
    """What the balancer was told of the service."""

    name: str = "groundserve"
    version: str = "1"
    endpoint: str = ""
    # The controller's word where it has one (FAILED, SHUTTING_DOWN, CONTROLLER_INIT), and its reason.
    status: str = ""
    reason: str = ""
    is_leaving: bool = False  # the balancer was told to stop: every answer says that it is its connection's last

    def take(self, service: ServiceListing) -> None:
        """The controller's word from now on."""
        self.name = service.name or self.name
        self.version = str(service.version or self.version)
        self.endpoint = service.endpoint or self.endpoint
        self.status, self.reason = service.status, service.reason

    def forget(self) -> None:
        """The controller is gone, and its word with it."""
        self.status = self.reason = ""


class Service:
    """The parts of one service, put together. `start` begins to watch its replicas, `stop` ends that.

    `clock` is the loop's time in seconds, `dialer` connects to replicas, `tls` is how https ones are checked, `look_up`
    how names of replicas are resolved.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        dialer: Dialer | None = None,
        tls: ssl.SSLContext | None = None,
        look_up: Resolve = resolve,
    ) -> None:
        self.config = config
        self.settings = config.settings
        self.facts = ServiceFacts(config.name)
        self.fleet = Fleet(self.settings, config.readiness, clock)
        self.admission = Admission(self.fleet, policy_of(config))
        self.places = Places(self.fleet, self.admission)
        self.prober = Prober(self.fleet, config.replica_key, tls, dialer=dialer)
        self.discovery = DnsDiscovery(config.discover, self.fleet, look_up) if config.discover else None
        if self.discovery is not None:
            self.discovery.when_controller_gone.append(self.facts.forget)

    def start(self) -> None:
        """Takes up the configured replicas and begins to watch them, and for others."""
        self.fleet.reconcile(self.config.replicas)
        self.prober.start()
        if self.discovery is not None:
            self.discovery.start()

    def names(self) -> Collection[str]:
        """What requests may call it: its own name, its aliases, and the models that its replicas have told of."""
        return {self.facts.name, *self.settings.aliases, *self.fleet.models}

    @property
    def has_told_models(self) -> bool:
        """Has any of its replicas said yet which models it serves?"""
        return bool(self.fleet.models)

    async def stop(self) -> None:
        """Watches no more."""
        if self.discovery is not None:
            await self.discovery.stop()
        await self.prober.stop()

    def list_replicas(self, listing: Sequence[ReplicaListing]) -> None:
        """An engine says which replicas there are; raises ConfigError as `Fleet.reconcile` does."""
        if self.discovery is not None:
            self.discovery.reconcile(listing)
        else:
            self.fleet.reconcile(listing)

    def renew(self, config: Config) -> None:
        """Goes by another policy, other numbers, another probe and name from now on, while requests go on."""
        before, self.config = self.config, config
        self.settings.renew(config.settings)
        self.fleet.renew(config.readiness)
        if (config.policy, config.target_qps) != (before.policy, before.target_qps):
            self.admission.policy = policy_of(config)
        if config.name != before.name:
            self.facts.name = config.name


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
