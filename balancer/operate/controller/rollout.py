"""A rolling or blue-green update, one look at a time. Pure: replicas in, how many of each version out."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from balancer.operate.controller.plan import Replica, Stage

Mode = Literal["rolling", "blue_green"]


class RolloutStatus(Enum):
    """How an update stands."""

    IN_PROGRESS = "some replicas are still of the old version"
    DONE = "all replicas that are wanted are of the new version, and ready"
    FAILED = "the new version does not become ready"


@dataclass(frozen=True, slots=True)
class Look:
    """What to have of each version now. `reason` says why the update failed."""

    old: int
    new: int
    status: RolloutStatus
    reason: str = ""


def look(mode: Mode, replicas: Iterable[Replica], version: int, total: int, surge: int) -> Look:
    """How far the update to `version` is, and what to have next.

    `total` replicas are wanted in the end, and `total + surge` may run at a time, those that still drain included:
    0 on a machine whose GPUs are all taken, where one has to go before another can come.
    """
    replicas = list(replicas)
    new = [replica for replica in replicas if replica.version == version and replica.is_wanted]
    old = [replica for replica in replicas if replica.version != version]
    for replica in new:
        if replica.stage is Stage.GIVEN_UP or replica.is_unusable:
            reason = replica.reason or f"it was {replica.status}"
            return Look(total, 0, RolloutStatus.FAILED, reason)
    ready = sum(replica.is_ready for replica in new)
    if ready >= total:
        return Look(0, total, RolloutStatus.IN_PROGRESS if old else RolloutStatus.DONE)
    if mode == "blue_green":
        # The old version serves alone until the whole of the new one is ready.
        return Look(total, total, RolloutStatus.IN_PROGRESS)
    if any(replica.waits_for_gpu for replica in new):
        surge = 0  # others hold what looked free: an old one has to make room after all
    room = total + surge - len(replicas)
    # As many at a time as there is room for beyond the old ones; at least one, once an old one has made room.
    coming = max(0, min(room, max(1, surge) - (len(new) - ready)))
    staying = max(0, total - ready - (surge == 0))
    return Look(staying, min(total, len(new) + coming), RolloutStatus.IN_PROGRESS)
