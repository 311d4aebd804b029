"""Which events a change of a replica amounts to. Pure."""

from balancer.contract.words import Status
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.state.event_log import Event, What


def between(before: Replica | None, after: Replica | None, now: float, why: str = "") -> Event | None:
    """What happened to a replica; None if nothing that is worth telling.

    `before` is None for one that is new, `after` for one that is gone. `why` is what the balancer says of its status;
    `now` is on the controller's clock.
    """
    if after is None:
        return Event(What.STOPPED, "", before.id) if before is not None else None
    if before is None or before.stage is not after.stage:
        return _of_stage(before, after, now)
    if before.status is not after.status and after.stage is Stage.RUNNING:
        return _of_status(before, after, now, why)
    return None


def _of_stage(before: Replica | None, after: Replica, now: float) -> Event | None:
    match after.stage:
        case Stage.RUNNING if before is None:
            return Event(What.TAKEN_OVER, f"version {after.version}, from an earlier controller", after.id)
        case Stage.RUNNING:
            assert before is not None
            what = What.RESTARTED if before.launched_at else What.STARTED
            if before.waits_for_gpu:
                return None  # every two seconds, until a GPU is free
            return Event(what, f"version {after.version}", after.id)
        case Stage.DRAINING:
            return Event(What.DRAINING, "", after.id)
        case Stage.GIVEN_UP:
            return Event(What.GIVEN_UP, after.reason, after.id)
        case Stage.WAITING if before is not None and after.waits_for_gpu:
            return None if before.waits_for_gpu else Event(What.WAITS_FOR_GPU, after.reason, after.id)
        case Stage.WAITING if before is not None and after.reason:
            again = f"starts again in {max(0.0, after.start_at - now):.3g} s"
            return Event(What.FAILED, f"{after.reason}; {again}", after.id)
    return None


def _of_status(before: Replica, after: Replica, now: float, why: str) -> Event | None:
    match after.status:
        case Status.READY if before.status in (Status.NOT_READY, Status.EJECTED):
            return Event(What.READY, "again", after.id)
        case Status.READY:
            return Event(What.READY, f"{now - after.launched_at:.0f} s after its start", after.id)
        case Status.EJECTED:
            return Event(What.EJECTED, why, after.id)
        case Status.NOT_READY:
            return Event(What.NOT_READY, why, after.id)
    return None
