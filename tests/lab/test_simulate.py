"""What routing promises, checked in virtual time; and whether the simulator runs what it reports."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.lab.scenario import Scenario
from tests.lab.simulate import cpu, h200, main, new_prompt, scenario, tight
from tests.lab.simulator import POLICIES
from tests.lab.workloads import WORKLOADS

SHARING = ["uniform", "zipf", "chat", "images", "one prompt", "hot prompt"]


def goodput(policy: str, scenarios: Sequence[Scenario]) -> float:
    """Answered requests a second, over all scenarios."""
    results = [one.run(policy) for one in scenarios]
    assert all(result.errors == 0 for result in results)
    return sum(result.requests for result in results) / sum(result.seconds for result in results)


@pytest.mark.parametrize("replicas", [2, 8])
@pytest.mark.parametrize("workload", SHARING)
def test_prefix_aware_near_the_oracle(workload: str, replicas: int) -> None:
    """prefix_aware is within a tenth of an oracle, and no worse than least_load."""
    one = scenario(workload, replicas, seed=2)
    ours = goodput("prefix_aware", [one])
    assert ours >= 0.9 * goodput("oracle", [one])
    assert ours >= 0.97 * goodput("least_load", [one])


@pytest.mark.parametrize("replicas", [2, 8])
def test_where_nothing_is_shared_it_is_no_worse_than_least_load(replicas: int) -> None:
    one = scenario("no sharing", replicas, seed=2)
    assert goodput("prefix_aware", [one]) >= 0.97 * goodput("least_load", [one])


@pytest.mark.parametrize("workload", ["one prompt", "hot prompt"])
def test_shared_prompt_is_spread(workload: str) -> None:
    """With one prompt that all requests share, no member gets more than 60 percent of them."""
    one = scenario(workload, 2, seed=2)
    assert one.at_once == 32
    assert one.run("prefix_aware").largest <= 0.6


@pytest.mark.parametrize(("replicas", "least"), [(2, 50), (8, 190)])
def test_shared_prompt_with_full_pools(replicas: int, least: float) -> None:
    """A prompt that all requests share uses all replicas even if it is new and their pools are full.

    With a price for copies that never fell, one of two replicas and three of eight did all the work.
    """
    result = new_prompt(replicas, seed=1).warm().run("prefix_aware")
    assert result.goodput >= least
    assert result.spread <= 1.1


@pytest.mark.parametrize("workload", [*WORKLOADS])
def test_near_the_oracle_with_full_pools(workload: str) -> None:
    """prefix_aware is close to the oracle if the pools are full already, too."""
    one = scenario(workload, 2, seed=2).warm()
    ours = goodput("prefix_aware", [one])
    assert ours >= 0.95 * goodput("oracle", [one])
    assert ours >= 0.97 * goodput("least_load", [one])


def test_what_fills_the_pools_before_is_not_counted() -> None:
    cold = scenario("uniform", 2, seed=2)
    warm = cold.warm().run("round_robin")
    assert warm.requests == cold.run("round_robin").requests == len(cold.conversations)
    assert warm.spread == 1.0


@pytest.mark.parametrize("workload", ["uniform", "chat", "hot prompt", "no sharing"])
def test_each_rank_has_its_own_pool(workload: str) -> None:
    """In a replica with data-parallel ranks, each rank has its own pool."""
    one = dataclasses.replace(scenario(workload, 2, seed=2, at_once=64), ranks=4)
    ours = goodput("prefix_aware", [one])
    assert ours >= 0.95 * goodput("oracle", [one])
    assert ours >= 0.97 * goodput("least_load", [one])


def test_two_pools_are_used_as_one() -> None:
    """Two pools that only just hold all prefixes are used as one.

    As an H200 with two replicas showed: routed by load, each pool holds the same as the other one.
    """
    scenarios = [h200(seed) for seed in range(3)]
    ours = goodput("prefix_aware", scenarios)
    assert ours >= 1.6 * goodput("least_load", scenarios)
    assert ours >= 0.9 * goodput("oracle", scenarios)
    assert min(one.run("prefix_aware").cached for one in scenarios) >= 0.7


@pytest.mark.parametrize("make", [h200, tight, cpu])
def test_no_uneven_moment_leaves_the_same_prefixes_in_both_pools(make: Callable[[int], Scenario]) -> None:
    """A rule that weighed the cached share against relative load did: on some seeds goodput halved, for good."""
    scenarios = [make(seed) for seed in range(10, 20)]
    ours, theirs = ([one.run(policy) for one in scenarios] for policy in ("prefix_aware", "cache_aware"))
    assert min(one.goodput / other.goodput for one, other in zip(ours, theirs, strict=True)) >= 0.8
    assert sum(one.seconds for one in ours) <= sum(one.seconds for one in theirs)
    assert sum(one.ttft_mean for one in ours) <= sum(one.ttft_mean for one in theirs)


def test_two_small_replicas_with_few_in_flight_keep_their_groups() -> None:
    scenarios = [cpu(seed) for seed in range(5)]
    ours = goodput("prefix_aware", scenarios)
    assert ours >= 1.3 * goodput("round_robin", scenarios)
    assert ours >= 0.95 * goodput("cache_aware", scenarios)


def test_a_run_repeats_exactly_for_a_seed() -> None:
    first, again = (scenario("chat", 2, seed=3).run("prefix_aware") for _ in range(2))
    assert (first.seconds, first.cached, first.ttft_mean) == (again.seconds, again.cached, again.ttft_mean)


def test_a_run_repeats_exactly_in_another_process(tmp_path: Path) -> None:
    """Figures repeat exactly although the hashes of prompts differ from process to process."""
    found = []
    for name in ("one", "another"):
        path = tmp_path / name
        arguments = ["--replicas", "3", "--workload", "chat", "images", "--pools", "full", "--json", str(path)]
        subprocess.run([sys.executable, "-m", "tests.lab.simulate", *arguments], check=True, stdout=subprocess.DEVNULL)
        found.append([row | {"choice_us": 0} for row in json.loads(path.read_text())["rows"]])
    assert found[0] == found[1]
    assert {row["policy"] for row in found[0]} == {*POLICIES}


def test_every_turn_of_every_conversation_is_answered() -> None:
    one = scenario("chat", 2, seed=4)
    assert one.run("least_load").requests == sum(len(turns) for turns in one.conversations)


def test_the_command_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    policies = ["prefix_aware", "bounded_hashing"]
    main(
        ["--replicas", "3", "--workload", "images", "--policy", *policies, "--json", str(figures), "--plot", str(plot)]
    )
    rows = json.loads(figures.read_text())["rows"]
    assert [row["policy"] for row in rows] == policies * 4  # two workloads, each with empty and with full pools
    printed = capsys.readouterr().out
    for row in rows:
        assert row["requests"] == (1500 if "new prompt" in row["workload"] else 3 * 60 * 6)
        assert f"{row['goodput']:.2f}" in printed
        assert f">{row['goodput']:.1f}</text>" in plot.read_text()
