"""What to do next with each replica: start, drain, stop, wait or give up. Pure functions; times are in seconds."""

import enum
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from balancer.contract.words import Phase, Status
from balancer.operate.engines.engine import Ended
from balancer.spec.schema import Operation

# Failed starts after which a replica that was never ready is given up; each may take minutes to load a model.
FIRST_STARTS = 3
# Seconds between two attempts to lease a GPU; each attempt itself waits for a few seconds (recipe.py).
GPU_INTERVAL = 2.0
# New replicas of a version at a time: a process each, and a machine asked for a thousand at once stands still.
_NEW_AT_ONCE = 32
NONE: Mapping[int, str] = MappingProxyType({})


class Stage(enum.Enum):
    """The stage of a replica's life cycle."""

    WAITING = "its next start is due at start_at"
    RUNNING = "its process runs"
    DRAINING = "it runs, gets no new requests, and finishes what it has"
    STOPPING = "it is being stopped, for good"
    REPLACING = "it is being stopped because it has become unusable; then it starts again"
    GIVEN_UP = "it failed too often"


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as the controller knows it. Times are on the controller's clock."""

    id: int
    version: int
    stage: Stage = Stage.WAITING
    # When its current process was started, or the last one if none runs.
    launched_at: float = 0.0
    start_at: float = 0.0
    drained_at: float = 0.0
    # What the balancer reports: its status (None if the balancer does not know it) and its requests in flight.
    status: Status | None = None
    in_flight: int = 0
    ready_since: float | None = None
    was_ready: bool = False
    # Has its current process been ready for `min_ready` without a break? Then an update may rely on it.
    is_proven: bool = False
    # Since when a replica that only the controller probes may be awaited: its start, the end of its model's download,
    # or when it was last ready.
    awaited_since: float = 0.0
    # Processes in a row that ended before the replica had been ready for `stable_after`.
    failures: int = 0
    # Processes since it was last ready that ended without blame.
    interruptions: int = 0
    # Why its last process ended.
    reason: str = ""
    # When its engine ends it, and since how long before that another takes its place; None if nothing ends it.
    ends_at: float | None = None
    lead: float = 0.0
    # Its end is near, or its node is to be emptied: it serves on, and its successor is on its way.
    is_outgoing: bool = False
    # It waits in its engine's queue.
    is_queued: bool = False
    # It ended because others hold every GPU that it could use. True until it is ready, or ends for another reason.
    waits_for_gpu: bool = False

    @property
    def is_wanted(self) -> bool:
        """Does it count towards the wanted number of replicas?"""
        return self.stage not in (Stage.DRAINING, Stage.STOPPING) and not self.is_outgoing

    @property
    def is_ready(self) -> bool:
        return self.status is not None and self.status.phase is Phase.READY

    @property
    def is_leaving(self) -> bool:
        """Does the balancer give it nothing new, for good?"""
        return self.status is not None and self.status.phase is Phase.LEAVING

    @property
    def is_unusable(self) -> bool:
        """Has the balancer decided that it will not become ready any more?"""
        return self.status is not None and self.status.phase is Phase.FAILED


@dataclass(frozen=True, slots=True)
class Start:
    """Start the replica with this id, which is new or waiting."""

    id: int
    version: int


@dataclass(frozen=True, slots=True)
class Drain:
    id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop a replica for good."""

    id: int


@dataclass(frozen=True, slots=True)
class Replace:
    """Stop a replica that has become unusable, count a failure, and start it again."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop a replica whose host is gone, without waiting for it; another takes its place elsewhere."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a replica that has no process."""

    id: int


Action = Start | Drain | Stop | Replace | Abandon | Forget


def backoff(failures: int, operation: Operation) -> float:
    """Seconds to wait before the next start, after `failures` failures in a row."""
    # A float cannot hold 2.0 ** 1024.
    return min(operation.max_restart_backoff, operation.restart_backoff * 2.0 ** min(failures - 1, 32))


def started(replica: Replica, now: float) -> Replica:
    return replace(
        replica,
        stage=Stage.RUNNING,
        launched_at=now,
        awaited_since=now,
        status=None,
        ready_since=None,
        is_proven=False,
        ends_at=None,
        is_outgoing=False,
        is_queued=False,
    )


def moving(replica: Replica) -> Replica:
    """The replica once its node is to be emptied, or it was told to end: outgoing, however long it may yet run."""
    return replace(replica, is_outgoing=replica.is_outgoing or replica.stage is Stage.RUNNING)


def limited(replica: Replica, ran: float, ends_in: float | None, now: float, operation: Operation) -> Replica:
    """The replica as its engine lists it for the first time: it ran for so many seconds, and has so many left.

    They make its time limit, if it has any, half of which is its successor's at the most.
    """
    if ends_in is None:
        return replica
    return replace(replica, ends_at=now + ends_in, lead=min(operation.successor_lead, (ran + ends_in) / 2))


def ending(replica: Replica, ends_in: float | None, now: float, operation: Operation) -> Replica:
    """The replica with what its engine says of its end, in `ends_in` seconds. Once it is outgoing, it stays so."""
    if ends_in is None:
        return replace(replica, ends_at=None) if replica.ends_at is not None else replica
    known = replica if replica.ends_at is not None else limited(replica, 0.0, ends_in, now, operation)
    is_near = replica.stage is Stage.RUNNING and ends_in <= known.lead
    return replace(known, ends_at=now + ends_in, is_outgoing=replica.is_outgoing or is_near)


def ended(replica: Replica, over: Ended, now: float, operation: Operation, *, has_served: bool = False) -> Replica:
    """The replica after its process has ended: waiting for its next start, or given up.

    A replica of a version that `has_served` is never given up, because what it lacks now (a model store, a driver) may
    come back.
    """
    changed = replace(
        replica,
        reason=over.reason,
        status=None,
        in_flight=0,
        ready_since=None,
        is_proven=False,
        waits_for_gpu=over.waits_for_gpu,
    )
    if over.waits_for_gpu:
        return replace(changed, stage=Stage.WAITING, start_at=now + GPU_INTERVAL)
    if over.is_blameless and (replica.was_ready or not over.counts_if_never_ready):
        interruptions = replica.interruptions + 1
        # One that was ready starts again at once. Whoever ends each before that is asked less and less often.
        early = interruptions - replica.was_ready
        pause = backoff(early, operation) if early else 0.0
        return replace(changed, stage=Stage.WAITING, interruptions=interruptions, start_at=now + pause)
    failures = replica.failures + 1
    changed = replace(changed, failures=failures)
    limit = operation.restart_limit if replica.was_ready else min(FIRST_STARTS, operation.restart_limit)
    if not has_served and (failures >= limit or (over.is_hopeless and not replica.was_ready)):
        return replace(changed, stage=Stage.GIVEN_UP)
    return replace(changed, stage=Stage.WAITING, start_at=now + backoff(failures, operation))


def drained(replica: Replica, now: float) -> Replica:
    return replace(replica, stage=Stage.DRAINING, drained_at=now)


def observed(replica: Replica, status: Status, in_flight: int, now: float, operation: Operation) -> Replica:
    """The replica with what the balancer reports. Its failures are forgotten once it has been ready long enough."""
    is_ready = status.phase is Phase.READY
    since = (replica.ready_since if replica.ready_since is not None else now) if is_ready else None
    is_stable = since is not None and now - since >= operation.stable_after
    is_proven = since is not None and now - since >= operation.min_ready
    return replace(
        replica,
        status=status,
        in_flight=in_flight,
        ready_since=since,
        was_ready=replica.was_ready or is_ready,
        is_proven=replica.is_proven or is_proven,
        failures=0 if is_stable else replica.failures,
        interruptions=0 if is_ready else replica.interruptions,
        reason="" if is_ready else replica.reason,
        waits_for_gpu=replica.waits_for_gpu and not is_ready,
    )


def probed(
    replica: Replica, is_ready: bool, is_before_start: bool, now: float, patience: float, operation: Operation
) -> Replica:
    """The replica after a probe by the controller, which alone knows of it. It fails after `patience` seconds."""
    if is_ready or is_before_start:
        replica = replace(replica, awaited_since=now)
    if is_ready:
        status = Status.READY
    elif now - replica.awaited_since <= patience:
        status = Status.STARTING
    else:
        status = Status.FAILED_INITIAL_DELAY
        replica = replace(replica, reason=f"not ready after {patience:g} s (readiness_probe.initial_delay_seconds)")
    return observed(replica, status, 0, now, operation)


def decide(
    replicas: Collection[Replica],
    wanted: Mapping[int, int],
    next_id: int,
    now: float,
    drain_timeout: float,
    condemned: Collection[int] = (),
    lost: Mapping[int, str] = NONE,
) -> list[Action]:
    """The actions that bring the replicas closer to `wanted`, the number of each version; at most one per replica.

    `next_id` is the first free id. Replicas in `condemned` have to go, and new ones take their places; so do those in
    `lost`, whose host is gone, for the reason given there. Of many that are missing some start now, others next time.
    """
    gone = [r for r in replicas if r.id in lost and r.stage in (Stage.RUNNING, Stage.DRAINING)]
    actions: list[Action] = [Abandon(replica.id, lost[replica.id]) for replica in gone]
    replicas = [replica for replica in replicas if replica not in gone]
    # They serve until those that are to be there without them are; if these come too late, their engine ends them.
    outgoing = sorted((r for r in replicas if r.is_outgoing and r.stage is Stage.RUNNING), key=_urgency)
    missing = sum(wanted.values()) - sum(replica.is_wanted and replica.is_ready for replica in replicas)
    enough = outgoing[: max(0, len(outgoing) - max(0, missing))]
    # One that was told to end takes nothing new already.
    leaving = {replica.id for replica in outgoing if replica.is_leaving} | set(condemned)
    actions += [Drain(replica.id) for replica in outgoing if replica in enough or replica.id in leaving]
    for replica in replicas:
        if replica in outgoing:
            continue
        if replica.stage is Stage.RUNNING and replica.is_unusable:
            actions.append(Replace(replica.id, f"it was {replica.status}"))
        elif replica.stage is Stage.DRAINING:
            # SHUTTING_DOWN: it is draining and has no requests left. None: the balancer never knew it.
            is_idle = replica.status in (Status.SHUTTING_DOWN, None)
            if is_idle or now - replica.drained_at > drain_timeout:
                actions.append(Stop(replica.id))
    for version in sorted({replica.version for replica in replicas} | wanted.keys()):
        mine = [replica for replica in replicas if replica.version == version and replica.is_wanted]
        victims = [replica for replica in mine if replica.id in condemned]
        mine = [replica for replica in mine if replica.id not in condemned]
        surplus = len(mine) - wanted.get(version, 0)
        victims += sorted(mine, key=_usefulness)[: max(0, surplus)]
        for victim in victims:
            if victim in mine:
                mine.remove(victim)
            has_process = victim.stage in (Stage.RUNNING, Stage.REPLACING)
            actions.append(Drain(victim.id) if has_process else Forget(victim.id))
        actions += [Start(r.id, version) for r in mine if r.stage is Stage.WAITING and r.start_at <= now]
        for _ in range(min(-surplus, _NEW_AT_ONCE)):
            actions.append(Start(next_id, version))
            next_id += 1
    dropped = {action.id for action in actions if isinstance(action, Drain | Forget)}
    return [action for action in actions if not (isinstance(action, Replace) and action.id in dropped)]


def _usefulness(replica: Replica) -> tuple[bool, bool, int, int]:
    """A sort key: first to go are replicas without a process, then those not ready, least busy, newest."""
    return replica.stage is Stage.RUNNING, replica.is_ready, replica.in_flight, -replica.id


def _urgency(outgoing: Replica) -> tuple[bool, float, int]:
    """A sort key for those that make way: first those that do not serve, then those with the least time, least busy."""
    return outgoing.is_ready, math.inf if outgoing.ends_at is None else outgoing.ends_at, outgoing.in_flight


def is_hopeless(replicas: Iterable[Replica], total: int) -> bool:
    """Have all wanted replicas been given up?"""
    mine = [replica for replica in replicas if replica.is_wanted]
    return bool(mine) and total > 0 and all(replica.stage is Stage.GIVEN_UP for replica in mine)
