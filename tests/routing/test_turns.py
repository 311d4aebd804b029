"""balancer/routing/turns.py: each rule, and what they come to over simulated tenants."""

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.routing.turns import Need, Rules, Stage, Swap, Tenant, Turns

RULES = Rules()
A = ("GPU-a",)


def awake(id: str, since: float = 0.0, in_flight: int = 1, gpus: tuple[str, ...] = A, left: float = 60) -> Tenant:
    return Tenant(id, id.split("-")[0], gpus, Stage.AWAKE, since, in_flight, left)


def dozing(id: str, gpus: tuple[str, ...] = A) -> Tenant:
    return Tenant(id, id.split("-")[0], gpus, Stage.DOZING, 0.0)


def asked(since: float = 0.0, waiting: int = 1, priority: int = 0, min_awake: int = 0) -> Need:
    return Need(waiting, since, priority, min_awake)


def test_nobody_dozes_while_nobody_waits() -> None:
    assert Turns(RULES).decide(100, [awake("x", in_flight=0), dozing("y")], {"x": Need(), "y": Need()}) == []


def test_a_free_gpu_is_given_at_once() -> None:
    assert Turns(RULES).decide(0, [dozing("x"), dozing("y")], {"y": asked()}) == [Swap("y")]


def test_one_that_is_idle_gives_its_gpu_at_once() -> None:
    assert Turns(RULES).decide(0.1, [awake("x", in_flight=0), dozing("y")], {"y": asked()}) == [Swap("y", ("x",))]


def test_slice_and_turn_over() -> None:
    """A turn lasts its slice and what runs longer than the turn over is taken off."""
    turns, needs = Turns(RULES), {"y": asked()}
    assert turns.decide(1.9, [awake("x"), dozing("y")], needs) == []
    assert turns.decide(2.0, [awake("x", left=60), dozing("y")], needs) == [Swap("y", ("x",))]
    assert turns.decide(2.0, [awake("x", left=0.9), dozing("y")], needs) == []  # its answers are almost done
    assert turns.decide(2.5, [awake("x", left=0.6), dozing("y")], needs) == [Swap("y", ("x",))]
    assert turns.decide(3.1, [awake("x", left=0.1), dozing("y")], needs) == [Swap("y", ("x",))]


def test_expected_turn() -> None:
    """What is left of the present turn, and the turns of those before; nothing is known behind one that is pinned."""
    turns = Turns(RULES)
    there = [awake("x", since=9), dozing("y"), dozing("z")]
    assert turns.expected(10, "y", there, {"x": Need(), "y": Need()}) == 1.0
    assert turns.expected(10, "z", there, {"x": Need(), "y": asked(8), "z": asked(9)}) == 3.0
    assert turns.expected(10, "y", there, {"x": Need(), "y": asked(8), "z": asked(9)}) == 1.0
    assert turns.expected(10, "y", [awake("x", in_flight=0), dozing("y")], {"x": Need()}) == 0.0
    assert turns.expected(10, "y", there, {"x": Need(min_awake=1), "y": asked()}) == math.inf


def test_longer_slices() -> None:
    """More requests and a higher priority make a turn longer up to four times."""
    turns = Turns(RULES)
    assert turns.slice(awake("x", in_flight=3), {"y": asked(waiting=1)}, "y") == 6.0
    assert turns.slice(awake("x", in_flight=1), {"y": asked(waiting=5)}, "y") == 2.0
    assert turns.slice(awake("x", in_flight=1), {"x": asked(waiting=0, priority=1), "y": asked()}, "y") == 4.0
    assert turns.slice(awake("x", in_flight=1), {"x": asked(waiting=0, priority=9999), "y": asked(waiting=9)}, "y") == 2
    assert turns.slice(awake("x", in_flight=50), {"x": asked(waiting=9, priority=3), "y": asked()}, "y") == 8.0


def test_slices_grow_until_swaps_are_a_tenth_of_the_time() -> None:
    turns = Turns(RULES)
    for _ in range(30):
        turns.swapped(A, 0.5)
    assert math.isclose(turns.slice(awake("x"), {"y": asked()}, "y"), 4.5)


def test_order_of_turns() -> None:
    """Who has waited longest goes first but priority goes before."""
    there = [dozing("x"), dozing("y"), dozing("z")]
    assert Turns(RULES).decide(9, there, {"x": asked(3), "y": asked(2), "z": asked(4)}) == [Swap("y")]
    assert Turns(RULES).decide(9, there, {"x": asked(3), "y": asked(2), "z": asked(4, priority=1)}) == [Swap("z")]


def test_passed_over() -> None:
    """Who is passed over again and again goes before a higher priority."""
    turns = Turns(RULES)
    given_to = []
    for turn in range(8):
        needs = {"low": asked(0), "high": asked(turn, priority=3)}
        swaps = turns.decide(turn, [dozing("low"), dozing("high")], needs)
        given_to.append(swaps[0].wake)
    assert "low" in given_to
    assert given_to.index("low") == 4


def test_busy_and_pinned() -> None:
    """One that is waking is left alone and so is one that is pinned."""
    busy = Tenant("x", "x", A, Stage.BUSY, 0.0)
    assert Turns(RULES).decide(99, [busy, dozing("y")], {"y": asked()}) == []
    needs = {"x": asked(waiting=0, min_awake=1), "y": asked()}
    assert Turns(RULES).decide(99, [awake("x", in_flight=0), dozing("y")], needs) == []


def test_soonest_free_gpu() -> None:
    """Of several replicas the one wakes whose gpu is free soonest."""
    there = [awake("x-1", since=0), awake("y-1", since=1, gpus=("GPU-b",)), dozing("z-1"), dozing("z-2", ("GPU-b",))]
    assert Turns(RULES).decide(2.5, there, {"z": asked()}) == [Swap("z-1", ("x-1",))]


def test_second_replica() -> None:
    """A model that is awake gets another gpu only from one that wants it less."""
    there = [awake("x-1"), awake("y-1", gpus=("GPU-b",)), dozing("x-2", ("GPU-b",))]
    assert Turns(RULES).decide(99, there, {"x": asked(waiting=1)}) == []
    assert Turns(RULES).decide(99, there, {"x": asked(waiting=9)}) == [Swap("x-2", ("y-1",))]


def test_a_pair_of_gpus_is_kept_for_the_one_that_goes_first() -> None:
    pair = ("GPU-a", "GPU-b")
    there = [awake("x", since=0, gpus=("GPU-a",)), dozing("both", pair), dozing("z", ("GPU-b",))]
    needs = {"both": asked(0), "z": asked(0.5)}
    assert Turns(RULES).decide(1.0, there, needs) == []
    assert Turns(RULES).decide(2.0, there, needs) == [Swap("both", ("x",))]


def test_one_that_had_two_gpus_is_told_to_doze_once() -> None:
    there = [awake("both", gpus=("GPU-a", "GPU-b")), dozing("x", ("GPU-a",)), dozing("y", ("GPU-b",))]
    needs = {"x": asked(0), "y": asked(1)}
    assert Turns(RULES).decide(9, there, needs) == [Swap("x", ("both",))]


@dataclass
class Model:
    """A model with one replica in the simulation: its requests by how long they still run."""

    id: str
    gpus: tuple[str, ...]
    priority: int
    every: float  # seconds between two requests
    runs: float  # seconds each
    stage: Stage = Stage.DOZING
    since: float = 0.0
    queue: list[float] = field(default_factory=list)
    waits_since: float = math.inf
    running: list[float] = field(default_factory=list)
    next_at: float = 0.0
    longest_wait: float = 0.0
    served: int = 0

    def is_waiting(self) -> bool:
        return bool(self.queue) and self.stage is not Stage.AWAKE


class Simulation:
    """Tenants of some GPUs in virtual time, stepping by `STEP` seconds; each serves eight requests at a time."""

    STEP = 0.1

    def __init__(self, models: list[Model], swap: float) -> None:
        self.models = {model.id: model for model in models}
        self.turns = Turns(RULES)
        self.swap = swap
        self.now = 0.0
        self.under_way: list[tuple[float, Swap]] = []
        self.swapping = 0.0

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self._arrive_and_serve()
            self._finish_swaps()
            self._decide()
            self._look()
            self.now += self.STEP

    def _arrive_and_serve(self) -> None:
        for model in self.models.values():
            while model.next_at <= self.now:
                model.next_at += model.every
                model.queue.append(model.runs)
                model.waits_since = min(model.waits_since, self.now)
            if model.stage is Stage.AWAKE:
                model.running = [left - self.STEP for left in model.running]
                model.served += sum(left <= 0 for left in model.running)
                model.running = [left for left in model.running if left > 0]
                while model.queue and len(model.running) < 8:
                    model.running.append(model.queue.pop(0))
                model.waits_since = self.now if model.queue else math.inf

    def _finish_swaps(self) -> None:
        for done, swap in list(self.under_way):
            if done <= self.now:
                self.under_way.remove((done, swap))
                woken = self.models[swap.wake]
                woken.stage, woken.since = Stage.AWAKE, self.now
                woken.longest_wait = max(woken.longest_wait, self.now - woken.waits_since)
                self.turns.swapped(woken.gpus, self.swap)

    def _decide(self) -> None:
        busy = {id for _, swap in self.under_way for id in (swap.wake, *swap.doze)}
        tenants = [
            Tenant(
                *(model.id, model.id, model.gpus, Stage.BUSY if model.id in busy else model.stage, model.since),
                *(len(model.running), max(model.running, default=0.0)),
            )
            for model in self.models.values()
        ]
        needs = {model.id: Need(len(model.queue), model.waits_since, model.priority) for model in self.models.values()}
        for swap in self.turns.decide(self.now, tenants, needs):
            assert self.models[swap.wake].queue, "nobody wakes for nothing"
            for id in swap.doze:
                dozes = self.models[id]
                assert dozes.stage is Stage.AWAKE
                assert set(dozes.gpus) & set(self.models[swap.wake].gpus)
                dozes.stage = Stage.DOZING
                dozes.queue[:0] = dozes.running
                dozes.running = []
                dozes.waits_since = self.now if dozes.queue else math.inf
            self.models[swap.wake].stage = Stage.BUSY
            self.under_way.append((self.now + self.swap, swap))
            self.swapping += self.swap

    def _look(self) -> None:
        held = [gpu for model in self.models.values() if model.stage is not Stage.DOZING for gpu in model.gpus]
        assert len(held) == len(set(held)), "two have one GPU"
        free = {gpu for model in self.models.values() for gpu in model.gpus} - set(held)
        single = [model for model in self.models.values() if model.is_waiting() and set(model.gpus) <= free]
        pairs = any(len(model.gpus) > 1 for model in self.models.values())
        assert pairs or not single, "a GPU is free, and one waits for it"


MODELS = st.lists(
    st.tuples(
        st.sampled_from([("a",), ("b",), ("a",), ("a", "b")]),
        st.integers(0, 3),
        st.sampled_from([0.2, 1.0, 7.0, 30.0]),
        st.sampled_from([0.1, 1.5, 20.0]),
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(MODELS, st.sampled_from([0.05, 0.25, 0.6]))
def test_nobody_starves(drawn: list[tuple[tuple[str, ...], int, float, float]], swap: float) -> None:
    """Nobody starves whatever is asked of whom."""
    models = [Model(f"m{n}", *rest) for n, rest in enumerate(drawn)]
    simulation = Simulation(models, swap)
    simulation.run(90)
    highest = max(model.priority for model in models)
    for model in models:
        bound = simulation.turns.bound(len(models) - 1, swap, min(3, highest - model.priority))
        waited = simulation.now - model.waits_since if model.is_waiting() else 0.0
        assert max(model.longest_wait, waited) <= bound + 2 * Simulation.STEP, model


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 4), st.sampled_from([0.1, 0.3, 0.6]), st.sampled_from([1.5, 20.0]))
def test_swap_share(count: int, swap: float, runs: float) -> None:
    """Swaps take less than a tenth of the time however much is asked."""
    models = [Model(f"m{n}", ("a",), 0, 0.2, runs) for n in range(count)]
    simulation = Simulation(models, swap)
    simulation.run(200)
    assert simulation.swapping <= 0.1 * simulation.now + swap * count
    served = [model.served for model in models]
    assert min(served) > 0


def test_one_awake_and_one_told() -> None:
    """Who has just refused to doze is still awake beside who was to wake instead: no third is woken meanwhile."""
    told = Tenant("x", "x", A, Stage.BUSY, 0.0)
    for tenants in ([told, awake("y", in_flight=0), dozing("z")], [awake("y", in_flight=0), told, dozing("z")]):
        assert Turns(RULES).decide(100, tenants, {"z": asked()}) == []
