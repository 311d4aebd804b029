"""The autoscaler under recorded and adversarial loads, in virtual time."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from balancer.operate.controller.autoscale import SHARE, Autoscaler, Rule, rule_for
from balancer.spec.service_file import parse

QPS = Rule(least=1, most=10, requests_per_second=2.0, upscale_delay=300, downscale_delay=1200)
IN_FLIGHT = Rule(least=0, most=4, in_flight=8, upscale_delay=30, downscale_delay=120)

Load = Callable[[int], tuple[int, int, int]]


def run(rule: Rule, load: Load, seconds: int, current: int | None = None) -> list[int]:
    """The target in each second of a load: what arrives, is in flight and waits in that second."""
    autoscaler, targets = Autoscaler(rule), []
    target = rule.least if current is None else current
    for second in range(seconds):
        target = autoscaler.target(float(second), target, *load(second))
        targets.append(target)
    return targets


def arriving(rate: Callable[[int], int]) -> Load:
    return lambda second: (rate(second), 0, 0)


def changes(targets: list[int]) -> list[tuple[int, int]]:
    """(second, new target) of each change."""
    return [(s, now) for s, (before, now) in enumerate(pairwise(targets), 1) if before != now]


def test_steady_load() -> None:
    """A steady load gets one replica per target, and then nothing changes."""
    targets = run(QPS, arriving(lambda _: 7), 4000)
    assert targets[-1] == math.ceil(7 / 2)
    assert max(targets) == 4
    assert changes(targets)[-1][0] <= 300 + 60


def test_a_change_waits_for_its_share_of_the_delay() -> None:
    # A rate fills the minute's window at once where each second is like the other, so only the delay counts.
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=100, downscale_delay=200)
    up = run(rule, lambda second: (0, 24 if second >= 500 else 0, 0), 800)
    assert changes(up) == [(500 + SHARE * 100, 3)]
    down = run(rule, lambda second: (0, 24 if second < 500 else 0, 0), 800, current=3)
    assert changes(down) == [(500 + SHARE * 200, 1)]


def test_a_burst_shorter_than_that_changes_nothing() -> None:
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=100, downscale_delay=200)
    assert changes(run(rule, lambda second: (0, 32 if 500 <= second < 570 else 0, 0), 1000)) == []
    assert changes(run(rule, lambda second: (0, 0 if 500 <= second < 650 else 32, 0), 1000, current=4)) == []


def test_jitter_delays_nothing() -> None:
    """One look in ten that asks for less; SkyServe's counter would begin anew at each."""
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=100, downscale_delay=200)
    jitter = run(rule, lambda second: (0, 0 if second % 10 == 0 else 24, 0), 300)
    smooth = run(rule, lambda _: (0, 24, 0), 300)
    (first, target), (also, same) = changes(jitter)[0], changes(smooth)[0]
    assert target == same == 3
    assert first - also <= 10


@pytest.mark.parametrize("up_delay", [0.0, 5.0, 60.0])
def test_quick_rise_is_kept(up_delay: float) -> None:
    """A quick rise is not taken back because of the low load before it."""
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=up_delay, downscale_delay=600)
    targets = run(rule, lambda second: (0, 24 if 1000 <= second < 1300 else 0, 0), 2000)
    (rose, most), (fell, least) = changes(targets)
    assert (most, least) == (3, 1)
    assert rose - 1000 == SHARE * up_delay
    assert fell - 1300 == SHARE * 600 if up_delay else fell - rose >= SHARE * 600


def test_swinging_load() -> None:
    """A load that swings faster than the delays does not make the number of replicas swing."""
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=100, downscale_delay=200)
    targets = run(rule, lambda second: (0, 32 if second // 50 % 2 else 0, 0), 3000)
    assert len(changes(targets)) <= 1


def test_it_never_leaves_its_limits_whatever_the_load() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        rule = Rule(
            least=draw.randrange(3),
            most=3 + draw.randrange(3),
            in_flight=draw.choice([1, 5]),
            upscale_delay=5,
            downscale_delay=9,
        )
        targets = run(rule, lambda _, draw=draw: (draw.randrange(50), draw.randrange(100), draw.randrange(3)), 200)
        assert rule.least <= min(targets)
        assert max(targets) <= (rule.most)


def test_a_ramp_is_followed_step_by_step() -> None:
    targets = run(QPS, arriving(lambda second: second // 600), 6000)
    steps = [target for _, target in changes(targets)]
    assert steps == sorted(steps)
    assert targets[-1] == math.ceil(9 / 2)


def test_zero_replicas_wake_at_the_first_request() -> None:
    woken = run(IN_FLIGHT, lambda second: (0, 0, 1 if second == 400 else 0), 401)
    assert (woken[399], woken[400]) == (0, 1)
    by_rate = Rule(least=0, most=2, requests_per_second=1)
    assert run(by_rate, arriving(lambda second: int(second == 50)), 51)[-1] == 1


def test_service_goes_to_sleep() -> None:
    """A service without load goes to sleep after the delay, and not before."""
    targets = run(IN_FLIGHT, lambda _: (0, 0, 0), 400, current=1)
    assert changes(targets) == [(SHARE * IN_FLIGHT.downscale_delay, 0)]


def test_a_service_woken_for_one_request_stays_up_for_the_delay() -> None:
    targets = run(IN_FLIGHT, lambda second: (0, 0, int(second == 200)), 500)
    (woken, one), (slept, zero) = changes(targets)
    assert (woken, one, zero) == (200, 1, 0)
    assert slept - woken >= (SHARE - 0.01) * IN_FLIGHT.downscale_delay


def test_the_day_of_a_demo_repeats_itself() -> None:
    """A recorded shape: nothing, a crowd, a long tail, nothing. One way up, one way down."""
    shape = [0] * 600 + [20] * 900 + [6] * 3000 + [0] * 3000
    targets = run(QPS, arriving(lambda second: shape[second]), len(shape))
    assert max(targets) == 10
    assert targets[4400] == 3
    assert targets[-1] == 1
    falls = [after - before for before, after in pairwise(targets) if after != before]
    turns = sum(a * b < 0 for a, b in pairwise(falls))
    assert turns == 1


@pytest.mark.parametrize("delay", [0.0])
def test_without_a_delay_it_follows_at_once(delay: float) -> None:
    rule = Rule(least=0, most=4, in_flight=1, upscale_delay=delay, downscale_delay=delay)
    wanted = [0, 3, 1, 4, 2, 0]
    assert run(rule, lambda second: (0, wanted[second], 0), 6) == wanted


def test_spare_replicas_come_on_top_but_not_beyond_the_most() -> None:
    rule = Rule(least=1, most=4, in_flight=8, upscale_delay=0, downscale_delay=0, spare=1)
    wanted = [(0, 2), (9, 3), (24, 4), (80, 4)]
    assert run(rule, lambda second: (0, wanted[second][0], 0), 4) == [count for _, count in wanted]


def test_spare_replicas_wait_for_no_delay() -> None:
    assert run(Rule(least=1, most=4, in_flight=8, spare=2), lambda _: (0, 0, 0), 2) == [3, 3]


def test_a_target_outside_new_limits_is_brought_inside() -> None:
    assert run(Rule(least=2, most=3, in_flight=8), lambda _: (0, 0, 0), 1, current=9) == [3]
    assert run(Rule(least=2, most=3, in_flight=8), lambda _: (0, 0, 0), 1, current=0) == [2]


def test_memory_is_bounded() -> None:
    autoscaler = Autoscaler(Rule(least=0, most=9, in_flight=1, upscale_delay=10, downscale_delay=20))
    for second in range(5000):
        autoscaler.target(float(second), 1, 1, second % 7, 0)
    assert len(autoscaler._asked) <= 22
    assert len(autoscaler._arrivals) <= 60


# What the file says


def rule(policy: str, fits: int | None = None, resources: str = "1x L4", more: str = "") -> Rule | None:
    return rule_for(parse(f"service: {{{policy}}}\n{more}", source="x.yaml"), fits, resources)


def test_a_fixed_number_has_no_rule() -> None:
    assert rule("replicas: 3") is None
    assert rule("replica_policy: {min_replicas: 3}") is None


def test_the_most_is_what_file_and_machine_allow() -> None:
    policy = "replica_policy: {min_replicas: 1, max_replicas: 8, target_qps_per_replica: 2}"
    unbounded = "replica_policy: {min_replicas: 1, target_qps_per_replica: 2}"

    def most(*arguments: Any) -> int:
        found = rule(*arguments)
        assert found is not None
        return found.most

    assert (most(policy), most(policy, 4), most(unbounded, 4), most(policy, 0)) == (8, 4, 4, 1)
    assert most(unbounded) == 10_000, "a burst under a small target asks for no million"


def test_a_target_by_gpu_type_is_that_of_our_gpu() -> None:
    policy = "load_balancing_policy: instance_aware_least_load, "
    policy += "replica_policy: {min_replicas: 1, max_replicas: 2, target_qps_per_replica: {'L4:1': 3, H100: 9}}"

    def target(resources: str) -> float | None:
        found = rule(policy, None, resources)
        assert found is not None
        return found.requests_per_second

    assert (target("1x L4"), target("2x H100"), target("1x A10G")) == (3, 9, 3)


def test_a_target_in_flight_needs_no_qps() -> None:
    found = rule(
        "replica_policy: {min_replicas: 0, max_replicas: 2}", more="x-groundserve: {target_in_flight_per_replica: 8}"
    )
    assert found == Rule(least=0, most=2, in_flight=8)


def test_load_that_is_turned_away() -> None:
    """A load that is turned away asks for one more replica after each delay.

    Where a replica does less than the target says, as the rate alone would never tell.
    """
    autoscaler, targets = Autoscaler(QPS), [1]
    for second in range(1000):
        is_full = second >= 100 and targets[-1] < 3 and second % 5 == 0
        targets.append(autoscaler.target(float(second), targets[-1], 1, 0, 0, turned_away=int(is_full)))
    (first, two), (second, three) = changes(targets)
    assert (two, three) == (2, 3)
    assert 0 <= first - (100 + SHARE * QPS.upscale_delay) <= 5
    assert 0 <= second - first - SHARE * QPS.upscale_delay <= 5


def test_one_request_that_was_turned_away_asks_for_nothing() -> None:
    autoscaler, target = Autoscaler(QPS), 1
    for second in range(1000):
        target = autoscaler.target(float(second), target, 1, 0, 0, turned_away=int(second == 500))
    assert target == 1
