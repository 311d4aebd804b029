"""The words for how a replica or a service is, most of them SkyServe's, and the one way in which they are grouped."""

import enum


class Phase(enum.StrEnum):
    """The groups: what a word means to whoever plans, waits, or paints it in a colour."""

    PENDING = "pending"  # nothing serves yet, and nothing is wrong
    READY = "ready"
    UNAVAILABLE = "unavailable"  # it was ready, and may soon be again
    LEAVING = "leaving"
    FAILED = "failed"  # it will not become ready by itself


class State(enum.StrEnum):
    """What an engine knows of a replica: whether its process is wanted, and runs. All else the balancer finds out."""

    PROVISIONING = "PROVISIONING"
    FETCHING = "FETCHING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    SHUTTING_DOWN = "SHUTTING_DOWN"

    @property
    def is_before_start(self) -> bool:
        """Does the time that a replica has to become ready not run yet? A model of 140 GB may come for hours."""
        return self in (State.PROVISIONING, State.FETCHING)


class Status(enum.StrEnum):
    """SkyServe's words for a replica, and three of ours (FETCHING, DRAINING, EJECTED)."""

    PROVISIONING = "PROVISIONING"
    FETCHING = "FETCHING"
    STARTING = "STARTING"
    READY = "READY"
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
    """SkyServe's words for a service."""

    CONTROLLER_INIT = "CONTROLLER_INIT"
    REPLICA_INIT = "REPLICA_INIT"
    READY = "READY"
    NO_REPLICA = "NO_REPLICA"
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
    ServiceStatus.READY: Phase.READY,
    ServiceStatus.SHUTTING_DOWN: Phase.LEAVING,
    ServiceStatus.FAILED: Phase.FAILED,
}
