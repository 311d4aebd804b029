"""Decisions about replicas, in virtual time."""

from collections.abc import Collection
from dataclasses import replace

import pytest

from balancer.contract.words import Status
from balancer.operate.controller import plan
from balancer.operate.controller.plan import Abandon, Drain, Forget, Replace, Replica, Stage, Start, Stop
from balancer.operate.engines.engine import Ended
from balancer.spec.schema import Operation

OPERATION = Operation(restart_backoff=1, max_restart_backoff=8, restart_limit=5, stable_after=60)
DIED = Ended(1, "it died")
NOT_FOUND = Ended(1, "not found", is_hopeless=True)
NO_GPU = Ended(1, "no GPU free", waits_for_gpu=True)
READY = Replica(1, 1, Stage.RUNNING, status=Status.READY, was_ready=True)


def decide(
    *replicas: Replica, wanted: dict[int, int], now: float = 0.0, condemned: Collection[int] = ()
) -> list[plan.Action]:
    return plan.decide(replicas, wanted, next_id=9, now=now, drain_timeout=100, condemned=condemned)


def test_missing_replicas_are_started() -> None:
    """Missing replicas are started at the same time, under new numbers."""
    assert decide(wanted={1: 2}) == [Start(9, 1), Start(10, 1)]


def test_many_missing_replicas_are_started_by_and_by() -> None:
    """Not a thousand processes at once, whatever was asked for."""
    first = decide(wanted={1: 1000})
    assert 1 < len(first) < 100
    there = [Replica(action.id, 1, Stage.RUNNING) for action in first if isinstance(action, Start)]
    assert decide(*there, wanted={1: len(there) + 1}) == [Start(9, 1)]


def test_nothing_is_done_when_all_is_as_wanted() -> None:
    assert decide(READY, replace(READY, id=2, status=Status.STARTING), wanted={1: 2}) == []


def test_a_waiting_replica_starts_when_its_time_has_come() -> None:
    waiting = Replica(1, 1, Stage.WAITING, start_at=5)
    assert decide(waiting, wanted={1: 1}, now=4.9) == []
    assert decide(waiting, wanted={1: 1}, now=5.0) == [Start(1, 1)]


@pytest.mark.parametrize("status", [Status.FAILED_INITIAL_DELAY, Status.FAILED_PROBING])
def test_an_unusable_replica_is_replaced(status: Status) -> None:
    assert decide(replace(READY, status=status), wanted={1: 1}) == [Replace(1, f"it was {status}")]


@pytest.mark.parametrize("status", [Status.STARTING, Status.READY, Status.NOT_READY, Status.EJECTED, None])
def test_a_replica_that_may_recover_is_left_alone(status: Status | None) -> None:
    assert decide(replace(READY, status=status), wanted={1: 1}) == []


def test_a_replica_given_up_stays_so_and_is_not_made_up_for() -> None:
    assert decide(replace(READY, stage=Stage.GIVEN_UP), wanted={1: 1}) == []


def test_scaling_down_takes_the_least_useful_first() -> None:
    replicas = [
        replace(READY, id=1, in_flight=3),
        replace(READY, id=2, in_flight=1),
        replace(READY, id=3, in_flight=1),
        replace(READY, id=4, status=Status.STARTING),
        replace(READY, id=5, stage=Stage.WAITING, start_at=99),
        replace(READY, id=6, stage=Stage.GIVEN_UP),
    ]
    order: list[int] = []
    for count in range(5, -1, -1):
        (first,) = decide(*(r for r in replicas if r.id not in order), wanted={1: count})
        assert isinstance(first, Forget if first.id in (5, 6) else Drain)
        order.append(first.id)
    assert order == [6, 5, 4, 3, 2, 1]


def test_a_surplus_replica_that_is_unusable_is_not_replaced() -> None:
    assert decide(replace(READY, status=Status.FAILED_PROBING), wanted={1: 0}) == [Drain(1)]


def test_draining_replica_is_stopped() -> None:
    """A draining replica is stopped when nothing is in flight or its time is up."""
    draining = replace(READY, stage=Stage.DRAINING, status=Status.DRAINING, drained_at=10)
    assert decide(draining, wanted={}, now=50) == []
    assert decide(replace(draining, status=Status.READY), wanted={}, now=50) == []
    assert decide(replace(draining, status=Status.SHUTTING_DOWN), wanted={}, now=50) == [Stop(1)]
    assert decide(replace(draining, status=None), wanted={}, now=50) == [Stop(1)]
    assert decide(draining, wanted={}, now=110.1) == [Stop(1)]


def test_a_replica_on_its_way_out_is_made_up_for() -> None:
    draining = replace(READY, stage=Stage.DRAINING, status=Status.DRAINING)
    assert decide(draining, replace(READY, id=2, stage=Stage.STOPPING), wanted={1: 1}) == [Start(9, 1)]


def test_a_replica_that_is_being_replaced_is_not_made_up_for() -> None:
    assert decide(replace(READY, stage=Stage.REPLACING), wanted={1: 1}) == []


def test_versions_are_counted_apart() -> None:
    old, new = READY, replace(READY, id=2, version=2)
    assert decide(old, new, wanted={1: 1, 2: 2}) == [Start(9, 2)]
    assert decide(old, new, wanted={2: 1}) == [Drain(1)]


def test_back_off_doubles_up_to_its_longest() -> None:
    assert [plan.backoff(failures, OPERATION) for failures in range(1, 7)] == [1, 2, 4, 8, 8, 8]
    assert plan.backoff(10**6, OPERATION) == 8


def test_a_replica_that_was_ready_is_given_up_after_the_limit() -> None:
    replica, now, waits = READY, 0.0, []
    while replica.stage is not Stage.GIVEN_UP:
        replica = plan.ended(replica, DIED, now, OPERATION)
        waits.append(replica.start_at - now)
        now += 10
        if replica.stage is Stage.WAITING:
            replica = plan.started(replica, now)
    assert waits[:4] == [1, 2, 4, 8]
    assert (replica.failures, replica.reason) == (5, "it died")


def test_a_replica_that_was_never_ready_is_given_up_sooner() -> None:
    replica = Replica(1, 1)
    for failures in (1, 2, 3):
        assert replica.stage is not Stage.GIVEN_UP
        replica = plan.ended(plan.started(replica, 0.0), DIED, 0.0, OPERATION)
        assert replica.failures == failures
    assert replica.stage is Stage.GIVEN_UP


def test_what_would_end_the_same_way_is_not_tried_again() -> None:
    never = plan.started(Replica(1, 1), 0.0)
    assert plan.ended(never, NOT_FOUND, 0.0, OPERATION).stage is Stage.GIVEN_UP
    # It did work before: whatever is wrong now may pass.
    assert plan.ended(READY, NOT_FOUND, 0.0, OPERATION).stage is Stage.WAITING


def test_being_ready_forgives_failures() -> None:
    """Being ready for long enough clears earlier failures, and a single bad look does not count."""
    replica = replace(READY, failures=3, ready_since=None)
    for now in (0.0, 30.0, 59.0):
        replica = plan.observed(replica, Status.READY, 0, now, OPERATION)
        assert replica.failures == 3
    assert plan.observed(replica, Status.READY, 0, 60.0, OPERATION).failures == 0
    interrupted = plan.observed(
        plan.observed(replica, Status.NOT_READY, 0, 59.5, OPERATION), Status.READY, 0, 60.0, OPERATION
    )
    assert interrupted.failures == 3


def test_the_reason_of_an_earlier_end_is_forgotten_once_ready() -> None:
    replica = replace(READY, reason="it died", status=Status.STARTING)
    assert plan.observed(replica, Status.STARTING, 0, 0.0, OPERATION).reason == "it died"
    assert plan.observed(replica, Status.READY, 0, 0.0, OPERATION).reason == ""


def test_hopeless_service() -> None:
    """A service is hopeless when every wanted replica has been given up."""
    lost = replace(READY, stage=Stage.GIVEN_UP)
    assert plan.is_hopeless([lost, replace(lost, id=2)], 2)
    assert plan.is_hopeless([lost, replace(READY, id=2, stage=Stage.DRAINING)], 1)
    assert not plan.is_hopeless([lost, replace(lost, id=2, stage=Stage.WAITING)], 2)
    assert not plan.is_hopeless([], 0)
    assert not plan.is_hopeless([], 1)


def test_waiting_for_a_gpu_is_no_failure_and_goes_on_for_ever() -> None:
    replica, now = Replica(1, 1), 0.0
    for _ in range(100):
        replica = plan.ended(plan.started(replica, now), NO_GPU, now, OPERATION)
        assert (replica.stage, replica.failures, replica.reason) == (Stage.WAITING, 0, "no GPU free")
        assert 0 < replica.start_at - now < 10
        now = replica.start_at
    assert replica.waits_for_gpu
    replica = plan.observed(plan.started(replica, now), Status.READY, 0, now, OPERATION)
    assert (replica.waits_for_gpu, replica.reason) == (False, "")
    assert not plan.ended(replica, DIED, now, OPERATION).waits_for_gpu


def test_a_condemned_replica_goes_and_another_takes_its_place() -> None:
    two = replace(READY, id=2)
    assert decide(READY, two, wanted={1: 2}, condemned={2}) == [Drain(2), Start(9, 1)]
    assert decide(Replica(1, 1, start_at=5), two, wanted={1: 2}, condemned={1}) == [Forget(1), Start(9, 1)]


def test_replica_condemned_twice() -> None:
    """A replica that is condemned in a step that removes it anyway is reported once."""
    three = [READY, replace(READY, id=2), replace(READY, id=3)]
    assert decide(*three, wanted={1: 2}, condemned={3}) == [Drain(3)]
    assert decide(*three, wanted={1: 1}, condemned={3}) == [Drain(3), Drain(2)]
    assert decide(*three, wanted={}, condemned={1, 2, 3, 7}) == [Drain(1), Drain(2), Drain(3)]
    unusable = replace(READY, status=Status.FAILED_PROBING)
    assert decide(unusable, wanted={1: 1}, condemned={1}) == [Drain(1), Start(9, 1)]


@pytest.mark.parametrize("stage", [Stage.DRAINING, Stage.STOPPING])
def test_who_goes_already_is_not_condemned_again(stage: Stage) -> None:
    going = replace(READY, stage=stage, status=Status.DRAINING)
    assert decide(going, replace(READY, id=2), wanted={1: 1}, condemned={1}) == []


def test_only_what_has_no_process_is_forgotten() -> None:
    for stage in (Stage.RUNNING, Stage.REPLACING):
        assert decide(replace(READY, stage=stage), wanted={}) == [Drain(1)]
    for stage in (Stage.WAITING, Stage.GIVEN_UP):
        assert decide(replace(READY, stage=stage), wanted={}) == [Forget(1)]


# Hosts that are lost, and ends that are known beforehand.


def test_a_replica_on_a_lost_host_is_made_up_for_at_once() -> None:
    """Another starts in the same step, under a number of its own, because the lost one may take long to be gone."""
    lost = replace(READY, status=Status.NOT_READY)
    actions = plan.decide([lost, replace(READY, id=2)], {1: 2}, 9, 0.0, 100, lost={1: "h1 does not answer"})
    assert actions == [Abandon(1, "h1 does not answer"), Start(9, 1)]


def test_what_drains_on_a_lost_host_is_abandoned_too() -> None:
    draining = replace(READY, stage=Stage.DRAINING, status=Status.DRAINING)
    assert plan.decide([draining], {1: 0}, 9, 0.0, 100, lost={1: "gone"}) == [Abandon(1, "gone")]


def test_a_successor_starts_before_a_time_limit() -> None:
    """It starts `successor_lead` before the end, and the old one drains only when the new one is ready."""
    operation = Operation(successor_lead=600)
    limited = plan.ending(READY, 3600, now=0, operation=operation)
    assert decide(limited, wanted={1: 1}) == []
    outgoing = plan.ending(limited, 600, now=3000, operation=operation)
    assert outgoing.is_outgoing
    assert decide(outgoing, wanted={1: 1}, now=3000) == [Start(9, 1)]
    coming = replace(READY, id=9, status=Status.STARTING)
    assert decide(outgoing, coming, wanted={1: 1}, now=3001) == []
    assert decide(outgoing, replace(coming, status=Status.READY), wanted={1: 1}, now=3002) == [Drain(1)]


def test_as_many_make_way_as_have_successors() -> None:
    """First those that do not serve, then those with the least time left; the others serve on."""
    moving = [plan.moving(replace(READY, id=id)) for id in (1, 2, 3)]
    coming = [replace(READY, id=9), replace(READY, id=10), replace(READY, id=11, status=Status.STARTING)]
    assert decide(*moving, *coming, wanted={1: 3}) == [Drain(1), Drain(2)]
    short = plan.ending(moving[2], 5, now=0, operation=OPERATION)
    loading = replace(moving[1], status=Status.STARTING)
    assert decide(moving[0], loading, short, *coming, wanted={1: 3}) == [Drain(2), Drain(3)]
    assert decide(*moving, *coming[2:], wanted={1: 1}) == [Drain(1), Drain(2)]


def test_only_what_runs_makes_way() -> None:
    assert not plan.moving(replace(READY, stage=Stage.WAITING)).is_outgoing


def test_half_of_a_short_time_limit_is_the_successors() -> None:
    operation = Operation(successor_lead=600)
    limited = plan.ending(READY, 100, now=0, operation=operation)
    assert not plan.ending(limited, 51, now=49, operation=operation).is_outgoing
    assert plan.ending(limited, 50, now=50, operation=operation).is_outgoing


def test_the_next_controller_keeps_the_successor() -> None:
    """Half of the limit is meant, and not half of what is left of it by now."""
    operation = Operation(successor_lead=1800)
    for left, is_outgoing in ((1900, False), (900, True), (60, True)):
        found = plan.limited(READY, 86_400 - left, left, now=0, operation=operation)
        found = plan.ending(found, left, now=0, operation=operation)
        assert found.is_outgoing is is_outgoing
    successor = Replica(2, 1, Stage.RUNNING, was_ready=True, is_queued=True)
    assert decide(found, successor, wanted={1: 1}) == []


def test_a_successor_of_one_that_was_told_to_end_starts_at_once() -> None:
    """It takes nothing new any more, however long its last answers take, and is stopped after them."""
    told = plan.moving(plan.ending(READY, 600, now=0, operation=OPERATION))
    assert decide(told, wanted={1: 1}) == [Start(9, 1)]
    assert decide(replace(told, status=Status.DRAINING), wanted={1: 1}) == [Drain(1), Start(9, 1)]
    draining = plan.drained(replace(told, status=Status.DRAINING), 0)
    coming = replace(READY, id=9, status=Status.STARTING)
    assert decide(draining, coming, wanted={1: 1}) == []
    assert decide(replace(draining, status=Status.SHUTTING_DOWN), coming, wanted={1: 1}) == [Stop(1)]


def test_an_outgoing_one_goes_though_its_limit_grows() -> None:
    outgoing = plan.ending(plan.ending(READY, 100, 0, OPERATION), 40, 60, OPERATION)
    assert plan.ending(outgoing, 9000, 61, OPERATION).is_outgoing


def test_an_end_without_blame_is_no_failure() -> None:
    """One that was ready starts again at once; whoever ends it each time before that does so after longer pauses."""
    over = Ended(1, "preempted", is_blameless=True)
    for replica, pauses in ((READY, [0, 1, 2, 4, 8, 8]), (replace(READY, was_ready=False), [1, 2, 4, 8, 8, 8])):
        for pause in pauses:
            replica = plan.ended(replica, over, 10, OPERATION)
            assert (replica.stage, replica.start_at, replica.failures) == (Stage.WAITING, 10 + pause, 0)
            starting = plan.observed(plan.started(replica, 20), Status.STARTING, 0, 20, OPERATION)
            assert starting.interruptions == replica.interruptions
        again = plan.ended(plan.observed(replica, Status.READY, 0, 20, OPERATION), over, 30, OPERATION)
        assert again.start_at == 30


def test_a_time_limit_shorter_than_the_start_is_a_failure() -> None:
    """Else it would go round for ever; one that has been ready starts again at once."""
    over = Ended(1, "time limit", is_blameless=True, counts_if_never_ready=True)
    assert plan.ended(READY, over, 10, OPERATION).failures == 0
    loading = replace(READY, was_ready=False)
    for _ in range(plan.FIRST_STARTS):
        loading = plan.ended(loading, over, 10, OPERATION)
    assert loading.stage is Stage.GIVEN_UP
