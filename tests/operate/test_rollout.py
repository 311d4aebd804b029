"""Updates against replicas that start, become ready and drain in virtual time."""

import random
from dataclasses import replace

import pytest

from balancer.contract.words import Status
from balancer.operate.controller import plan, rollout
from balancer.operate.controller.plan import Drain, Forget, Replica, Stage, Start, Stop
from balancer.operate.controller.rollout import Mode, RolloutStatus, RolloutStep
from balancer.operate.engines.engine import Ended
from balancer.spec.schema import Operation

OPERATION = Operation(min_ready=0)


class World:
    """Replicas of version 1, ready, on a machine with room for so many; version 2 may never become ready."""

    def __init__(self, total: int, fits: int, seed: int = 0, is_broken: bool = False) -> None:
        self.total, self.fits = total, fits
        self.replicas = {
            id: Replica(id, 1, Stage.RUNNING, status=Status.READY, was_ready=True) for id in range(1, total + 1)
        }
        self.next_id = total + 1
        self.now = 0.0
        self.draw = random.Random(seed)
        self.due: dict[int, float] = {}
        self.is_broken = is_broken
        self.least_ready = total
        self.most_running = total
        self.versions_serving: set[frozenset[int]] = set()

    def step(self, wanted: dict[int, int]) -> None:
        for action in plan.decide(self.replicas.values(), wanted, self.next_id, self.now, 1e9):
            replica = self.replicas.get(action.id)
            match action:
                case Start(id, version):
                    self.next_id = max(self.next_id, id + 1)
                    self.replicas[id] = plan.started(replica or Replica(id, version), self.now)
                    self.due[id] = self.now + self.draw.uniform(1, 30)
                case Drain(id):
                    assert replica is not None
                    self.replicas[id] = replace(plan.drained(replica, self.now), status=Status.DRAINING, in_flight=1)
                    self.due[id] = self.now + self.draw.uniform(0, 20)
                case Stop(id) | Forget(id):
                    del self.replicas[id]
                case _:
                    raise AssertionError(action)
        for id, replica in list(self.replicas.items()):
            if self.due.get(id, self.now + 1) <= self.now:
                if replica.stage is Stage.DRAINING:
                    self.replicas[id] = replace(replica, status=Status.SHUTTING_DOWN, in_flight=0)
                elif self.is_broken and replica.version == 2:
                    self.replicas[id] = plan.ended(replica, Ended(id, "no such flag"), self.now, OPERATION)
                else:
                    self.replicas[id] = plan.observed(replica, Status.READY, 0, self.now, OPERATION)
        serving = [r for r in self.replicas.values() if r.status is Status.READY and r.stage is Stage.RUNNING]
        self.least_ready = min(self.least_ready, len(serving))
        self.most_running = max(self.most_running, len(self.replicas))
        self.versions_serving.add(frozenset(replica.version for replica in serving))
        self.now += 0.5

    def update(self, mode: Mode) -> RolloutStep:
        for _ in range(20_000):
            step = rollout.next_step(mode, self.replicas.values(), 2, self.total, self.fits - self.total)
            if step.status is not RolloutStatus.IN_PROGRESS:
                return step
            self.step({1: step.old, 2: step.new})
        raise AssertionError(f"it never ends: {self.replicas}")


@pytest.mark.parametrize("total", [1, 2, 3, 8])
@pytest.mark.parametrize("surge", [0, 1, 2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_a_rolling_update_keeps_to_the_room_and_to_its_replicas(total: int, surge: int, seed: int) -> None:
    world = World(total, total + surge, seed)
    assert world.update("rolling").status is RolloutStatus.DONE
    assert {replica.version for replica in world.replicas.values()} == {2}
    assert len(world.replicas) == total
    assert world.most_running <= total + surge
    assert world.least_ready >= total - (surge == 0)


@pytest.mark.parametrize("seed", range(5))
def test_blue_green_switches_when_all_are_ready(seed: int) -> None:
    """Blue-green switches only when all replicas of the new version are ready."""
    world = World(3, 6, seed)
    while (
        step := rollout.next_step("blue_green", world.replicas.values(), 2, 3, 3)
    ).status is RolloutStatus.IN_PROGRESS:
        new_ready = sum(r.status is Status.READY for r in world.replicas.values() if r.version == 2)
        assert step.old == (0 if new_ready == 3 else 3)
        world.step({1: step.old, 2: step.new})
    assert (step.status, world.least_ready, world.most_running) == (RolloutStatus.DONE, 3, 6)


@pytest.mark.parametrize("mode", ["rolling", "blue_green"])
@pytest.mark.parametrize("surge", [0, 1, 3])
def test_rollback(mode: Mode, surge: int) -> None:
    """A version that never becomes ready fails, and the old one comes back."""
    world = World(3, 3 + (3 if mode == "blue_green" else surge), is_broken=True)
    step = world.update(mode)
    assert (step.status, step.reason, step.old, step.new) == (RolloutStatus.FAILED, "no such flag", 3, 0)
    for _ in range(200):
        world.step({1: step.old, 2: step.new})
    assert [(r.version, r.status) for r in world.replicas.values()] == [(1, "READY")] * 3
    assert world.least_ready >= 3 - (world.fits == 3)


@pytest.mark.parametrize("status", [Status.FAILED_INITIAL_DELAY, Status.FAILED_PROBING])
def test_failed_replica_fails_the_update(status: Status) -> None:
    """A new replica that the balancer reports as failed fails the update."""
    new = Replica(2, 2, Stage.RUNNING, status=status)
    failed = RolloutStep(1, 0, RolloutStatus.FAILED, f"it was {status}", 2)
    assert rollout.next_step("rolling", [new], 2, 1, 1) == failed


def test_ready_for_a_moment_is_not_updated() -> None:
    """A version that dies soon after it was ready fails the update, and the old one has served all along."""
    operation = Operation(min_ready=10)
    old = Replica(1, 1, Stage.RUNNING, status=Status.READY, was_ready=True)
    new, now = plan.started(Replica(2, 2), 0.0), 0.0
    for _ in range(plan.FIRST_STARTS):
        assert rollout.next_step("rolling", [old, new], 2, 1, 1) == RolloutStep(1, 1, RolloutStatus.IN_PROGRESS)
        for later in (1, 5, 9):
            new = plan.observed(new, Status.READY, 0, now + later, operation)
            assert rollout.next_step("rolling", [old, new], 2, 1, 1) == RolloutStep(1, 1, RolloutStatus.IN_PROGRESS)
        now += 10
        new = plan.ended(new, Ended(2, "killed by signal 9"), now, operation)
        failed = rollout.next_step("rolling", [old, new], 2, 1, 1)
        new = plan.started(new, now)
    assert failed == RolloutStep(1, 0, RolloutStatus.FAILED, "killed by signal 9", 2)


def test_ready_for_min_ready_is_updated() -> None:
    operation = Operation(min_ready=10)
    new = plan.observed(plan.started(Replica(2, 2), 0.0), Status.READY, 0, 1.0, operation)
    assert rollout.next_step("rolling", [new], 2, 1, 1).status is RolloutStatus.IN_PROGRESS
    new = plan.observed(new, Status.STARTING, 0, 5.0, operation)
    new = plan.observed(new, Status.READY, 0, 6.0, operation)
    new = plan.observed(new, Status.READY, 0, 15.9, operation)
    assert rollout.next_step("rolling", [new], 2, 1, 1).status is RolloutStatus.IN_PROGRESS
    new = plan.observed(new, Status.READY, 0, 16.0, operation)
    assert rollout.next_step("rolling", [new], 2, 1, 1).status is RolloutStatus.DONE


def test_nothing_to_serve_is_updated_at_once() -> None:
    assert rollout.next_step("rolling", [], 2, 0, 1) == RolloutStep(0, 0, RolloutStatus.DONE)


def test_an_old_replica_that_was_given_up_is_no_obstacle() -> None:
    world = World(2, 3)
    world.replicas[1] = replace(world.replicas[1], stage=Stage.GIVEN_UP, status=Status.FAILED)
    assert world.update("rolling").status is RolloutStatus.DONE


def test_a_replica_that_gets_no_gpu_makes_an_old_one_go_first() -> None:
    """Others took what looked free: waiting for them could take for ever."""
    old = Replica(1, 1, Stage.RUNNING, status=Status.READY, was_ready=True)
    new = Replica(2, 2, Stage.WAITING)
    assert rollout.next_step("rolling", [old, new], 2, 1, surge=1) == RolloutStep(1, 1, RolloutStatus.IN_PROGRESS)
    assert rollout.next_step("rolling", [old, replace(new, waits_for_gpu=True)], 2, 1, surge=1) == RolloutStep(
        0, 1, RolloutStatus.IN_PROGRESS
    )
