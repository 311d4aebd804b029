"""What happened to a service is told afterwards, with times."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.contract.moment import since
from balancer.contract.words import Status
from balancer.operate.controller.happened import between
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.engines import rotation
from balancer.operate.state.event_log import Event, EventLog, Line, What
from tests.operate.command_line import LAB, ROOT, Groundserve
from tests.support.until import wait_until

FIRST = Replica(1, 1)
RUNNING = replace(FIRST, stage=Stage.RUNNING, launched_at=10.0)
READY = replace(RUNNING, status=Status.READY)
BROKEN = "echo the model of $GROUNDSERVE_PORT is not here; exit 3"


def nothing(_: str) -> None:
    pass


def told(groundserve: Groundserve, *arguments: str) -> list[tuple[str, int | None, str]]:
    lines = [json.loads(line) for line in groundserve("events", "--json", *arguments).splitlines()]
    return [(line["event"], line.get("replica"), line.get("message", "")) for line in lines]


def process(groundserve: Groundserve, words: str) -> int:
    (found,) = [pid for pid, line in groundserve.processes().items() if words in line and "leash" not in line]
    return found


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (None, FIRST, None),
        (FIRST, RUNNING, What.STARTED),
        (replace(FIRST, launched_at=5.0), RUNNING, What.RESTARTED),
        (None, RUNNING, What.TAKEN_OVER),
        (RUNNING, READY, What.READY),
        (READY, replace(READY, in_flight=3), None),
        (READY, replace(READY, status=Status.EJECTED), What.EJECTED),
        (READY, replace(READY, status=Status.NOT_READY), What.NOT_READY),
        (READY, replace(READY, stage=Stage.DRAINING), What.DRAINING),
        (READY, replace(FIRST, reason="killed"), What.FAILED),
        (READY, replace(FIRST, stage=Stage.GIVEN_UP, reason="killed"), What.GIVEN_UP),
        (RUNNING, replace(FIRST, waits_for_gpu=True), What.WAITS_FOR_GPU),
        (replace(RUNNING, waits_for_gpu=True), replace(FIRST, waits_for_gpu=True), None),
        (replace(READY, stage=Stage.STOPPING), None, What.STOPPED),
        (None, None, None),
    ],
)
def test_what_a_change_amounts_to(before: Replica | None, after: Replica | None, what: What | None) -> None:
    event = between(before, after, 12.0)
    assert (event.what if event else None) is what


def test_a_failure_says_why_and_what_comes_next() -> None:
    event = between(READY, replace(FIRST, reason="killed by signal 9", start_at=16.0), 12.0)
    assert event == Event(What.FAILED, "killed by signal 9; starts again in 4 s", 1)


def test_a_day_of_a_service(groundserve: Groundserve) -> None:
    """Start, a death, scaling, an update, one that fails, the balancer's death, the end: all told in order."""
    file = groundserve.service("day", replicas=1)
    up = groundserve.up(file).until_up()
    os.kill(process(groundserve, "-m tests.lab.replica "), signal.SIGKILL)
    wait_until(lambda: told(groundserve, "day"), fits=lambda events: [e[0] for e in events].count("ready") == 2)
    groundserve("scale", "day", "2")
    groundserve.until("day", lambda status: status["service"]["ready"] == 2)
    os.kill(process(groundserve, "-m balancer "), signal.SIGKILL)
    wait_until(lambda: told(groundserve, "day"), fits=lambda events: "balancer_restarted" in [e[0] for e in events])
    groundserve.until("day", lambda status: status["service"]["ready"] == 2)
    groundserve("update", "day", groundserve.service("day", f"echo another\n{LAB}", replicas=1), "-y")
    groundserve("update", "day", groundserve.service("day", BROKEN, replicas=1, restart_limit=1), code=1)
    groundserve("down", "day")
    assert up.wait() == 0
    events = told(groundserve, "day")
    assert events[0] == ("controller_started", None, "version 1")
    assert events[-1] == ("controller_ended", None, "")
    names = [name for name, _, _ in events]
    for name in ("balancer_started", "started", "ready", "failed", "restarted", "draining", "stopped"):
        assert name in names
    assert ("scaled", None, "1 to 2: it was asked for") in events
    assert ("update_started", None, "version 1 to 2, rolling") in events
    assert ("updated", None, "to version 2") in events
    (failed,) = [message for name, _, message in events if name == "update_failed"]
    assert failed.startswith("version 3: ")
    assert "is not here" in failed
    (why,) = [message for name, id, message in events if name == "failed" and id == 1]
    assert why.startswith("killed by signal 9")
    table = groundserve("events", "day")
    head, first, *_ = table.splitlines()
    assert head.split() == ["TIME", "SERVICE", "OBJECT", "EVENT", "MESSAGE"]
    assert first.split()[2:] == ["day", "service", "controller_started", "version", "1"]
    assert first.index("controller_started") == head.index("EVENT")
    assert told(groundserve, "day", "--since", "1d") == events
    assert told(groundserve, "day", "--since", "2100-01-01") == []
    log = groundserve.folder / "state/groundserve/day/events.jsonl"
    assert log.stat().st_mode & 0o777 == 0o600


def test_following_events(groundserve: Groundserve, tmp_path: Path) -> None:
    """Two services' events, as they come, across a rotation."""
    logs = []
    for name in ("one", "two"):
        folder = tmp_path / "state/groundserve" / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        logs.append(EventLog(folder / "events.jsonl", nothing))
    logs[0].add(Event(What.SCALED, "1 to 2"))
    command = [sys.executable, "-m", "balancer.cli", "events", "--follow", "--json"]
    with subprocess.Popen(command, env=groundserve.environ, cwd=ROOT, stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["message"] == "1 to 2"
            logs[1].add(Event(What.READY, "again", 7))
            said = json.loads(following.stdout.readline())
            assert (said["service"], said["event"], said["replica"]) == ("two", "ready", 7)
            rotation.shift(tmp_path / "state/groundserve/one/events.jsonl")
            logs[0].close()
            logs[0].add(Event(What.SCALED, "2 to 3"))
            assert json.loads(following.stdout.readline())["message"] == "2 to 3"
        finally:
            following.kill()


def test_a_full_disk_drops_events_and_says_so(tmp_path: Path) -> None:
    """What cannot be written is counted; the service is not disturbed."""
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    said: list[str] = []
    log = EventLog(path, said.append)
    for _ in range(3):
        log.add(Event(What.STARTED, "version 1", 1))
    assert len(said) == 1
    assert "No space left on device" in said[0]
    path.unlink()
    log.add(Event(What.READY, "again", 1))
    lines = [line for text in path.read_text().splitlines() if (line := Line.of(text))]
    assert [line.what for line in lines] == ["events_dropped", "ready"]
    assert lines[0].message == "3 events could not be written: No space left on device"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"time": 5}', '{"time": "x", "event": "ready"}', "[" * 100_000, '{"time": "2026-01-01"}']
)
def test_a_line_that_is_no_event_is_passed_over(text: str) -> None:
    assert Line.of(text) is None


def test_events_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_BYTES", 4096)
    log = EventLog(tmp_path / "events.jsonl", nothing)
    for number in range(200):
        log.add(Event(What.FAILED, "word " * 1000, number))
    assert len(rotation.files(tmp_path / "events.jsonl")) == rotation.FILES
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= rotation.FILES * 4096


def test_a_folder_that_cannot_be_read(groundserve: Groundserve, tmp_path: Path) -> None:
    """It is said, and the others' events are shown all the same."""
    for name in ("bad", "good"):
        folder = tmp_path / "state/groundserve" / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        EventLog(folder / "events.jsonl", nothing).add(Event(What.READY, name, 1))
    (tmp_path / "state/groundserve/bad/events.jsonl.1").mkdir()
    said = groundserve("events", code=1)
    assert "good" in said
    assert "groundserve: bad: " in said


def test_no_such_service_in_events(groundserve: Groundserve) -> None:
    assert "no service llava ever ran here" in groundserve("events", "llava", code=1)


@pytest.mark.parametrize(("text", "age"), [("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604800), ("4w", 2419200)])
def test_since_an_age(text: str, age: float) -> None:
    assert since(text, now=5e9) == 5e9 - age


def test_since_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times without a zone are this machine's where times are shown so, and UTC where days are."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert since("1970-01-02", 0.0, zone=None) == 86400 - 9 * 3600
        assert since("1970-01-02", 0.0) == 86400
        assert since("1970-01-01T01:00:00+01:00", 0.0, zone=None) == 0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["yesterday", "10", "-5m", "1y", "0001-01-01"])
def test_since_nonsense(groundserve: Groundserve, text: str) -> None:
    assert "neither an age" in groundserve("events", f"--since={text}", code=2)
