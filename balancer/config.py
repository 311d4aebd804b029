"""The configuration of one balancer process, from flags, environment and service file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from balancer.contract.listing import ReplicaListing
from balancer.spec.loopback import is_loopback_name
from balancer.spec.service_file import parse
from balancer.spec.settings import PolicyName, ReadinessProbe, Settings


@dataclass(frozen=True, slots=True)
class Config:
    """Addresses are (host, port); port 0 means any free port."""

    listen: tuple[str, int] = ("127.0.0.1", 30001)
    admin: tuple[str, int] = ("127.0.0.1", 30002)
    # Descriptors of listening sockets that our parent hands to us; None: we open them ourselves.
    listen_fd: int | None = None
    admin_fd: int | None = None
    # In a container, both ports listen on all addresses: the host's addresses at which they are published.
    published: str | None = None
    admin_published: str | None = None
    accept_when_ready: float = 0  # max. seconds for which clients wait, unaccepted, until a replica is ready
    policy: PolicyName = "round_robin"
    target_qps: Mapping[str, float] = field(default_factory=dict)  # by GPU type, for instance_aware_least_load
    replicas: tuple[ReplicaListing, ...] = ()
    discover: str | None = None
    name: str = "groundserve"
    service_file: Path | None = None  # watched while the process runs: changes to it take effect
    settings: Settings = field(default_factory=Settings)
    readiness: ReadinessProbe = field(default_factory=ReadinessProbe)
    replica_key: str | None = None
    admin_key: str | None = None
    api_keys: Path | None = None
    state: Path | None = None  # the folder of keys that are issued here, and of usage; None: neither is kept
    wants_keys: bool = False  # lets nobody in without a key, even while there is none
    tls_cert: Path | None = None  # the endpoint's, with tls_key; both or neither
    tls_key: Path | None = None
    replica_ca: Path | None = None  # CA certificates for https replicas; None: the machine's own
    is_log_json: bool = False
    otlp: str | None = None  # URL of an OpenTelemetry collector; None: nothing is traced
    workers: int = 1  # processes that relay; with more than one, another one coordinates them
    # Further services behind the same endpoint; their fields that concern the whole process are ignored.
    others: tuple["Config", ...] = ()

    @property
    def is_for_this_machine(self) -> bool:
        """Whether only this machine, and containers beside ours, reach the endpoint."""
        return is_loopback_name(self.published or self.listen[0])

    @property
    def is_admin_for_this_machine(self) -> bool:
        """The same of the admin port."""
        return is_loopback_name(self.admin_published or self.admin[0])


def for_service(text: str, name: str, replica_key: str | None, process: Config) -> Config:
    """The configuration of one more service in `process`, from the text of its service file. Raises ConfigError."""
    described = parse(text, source=name, name=name)
    policy = described.service.replica_policy
    target = policy.target_qps_per_replica if policy else None
    return replace(
        process,
        name=name,
        policy=described.policy or "round_robin",
        target_qps=dict(target) if isinstance(target, dict) else {},
        replicas=(),
        discover=None,
        service_file=None,
        settings=described.settings,
        readiness=described.readiness_probe or ReadinessProbe(),
        replica_key=replica_key,
        others=(),
    )


Reread = Callable[[], Config]
