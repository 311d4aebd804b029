"""A short form of `python -m tests.chaos`, and tests that its judge finds broken promises."""

import asyncio
import dataclasses
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.client import End, Got, Wish, ended_early
from tests.chaos.judge import Judge
from tests.chaos.load import THINK, Load
from tests.chaos.replica import Ill, Replica, Spell
from tests.chaos.run import play
from tests.chaos.stage import SETTINGS, Stage, Violation
from tests.chaos.watcher import Watcher
from tests.support.until import until

STEPS = 12


@pytest.mark.parametrize(("way", "seed"), [("list", 1), ("dns", 2)])
def test_every_promise_holds_under_seeded_faults(way: str, seed: int) -> None:
    report = asyncio.run(play(seed, STEPS, way == "dns", lambda *_: None))
    assert sum(report.steps.values()) == STEPS
    assert report.ends["whole 200"] > STEPS


def test_no_client_asks_while_the_load_is_paused() -> None:
    """Not even one that was told to go on just before the pause."""

    async def asked_during_a_pause() -> int:
        with socket.socket() as deaf:  # nobody listens there
            deaf.bind(("127.0.0.1", 0))
            load = Load(deaf.getsockname()[1], "seed", 5)
            load.start()
            await until(lambda: len(load.got) > 5, "the clients ask")
            await load.pause()
            await asyncio.sleep(2 * THINK[1])
            load.runs.set()
            await load.pause()
            before = len(load.got)
            await asyncio.sleep(2 * THINK[1])
            await load.stop()
            return len(load.got) - before

    assert asyncio.run(asked_during_a_pause()) == 0


def test_what_is_usually_slow_is_found(court: "Court") -> None:
    """SLACK is for a single time: it must not hide that something takes too long each time."""
    watcher = Watcher(court.judge.stage, Load(0, "seed", 0), court.judge, random.Random(0))
    for seconds in (0.1, 3.0, 0.1, 0.3, 3.0):
        watcher.took("to not ready", seconds, 0.3)
    watcher.judge_times()
    watcher.took("to not ready", 3.0, 0.3)
    with pytest.raises(Violation, match=r"usually 1\.650 s, and not 0\.3 s"):
        watcher.judge_times()


# The judge

A, B, C = "127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"


class Court:
    """A judge with a log and a journal that the test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.replicas = [Replica(number, f"127.0.0.{number}", 1, folder / "journal", {}) for number in (1, 2, 3)]
        self.judge = Judge(Stage(folder, self.replicas, False, SETTINGS, {}))
        self.log({})
        self.journal()

    def log(self, *entries: dict[str, Any]) -> None:
        ordinary = {"id": "r", "status": 200, "member": "replica-1", "attempts": 1}
        lines = [json.dumps(ordinary | entry) for entry in entries if entry]
        (self.folder / "requests.log").write_text("".join(line + "\n" for line in lines))

    def journal(self, *entries: dict[str, Any]) -> None:
        ordinary = {"what": "generated", "id": "r", "address": A, "process": 1, "at": 10.1}
        ordinary |= {"generated": True, "is_heard": True}
        (self.folder / "journal").write_text("".join(json.dumps(ordinary | entry) + "\n" for entry in entries))

    def ill(self, how: Ill, *numbers: int, began: float = 10.2, ended: float = 10.8) -> None:
        for number in numbers:
            self.replicas[number - 1].spells.append(Spell(how, began, ended))

    def says(self, got: Got) -> None:
        self.judge.judge([got])


def got(end: End = "whole", status: int = 200, code: str = "", method: str = "POST", replica: str = "replica-1") -> Got:
    """An answer from 10 s to 11 s."""
    body = json.dumps({"error": {"code": code}}).encode() if code else b""
    headers = {"x-replica-id": replica} if replica else {}
    return Got(Wish("r", method, "/v1/completions"), 10.0, 11.0, status, headers, body, end)


@pytest.fixture
def court(tmp_path: Path) -> Court:
    return Court(tmp_path)


def test_a_whole_answer_generated_once_is_well(court: Court) -> None:
    court.log({"id": "r"})
    court.journal({})
    court.says(got())
    assert court.judge.counts == {"whole 200": 1}


ANSWERED = {"what": "ended", "outcome": "answered"}
AT_B: dict[str, Any] = {"address": B, "process": 2}
AT_C: dict[str, Any] = {"address": C, "process": 3}


@pytest.mark.parametrize(
    ("journal", "said"),
    [
        ([], "no replica generated it"),
        ([{}, ANSWERED | {"at": 10.3}, AT_B | {"at": 10.5}], "generated twice"),
        ([{}, AT_B | {"at": 10.3}, AT_C | {"at": 10.5}], "generated twice"),
        ([{}, {"what": "ended", "outcome": "cut", "at": 10.2}, {"at": 10.3}], "generated twice"),
        ([{}, {"at": 10.3}], "generated twice"),
        ([AT_C, {"at": 10.5}], "generated twice"),
        ([{}, AT_B | {"at": 10.15}], "generated twice"),
    ],
    ids=[
        "not",
        "elsewhere after a whole answer",
        "three times",
        "there again",
        "never ended",
        "elsewhere though the first was well",
        "elsewhere before the first was unwell",
    ],
)
def test_generations_are_counted(court: Court, journal: list[dict[str, Any]], said: str) -> None:
    court.log({"id": "r"})
    court.journal(*journal)
    court.ill(Ill.CUTTING, 1, 2)
    with pytest.raises(Violation, match=said):
        court.says(got())


def test_a_race_generates_once(court: Court) -> None:
    """What the keep-alive race sends again was not read the first time."""
    court.log({"id": "r", "retries": "race"})
    court.journal({})
    court.says(got())
    assert court.judge.sent_again == 1


LOST = {"status": 502, "code": "replica_lost"}


@pytest.mark.parametrize(
    ("how", "numbers", "began", "attempts", "is_explained"),
    [
        (Ill.GONE, (1, 2), 10.5, 2, True),
        (Ill.CUTTING, (2, 3), 9.95, 2, True),
        (Ill.GONE, (1, 2), 9.5, 2, False),
        (Ill.GONE, (1, 2), 11.1, 2, False),
        (Ill.GONE, (1,), 10.5, 2, False),
        (Ill.GONE, (1, 2), 10.5, 1, False),
        (Ill.ERRING, (1, 2), 10.5, 2, False),
    ],
    ids=["amid it", "just before", "long before", "after", "of one", "tried once", "of another kind"],
)
def test_two_replicas_lost_at_its_time_explain_a_lost_request(
    court: Court, how: Ill, numbers: tuple[int, ...], began: float, attempts: int, is_explained: bool
) -> None:
    court.log({"status": 502, "attempts": attempts})
    court.ill(how, *numbers, began=began, ended=began + 0.02)
    if is_explained:
        court.says(got(**LOST))
    else:
        with pytest.raises(Violation, match="no replica's illness explains"):
            court.says(got(**LOST))


@pytest.mark.parametrize(("longest", "is_explained"), [(12.0, True), (5.0, False)])
def test_only_a_long_absence_of_all_leaves_a_request_without(court: Court, longest: float, is_explained: bool) -> None:
    court.log({"status": 503})
    court.ill(Ill.GONE, 1, 2, began=9.0, ended=30.0)
    court.ill(Ill.REFUSING, 3, began=11.0, ended=11.0 + longest)
    refused = got("whole", 503, "no_replica_ready")
    refused.ended = 11.0 + longest
    if is_explained:
        court.says(refused)
    else:
        with pytest.raises(Violation, match="no replica's illness explains"):
            court.says(refused)


@pytest.mark.parametrize(("longest", "is_explained"), [(1.8, True), (0.3, False)])
def test_a_get_waits_a_moment_for_a_replica(court: Court, longest: float, is_explained: bool) -> None:
    court.log({"status": 503})
    court.ill(Ill.GONE, 1, 2, 3, began=10.0, ended=10.0 + longest)
    refused = got("whole", 503, "no_replica_ready")
    refused.wish = dataclasses.replace(refused.wish, method="GET")
    refused.began, refused.ended = 10.0, 12.5
    if is_explained:
        court.says(refused)
    else:
        with pytest.raises(Violation, match="no replica's illness explains"):
            court.says(refused)


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        ("ugly", 200, ""),
        ("broken", 200, "stream_broken"),
        ("broken", 200, "no_replica_ready"),
        ("whole", 502, "replica_lost"),
        ("whole", 504, "first_byte_timeout"),
        ("hung", 0, ""),
        ("no door", 0, ""),
        ("whole", 500, "internal_error"),
        ("whole", 429, "queue_full"),
        ("whole", 502, "replica_unreachable"),
        ("whole", 503, "no_replica_ready"),
    ],
)
def test_some_ends_are_never_explained_by_one_replicas_fault(court: Court, end: End, status: int, code: str) -> None:
    court.log({"status": status, "attempts": 2})
    for how in Ill:
        court.ill(how, 1)
    with pytest.raises(Violation, match="no replica's illness explains"):
        court.says(got(end, status, code))


def test_one_move_is_counted(court: Court) -> None:
    """An answer that a second replica finished is counted, and is no violation."""
    court.log({"id": "r"})
    court.journal({}, AT_B | {"at": 10.5})
    court.ill(Ill.GONE, 1)
    court.says(got())
    assert court.judge.elsewhere == 1


def test_a_restarted_replica_is_another_one(court: Court) -> None:
    """What its process did not finish before it died, the next one at its address may."""
    court.log({"id": "r"})
    court.journal({}, {"at": 10.9, "process": 2})
    court.ill(Ill.GONE, 1)
    court.says(got())
    assert court.judge.elsewhere == 1


@pytest.mark.parametrize(("is_heard", "other", "is_right"), [(False, 11.0, True), (True, 10.95, False)])
def test_late_answer_of_a_stopped_replica(court: Court, is_heard: bool, other: float, is_right: bool) -> None:
    """One that was stopped answers its request once it goes on: right if nobody waits for that any more."""
    court.log({"id": "r"})
    late = AT_B | {"at": 10.85}
    court.journal(AT_C | {"at": other}, late, late | ANSWERED | {"at": 10.9, "is_heard": is_heard})
    court.ill(Ill.DEAF, 2)
    if is_right:
        court.says(got())
    else:
        with pytest.raises(Violation, match="generated twice"):
            court.says(got())


def test_an_answer_that_came_before_a_reset_counts(court: Court) -> None:
    """A reset takes nothing with it that the kernel has already delivered."""
    court.log({"id": "r"})
    court.journal({}, ANSWERED | {"at": 10.15}, AT_B | {"at": 10.5})
    court.ill(Ill.RESETTING, 1, began=10.2, ended=10.22)
    with pytest.raises(Violation, match="generated twice"):
        court.says(got())


def test_text_is_compared(court: Court) -> None:
    """An answer that lacks a token, or has one twice, is a violation."""
    court.log({"id": "r"})
    court.journal({})
    one = got()
    one.wish = Wish("r", "POST", "/v1/completions", text=" t00 t01")
    one.body = b'{"choices": [{"text": " t00 t00 t01"}]}'
    with pytest.raises(Violation, match="not the answer"):
        court.says(one)


def test_each_request_has_one_line_in_the_log(court: Court) -> None:
    with pytest.raises(Violation, match="no line for"):
        court.says(got())
    court.log({"id": "r"}, {"id": "r"})
    with pytest.raises(Violation, match="logged twice"):
        court.says(got())


def test_what_no_client_asked_is_not_in_the_log(court: Court) -> None:
    court.log({"id": "r"}, {"id": "ghost"})
    court.journal({})
    with pytest.raises(Violation, match="that no client made"):
        court.says(got())


EVENT = b'data: {"choices": []}\n\n'
ERROR = b'data: {"error": {"message": "the replica went away."}}\n\n'
ANTHROPIC = b'event: error\ndata: {"type": "error", "error": {"message": "the replica went away."}}\n\n'


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/completions", EVENT + ERROR, "broken"),
        ("/v1/completions", ERROR, "broken"),
        ("/v1/messages", EVENT + ANTHROPIC, "broken"),
        ("/v1/completions", EVENT + b'data: {"cho', "ugly"),
        ("/v1/completions", EVENT, "ugly"),
        ("/v1/completions", b"", "ugly"),
        ("/v1/messages", EVENT + ERROR, "ugly"),
        ("/v1/completions", EVENT + ANTHROPIC, "ugly"),
    ],
)
def test_a_broken_stream_ends_as_promised_or_is_ugly(path: str, body: bytes, end: End) -> None:
    stream = Got(Wish("r", "POST", path, stream=True), 0.0, status=200, body=body)
    assert ended_early(stream)[0] == end
