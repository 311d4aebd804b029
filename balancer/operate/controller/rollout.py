"""A rolling or blue-green update, step by step. Pure: takes replicas, returns the number of each version."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from balancer.operate.controller.plan import FIRST_STARTS, Replica, Stage

Mode = Literal["rolling", "blue_green"]


class RolloutStatus(Enum):
    """The progress of an update."""

    IN_PROGRESS = "some replicas still have the old version"
    DONE = "all wanted replicas have the new version and have stayed ready"
    FAILED = "the new version does not become ready"


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """How many replicas of each version to run now. `reason` says why the update failed, `failed` on which replica."""

    old: int
    new: int
    status: RolloutStatus
    reason: str = ""
    failed: int | None = None


def next_step(mode: Mode, replicas: Iterable[Replica], version: int, total: int, surge: int) -> RolloutStep:
    """The progress of the update to `version`, and how many replicas of each version to run next.

    `total` replicas are wanted in the end, and at most `total + surge` may run at a time, including those that are
    still draining. `surge` is 0 if all GPUs are in use: then an old replica has to go before a new one can start.
    """
    replicas = list(replicas)
    new = [replica for replica in replicas if replica.version == version and replica.is_wanted]
    old = [replica for replica in replicas if replica.version != version]
    for replica in new:
        if replica.stage is Stage.GIVEN_UP or replica.is_unusable or replica.failures >= FIRST_STARTS:
            reason = replica.reason or f"it was {replica.status}"
            return RolloutStep(total, 0, RolloutStatus.FAILED, reason, replica.id)
    ready = sum(replica.is_ready and replica.is_proven for replica in new)
    if ready >= total:
        return RolloutStep(0, total, RolloutStatus.IN_PROGRESS if old else RolloutStatus.DONE)
    if mode == "blue_green":
        # The old version serves alone until all replicas of the new one are ready.
        return RolloutStep(total, total, RolloutStatus.IN_PROGRESS)
    if any(replica.waits_for_gpu or replica.is_queued for replica in new):
        surge = 0  # a GPU that looked free is in use, so an old replica has to go first after all
    room = total + surge - len(replicas)
    # Start as many at a time as fit beside the old ones, or one if an old one has to go first.
    coming = max(0, min(room, max(1, surge) - (len(new) - ready)))
    staying = max(0, total - ready - (surge == 0))
    return RolloutStep(staying, min(total, len(new) + coming), RolloutStatus.IN_PROGRESS)
