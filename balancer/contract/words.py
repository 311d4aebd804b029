"""The status words for replicas and services, most of them SkyServe's, and the phases into which they are grouped."""

import enum


class Phase(enum.StrEnum):
    """What a status means to the code that plans, waits, or picks a colour."""

    PENDING = "pending"  # nothing serves yet, and nothing is wrong
    READY = "ready"  # it serves now, or, where it shares its GPUs, in its turn
    UNAVAILABLE = "unavailable"  # it was ready, and may be again soon
    LEAVING = "leaving"
    FAILED = "failed"  # it will not become ready on its own


class State(enum.StrEnum):
    """What the controller tells the balancer of a replica. Whether a running one is ready, the balancer finds out."""

    PROVISIONING = "PROVISIONING"
    FETCHING = "FETCHING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    SHUTTING_DOWN = "SHUTTING_DOWN"

    @property
    def is_before_start(self) -> bool:
        """Has its time to become ready not begun yet? Fetching a model of 140 GB may take hours."""
        return self in (State.PROVISIONING, State.FETCHING)


class Status(enum.StrEnum):
    """SkyServe's statuses of a replica, and five of ours (FETCHING, DOZING, ASLEEP, DRAINING, EJECTED)."""

    PROVISIONING = "PROVISIONING"
    FETCHING = "FETCHING"
    STARTING = "STARTING"
    READY = "READY"
    DOZING = "DOZING"
    ASLEEP = "ASLEEP"
    NOT_READY = "NOT_READY"
    DRAINING = "DRAINING"
    EJECTED = "EJECTED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    FAILED = "FAILED"
    FAILED_INITIAL_DELAY = "FAILED_INITIAL_DELAY"
    FAILED_PROBING = "FAILED_PROBING"

    @property
    def phase(self) -> Phase:
        return _PHASES[self]


class ServiceStatus(enum.StrEnum):
    """SkyServe's statuses of a service, and one of ours (NO_BALANCER)."""

    CONTROLLER_INIT = "CONTROLLER_INIT"
    REPLICA_INIT = "REPLICA_INIT"
    READY = "READY"
    NO_REPLICA = "NO_REPLICA"
    NO_BALANCER = "NO_BALANCER"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    FAILED = "FAILED"

    @property
    def phase(self) -> Phase:
        return _SERVICE_PHASES[self]


_PHASES = {
    Status.PROVISIONING: Phase.PENDING,
    Status.FETCHING: Phase.PENDING,
    Status.STARTING: Phase.PENDING,
    Status.READY: Phase.READY,
    Status.DOZING: Phase.READY,
    Status.ASLEEP: Phase.READY,
    Status.NOT_READY: Phase.UNAVAILABLE,
    Status.EJECTED: Phase.UNAVAILABLE,
    Status.DRAINING: Phase.LEAVING,
    Status.SHUTTING_DOWN: Phase.LEAVING,
    Status.FAILED: Phase.FAILED,
    Status.FAILED_INITIAL_DELAY: Phase.FAILED,
    Status.FAILED_PROBING: Phase.FAILED,
}
_SERVICE_PHASES = {
    ServiceStatus.CONTROLLER_INIT: Phase.PENDING,
    ServiceStatus.REPLICA_INIT: Phase.PENDING,
    ServiceStatus.NO_REPLICA: Phase.PENDING,
    ServiceStatus.NO_BALANCER: Phase.UNAVAILABLE,
    ServiceStatus.READY: Phase.READY,
    ServiceStatus.SHUTTING_DOWN: Phase.LEAVING,
    ServiceStatus.FAILED: Phase.FAILED,
}
