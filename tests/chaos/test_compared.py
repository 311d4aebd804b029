"""A short form of `python -m tests.chaos --peer`, and how what clients got is counted."""

import asyncio
from pathlib import Path

import pytest

from tests.chaos.client import End, Got, Wish
from tests.chaos.compared import LATE, Count, compare
from tests.chaos.judge import Judge
from tests.chaos.replica import Ill, Replica, Spell
from tests.chaos.stage import Stage, Violation

STEPS = 3
SEED = 17  # of which the first fault is poison


@pytest.mark.parametrize("name", ["groundserve", "nginx"])
def test_every_request_is_counted(name: str) -> None:
    told: list[int] = []
    count = asyncio.run(compare(name, SEED, STEPS, lambda *seen: told.append(seen[2])))
    assert count.steps.total() == len(told) == STEPS
    assert count.requests == told[-1]
    assert count.ends.keys() <= {"answered", "lost", "broken", "refused", "passed on", "left"}
    assert count.ends["answered"] > count.requests / 2
    assert count.steps["poison"]
    assert count.killed in (2 * count.steps["poison"], 4 * count.steps["poison"])


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    return Judge(Stage(tmp_path, [Replica(1, "127.0.0.1", 1, tmp_path / "journal", {})], False, {}, {}))


TEXT = '{"choices": [{"text": " t00"}]}'


def got(end: End, status: int, body: str = "", stream: bool = False, took: float = 1.0) -> Got:
    wish = Wish("r", "POST", "/v1/completions", stream=stream, text=" t00")
    return Got(wish, 10.0, 10.0 + took, status, {}, body.encode(), end)


@pytest.mark.parametrize(
    ("seen", "counted"),
    [
        (got("whole", 200, TEXT), "answered"),
        (got("whole", 200, TEXT.replace("t00", "t00 t00")), "broken"),
        (got("whole", 200, f"data: {TEXT}\n\ndata: [DONE]\n\n", stream=True), "answered"),
        (got("whole", 200, f"data: {TEXT[:-3]}\n\ndata: [DONE]\n\n", stream=True), "broken"),
        (got("broken", 200, stream=True), "broken"),
        (got("hung", 200, stream=True), "broken"),
        (got("cut", 200), "lost"),
        (got("no door", 0), "lost"),
        (got("whole", 502), "lost"),
        (got("whole", 500), "lost"),
        (got("left", 200), "left"),
    ],
)
def test_an_answer_counts_as_what_the_client_got(judge: Judge, seen: Got, counted: str) -> None:
    judge.generated["r"] = [{"address": "a:1"}]
    count = Count()
    count.add(seen, judge, "kill")
    assert count.ends == {counted: 1}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_error_is_a_refusal_if_no_replica_had_begun(judge: Judge, status: int) -> None:
    count = Count()
    count.add(got("whole", status), judge, "all killed")
    assert count.ends == {"refused": 1}
    assert count.why == {f"refused: {status} whole (all killed)": 1}


def test_a_500_is_its_replicas_only_while_one_says_so(judge: Judge) -> None:
    judge.stage.replicas[0].spells.append(Spell(Ill.ERRING, 10.0, 11.0))
    count = Count()
    count.add(got("whole", 500), judge, "errors")
    assert count.ends == {"passed on": 1}


def test_what_comes_late_or_twice_is_counted_beside_that(judge: Judge) -> None:
    count = Count()
    count.add(got("whole", 504, took=LATE + 1), judge, "hang")
    first, second = {"address": "127.0.0.1:1", "process": 1, "at": 10.2}, {"address": "b:1", "process": 2, "at": 11.0}
    judge.generated["r"] = [first, second]
    judge.stage.replicas[0].spells.append(Spell(Ill.HANGING, 10.1, 10.5))
    count.add(got("whole", 200, TEXT), judge, "hang")
    judge.whole["r", 1].append(10.4)
    count.add(got("whole", 200, TEXT, took=LATE + 1), judge, "hang")
    assert (count.late, count.elsewhere, count.doubled) == (1, 1, 1)


def test_an_answer_that_no_replica_made_is_no_answer(judge: Judge) -> None:
    with pytest.raises(Violation, match="no replica generated it"):
        Count().add(got("whole", 200, TEXT), judge, "hang")
