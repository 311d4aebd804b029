"""Judges what happened by what was promised: how each request ended, given the faults at that time, and what was
generated how often."""

import asyncio
import itertools
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.client import Got, text_of
from tests.chaos.replica import Replica
from tests.chaos.stage import Stage, Violation

# How long a fault may still show in requests that began after its end; seconds.
ECHO = 0.1

# The faults that may explain how an answer ended. A fault of one replica breaks no answer and loses no request, because
# another replica continues the stream or gets the request. Only faults of two at once do.
STALLS = {"stop", "hole", "hang"}
OF_TWO = {"swap", "all gone", "poison"}
MAY_END: dict[tuple[str, int, str], set[str]] = {
    ("broken", 200, "stream_broken"): OF_TWO,
    ("broken", 200, "replica_lost"): OF_TWO,
    ("broken", 200, "first_byte_timeout"): OF_TWO,
    ("whole", 502, "replica_lost"): OF_TWO,
    ("whole", 504, "first_byte_timeout"): STALLS,
    ("whole", 500, ""): {"errors"},
    ("whole", 422, "kills_replicas"): {"poison"},
    # Only if there is no other replica, to answer the request or to continue its stream.
    ("whole", 502, "replica_unreachable"): {"all gone"},
    ("whole", 503, "no_replica_ready"): {"all gone"},
    ("broken", 200, "replica_unreachable"): {"all gone"},
    ("broken", 200, "no_replica_ready"): {"all gone"},
}


@dataclass(slots=True)
class Fault:
    """One disturbance of some replicas, named as the balancer names them. Times are CLOCK_MONOTONIC."""

    kind: str
    victims: set[str]
    began: float = field(default_factory=time.monotonic)
    ended: float = float("inf")

    def overlaps(self, got: Got) -> bool:
        return self.began <= got.ended and got.began <= self.ended + ECHO


@dataclass(slots=True)
class Repeats:
    """Generations of one request beyond its first. `moved`: at another replica, because the first did not finish it.
    `doubled`: the first two for any other reason, or after a second move.
    """

    moved: int = 0
    doubled: tuple[dict[str, Any], dict[str, Any]] | None = None


@dataclass(slots=True)
class Judge:
    """Reads the balancer's log and the replicas' journal as they grow."""

    stage: Stage
    faults: list[Fault] = field(default_factory=list)
    logged: dict[str, dict[str, Any]] = field(default_factory=dict)
    generated: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    whole: set[tuple[str, str]] = field(default_factory=set)  # id, address of generations that were answered whole
    sent_again: int = 0  # requests, because of the keep-alive race: nobody read them the first time
    elsewhere: int = 0  # requests that a second replica finished, or answered in full
    attempts: int = 0  # beyond each request's first
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _read: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def until_logged(self, gots: list[Got]) -> None:
        """Waits until the balancer has logged them: it writes its log a few times a second."""
        until = time.monotonic() + 5.0
        self._read_log()
        while any(got.wish.id not in self.logged for got in gots) and time.monotonic() < until:
            await asyncio.sleep(0.02)
            self._read_log()

    def judge(self, gots: list[Got]) -> None:
        """Raises Violation for the first answer that breaks a promise. Call it while nothing is in flight."""
        self._read_log()
        self.read_journal()
        for got in gots:
            entry = self.logged.get(got.wish.id)
            if entry is None:
                raise Violation(f"the balancer's log has no line for {got}")
            self._judge_end(got, entry)
            self._judge_generations(got)
        for got in gots:  # they are done with, and the run is long
            del self.logged[got.wish.id]
            self.forget(got)
        if self.logged:
            raise Violation(f"the balancer logged requests that no client made: {list(self.logged.values())[:3]}")
        self.faults = [fault for fault in self.faults if fault.ended == float("inf")]

    def forget(self, got: Got) -> None:
        for made in self.generated.pop(got.wish.id, ()):
            self.whole.discard((got.wish.id, made["address"]))

    def _judge_end(self, got: Got, entry: dict[str, Any]) -> None:
        member = got.replica or entry.get("member", "")
        self.attempts += max(0, entry["attempts"] - 1)
        self.sent_again += "race" in entry.get("retries", "")
        has_no_code = got.wish.method == "HEAD" or (got.wish.path == "/v1/messages" and got.status >= 400)
        code = entry.get("error", "") if has_no_code else got.code
        self.counts[f"{got.end} {got.status} {code}".strip()] += 1
        if got.end == "left" and entry["status"] not in (200, 499):
            raise Violation(f"{got}: logged as {entry['status']}")
        if (got.end == "whole" and got.status == 200) or got.end == "left":
            return
        then = [fault for fault in self.faults if fault.overlaps(got)]
        may = MAY_END.get((got.end, got.status, code), set())
        if not any(fault.kind in may and (not member or member in fault.victims) for fault in then):
            around = [f for f in self.faults if f.began <= got.ended and got.began <= f.ended + 1]
            raise Violation(f"no fault explains {got}\n  log: {entry}\n  faults then: {around}")

    def _judge_generations(self, got: Got) -> None:
        made = self.generated.get(got.wish.id, [])
        is_ok = got.end == "whole" and got.status == 200
        if is_ok and got.wish.method == "POST" and not made:
            raise Violation(f"answered, though no replica generated it: {got}")
        if is_ok and got.wish.text is not None and (text := text_of(got)) != got.wish.text:
            raise Violation(f"not the answer that one replica makes: {got}\n  wanted {got.wish.text!r}\n  got {text!r}")
        repeats = self.repeats(got)
        self.elsewhere += repeats.moved
        if repeats.doubled:
            told = "\n  ".join(map(str, repeats.doubled))
            raise Violation(f"generated twice: {got}\n  {told}\n  log: {self.logged[got.wish.id]}")

    def repeats(self, got: Got) -> "Repeats":
        """How often it was generated again, and why."""
        found = Repeats()
        for earlier, later in itertools.pairwise(self.generated.get(got.wish.id, [])):
            is_elsewhere = later["address"] != earlier["address"]
            if is_elsewhere and (got.wish.id, earlier["address"]) not in self.whole and not found.moved:
                found.moved += 1
            else:
                found.doubled = found.doubled or (earlier, later)
        return found

    def generated_at(self, replica: Replica, since: float) -> list[dict[str, Any]]:
        """The generations that this replica has begun since then."""
        self.read_journal()
        entries = [entry for made in self.generated.values() for entry in made]
        return [entry for entry in entries if entry["address"] == replica.address and entry["at"] > since]

    def _read_log(self) -> None:
        for entry in self._new_lines(str(self.stage.log)):
            if entry["id"] in self.logged:
                raise Violation(f"logged twice: {entry}")
            self.logged[entry["id"]] = entry

    def read_journal(self) -> None:
        for entry in self._new_lines(str(self.stage.journal)):
            if entry["what"] == "generated":
                self.generated[entry["id"]].append(entry)
            elif entry.get("generated", True) and entry.get("outcome") == "answered":
                self.whole.add((entry["id"], entry["address"]))

    def _new_lines(self, path: str) -> list[dict[str, Any]]:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(self._read[path])
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read[path] += len(whole + newline)
        return [json.loads(line) for line in whole.splitlines()]
