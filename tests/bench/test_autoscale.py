"""The autoscaling bench: its arithmetic, how it drives SkyServe, and what our side of it promises in short."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import yaml

from balancer.operate.controller.autoscale import Rule, rule_for
from balancer.spec.service_file import parse
from tests.bench.autoscale import HOUR, LOADS, START, Load, Seen, needed, ours, run
from tests.bench.skyserve import SkyServe, service

SHORT = {load.name: load for load in LOADS if load.seconds < 24 * HOUR}
RULE = Rule(least=1, most=10, requests_per_second=2.0, upscale_delay=300, downscale_delay=1200)


class Scripted:
    """Launches and ends what was written down, and notes what it was told."""

    def __init__(self, script: dict[int, tuple[int, list[int]]]) -> None:
        self._script = script
        self.told: list[tuple[int, int, Sequence[tuple[int, bool]]]] = []

    def look(self, second: int, arrived: int, replicas: Sequence[tuple[int, bool]]) -> tuple[int, Sequence[int]]:
        self.told.append((second, arrived, replicas))
        return self._script.get(second, (0, []))


def test_what_is_counted() -> None:
    load = Load("counted", "", 300, lambda second: 5 if second >= 50 else 2, rises_at=50)
    scaler = Scripted({99: (2, []), 199: (0, [1]), 249: (1, [2, 3])})
    seen = run(load, scaler)
    # One replica from the start, three from 100 on, two from 200 on, one from 250 on.
    assert seen.replica_seconds == 100 + 3 * 100 + 2 * 50 + 1 * 50
    # Two requests a second each: 3 too many until two more are ready, 1 too many with two, 5 with one that starts.
    assert seen.seconds_over == (50 + START) + 50 + 50
    assert seen.requests_over == pytest.approx(3 * (50 + START) + 1 * 50 + 5 * 50)
    # Two came in the same second, one up and one down.
    assert seen.changes == 4
    assert seen.reaction == 50 + START
    assert scaler.told[99 + START][2] == [(1, True), (2, False), (3, False)]
    assert scaler.told[100 + START][2] == [(1, True), (2, True), (3, True)]
    assert needed(load) == 50 * 1 + 250 * 3


def test_without_a_rise_or_an_end_to_it_there_is_no_reaction() -> None:
    assert run(Load("flat", "", 60, lambda _: 1), Scripted({})) == Seen(60, 0, 0.0, 0, None)
    assert run(Load("never", "", 60, lambda _: 3, rises_at=0), Scripted({})).reaction is None


def test_same_requests_for_each_autoscaler() -> None:
    """Each autoscaler gets the same requests, at the rate that was asked for."""
    first, second = Scripted({}), Scripted({})
    load = Load("alike", "", 2000, lambda _: 4.5)
    run(load, first)
    run(load, second)
    assert first.told == second.told
    assert sum(arrived for _, arrived, _ in first.told) / load.seconds == pytest.approx(4.5, rel=0.03)


def test_sky_serve_gets_the_same_rule() -> None:
    spec = parse(yaml.safe_dump({"service": service(RULE), "run": "x"}), source="x.yaml")
    assert rule_for(spec, None, "1x L4") == RULE


def test_sky_serve_has_its_own_timing() -> None:
    """SkyServe hears of requests when its balancer syncs, and decides at its own intervals."""
    # Launches as many as it was told of, and asks to decide again after 10 s.
    echo = """
import json, sys
for line in sys.stdin:
    told = json.loads(line)
    end = [int(told["now"])] * told["decide"]
    print(json.dumps({"launch": len(told["arrived"] or []), "end": end, "interval": 10}), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", echo], stdin=-1, stdout=-1, text=True) as process:
        scaler = SkyServe(process)
        answers = {second: answer for second in range(50) if (answer := scaler.look(second, 2, [])) != (0, [])}
        assert process.stdin is not None
        process.stdin.close()
    assert answers == {
        0: (0, [1]),
        5: (12, []),
        10: (0, [11]),
        20: (0, [21]),
        25: (40, []),
        30: (0, [31]),
        40: (0, [41]),
        45: (40, []),
    }


@pytest.mark.parametrize(
    ("name", "changes", "minutes_over", "reaction"),
    [
        # The delay is 300 s, of which four fifths have to ask for it; then a replica starts, in 60 s.
        ("steady", 2, 7, None),
        ("ramp", 18, 55, None),
        ("step", 3, 7, 300 + START),
        ("burst", 0, 16, None),
        ("jitter", 3, 20, 800),
        ("dips", 4, 150, None),
        ("on-off", 4, 120, None),
        ("wake", 1, 2, START + 2),
    ],
)
def test_what_our_autoscaler_makes_of_each_load(
    name: str, changes: int, minutes_over: float, reaction: int | None
) -> None:
    load = SHORT[name]
    with ours(load.rule) as scaler:
        seen = run(load, scaler)
    assert seen.changes <= changes
    assert seen.seconds_over <= 60 * minutes_over
    assert seen.replica_seconds <= 1.1 * needed(load)
    if reaction is not None:
        assert seen.reaction is not None
        assert seen.reaction <= reaction


def test_each_short_load_is_among_them() -> None:
    assert set(SHORT) == {"steady", "ramp", "step", "burst", "jitter", "dips", "on-off", "wake"}
