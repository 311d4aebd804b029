"""Workloads that others publish, and traces: whether they match their description, and how prefix_aware does there."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest

from tests.lab.published import PUBLISHED, trace
from tests.lab.radix import TOKEN
from tests.lab.scenario import Scenario
from tests.lab.simulate import main
from tests.lab.trace import BLOCK_TOKENS, Line, Played, likeness, read


def shared(one: bytes, other: bytes) -> int:
    """How many tokens both begin with."""
    same = (n for n in range(0, min(len(one), len(other)), TOKEN) if one[n : n + TOKEN] != other[n : n + TOKEN])
    return next(same, min(len(one), len(other))) // TOKEN


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_prefix_aware_is_within_a_twentieth_of_the_oracle(name: str) -> None:
    one = PUBLISHED[name](2, 1).warm()
    ours, oracle = one.run("prefix_aware"), one.run("oracle")
    assert ours.errors == oracle.errors == 0
    assert ours.goodput >= 0.95 * oracle.goodput
    assert ours.goodput >= one.run("least_load").goodput


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "output", "rate"),
    [
        ("150 prefixes", 750, 7200, 1000, 8.8),
        ("600 prefixes", 4800, 1256, 128, 85.3),
        ("one prefix", 1600, 9800, 430, 12),
    ],
)
def test_a_published_workload_has_its_shape(name: str, requests: int, prompt: int, output: int, rate: float) -> None:
    one = PUBLISHED[name](8, 1)
    assert one.arrivals is not None
    assert len(one.conversations) == len(one.arrivals) == requests
    assert {len(turn.tokens) // TOKEN for turns in one.conversations for turn in turns} == {prompt}
    assert {turn.answer_tokens for turns in one.conversations for turn in turns} == {output}
    assert requests / one.arrivals[-1] == pytest.approx(rate, rel=0.1)


def test_arrivals() -> None:
    """Requests arrive at their times, and wait if too many are in progress."""
    one = PUBLISHED["one prefix"](2, 1)
    assert one.arrivals is not None
    few = dataclasses.replace(one, conversations=one.conversations[:3], arrivals=[0.0, 100.0, 100.0])
    assert few.run("round_robin").seconds > 100
    alone = dataclasses.replace(few, at_once=1).run("round_robin")
    assert alone.seconds > few.run("round_robin").seconds
    assert alone.requests == 3


def test_a_trace_is_played_as_it_says() -> None:
    lines = [Line(0.0, 1200, 10, (0, 1, 2)), Line(3.0, 1536, 20, (0, 1, 5)), Line(4.0, 600, 5, (0, 9))]
    played = Played(lines, copies=2, speed=2.0)
    assert played.arrivals == [0.0, 0.0, 1.5, 1.5, 2.0, 2.0]
    first, copy, later, _, other, _ = (turns[0] for turns in played)
    assert [len(turn.tokens) // TOKEN for turn in (first, later, other)] == [1200, 1536, 600]
    assert later.answer_tokens == 20
    assert shared(first.tokens, later.tokens) == 2 * BLOCK_TOKENS
    assert shared(first.tokens, other.tokens) == BLOCK_TOKENS
    assert shared(first.tokens, copy.tokens) == BLOCK_TOKENS, "copies share nothing else"
    assert first.tokens == played[0][0].tokens, "each time the same"
    known = sum(one == two for one, two in zip(first.blocks, later.blocks, strict=False))
    assert known == pytest.approx(len(first.blocks) * 1024 / 1200, abs=2), "the policies see what the replicas do"


def test_trace_file(tmp_path: Path) -> None:
    """A trace is read from a file, and an error names the line that is invalid."""
    path = tmp_path / "trace.jsonl"
    good = {"timestamp": 1500, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}
    path.write_text(json.dumps(good) + "\n")
    assert read(path) == [Line(1.5, 700, 3, (0, 1))]
    for bad in ({"input_length": 2000}, {"output_length": 0}, {"hash_ids": None}, {"timestamp": -1}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n")
        with pytest.raises(ValueError, match="line 2"):
            read(path)
    with pytest.raises(SystemExit):
        main(["--trace", str(tmp_path / "none"), "--replicas", "2"])


def test_the_likeness_is_like_the_published_trace() -> None:
    """The published one: a mean of 12,035 tokens, a median of 6,909, 343 out; 37 % of the blocks were seen before."""
    lines = likeness(12_000, seed=1)
    assert likeness(100, seed=1) == lines[:100]
    assert all(one.at <= two.at for one, two in pairwise(lines))
    assert mean(line.input_tokens for line in lines) == pytest.approx(12_035, rel=0.2)
    assert median(line.input_tokens for line in lines) == pytest.approx(6_909, rel=0.3)
    assert mean(line.output_tokens for line in lines) == pytest.approx(343, rel=0.1)
    assert len(lines) / lines[-1].at == pytest.approx(3.4, rel=0.1)
    seen: set[int] = set()
    found = total = 0
    for line in lines:
        assert (len(line.blocks) - 1) * BLOCK_TOKENS < line.input_tokens <= len(line.blocks) * BLOCK_TOKENS
        found += next((n for n, block in enumerate(line.blocks) if block not in seen), len(line.blocks))
        total += len(line.blocks)
        seen.update(line.blocks)
    assert found / total == pytest.approx(0.37, abs=0.06)


def test_a_trace_goes_where_its_conversations_are_cached() -> None:
    lines = likeness(1500, seed=1)
    one: Scenario = trace(lines, 2)
    ours, round_robin, oracle = (one.run(policy) for policy in ("prefix_aware", "round_robin", "oracle"))
    assert ours.requests == len(lines)
    assert ours.cached > 1.2 * round_robin.cached
    assert ours.goodput >= 0.95 * oracle.goodput


def test_the_command_plays_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--published", "one prefix", "--replicas", "2", "--policy", "smg", "llm-d", "--pools", "empty"])
    printed = capsys.readouterr().out
    assert "one prefix, 2 replicas" in printed
    assert "\nsmg " in printed
    assert "\nllm-d " in printed
