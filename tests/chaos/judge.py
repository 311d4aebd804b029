"""Judges what happened by what was promised: how each request ended, by how the replicas were at that time, and what
was generated how often."""

import asyncio
import itertools
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from balancer.routing.admission import MOMENT
from balancer.spec.settings import Settings
from tests.chaos.client import Got, text_of
from tests.chaos.replica import INF, Ill, Replica
from tests.chaos.stage import SLACK, Stage, Violation

# How long after its end an illness may still show in requests that began since; seconds.
ECHO = 0.1
POISON = "poison-"  # what the ids of requests that kill replicas begin with
# How such a request may end: it kills whoever gets it, and two deaths end it.
POISONED = {("whole", 502, "replica_lost"), ("broken", 200, "stream_broken"), ("whole", 422, "kills_replicas")}
# Illnesses of which a request may lose its replica. Two such replicas end it, which is promised.
FATAL = (Ill.GONE, Ill.DEAF, Ill.CUTTING, Ill.RESETTING, Ill.HANGING)
# Those that let a replica take no request.
CLOSED = (Ill.GONE, Ill.DEAF, Ill.REFUSING)


@dataclass(slots=True)
class Repeats:
    """Generations of one request beyond its first. `moved`: at another replica, because the first was unwell and did
    not finish it. `doubled`: the first two for any other reason, or after a second move.
    """

    moved: int = 0
    doubled: tuple[dict[str, Any], dict[str, Any]] | None = None


@dataclass(slots=True)
class Judge:
    """Reads the balancer's log and the replicas' journal as they grow."""

    stage: Stage
    logged: dict[str, dict[str, Any]] = field(default_factory=dict)
    generated: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    # When generations were answered whole, to somebody who was still there, by id and process
    whole: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
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
        self.forget_spells()

    def forget(self, got: Got) -> None:
        for made in self.generated.pop(got.wish.id, ()):
            self.whole.pop((got.wish.id, made["process"]), None)

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
        if not self._may_end(got, code, member, entry["attempts"]):
            ill = {self.stage.name_of(one): one.spells for one in self.stage.replicas if one.spells}
            raise Violation(f"no replica's illness explains {got}\n  log: {entry}\n  ill lately: {ill}")

    def _may_end(self, got: Got, code: str, member: str, attempts: int) -> bool:
        """May it end so, by how the replicas were meanwhile? One alone breaks no answer and loses no request: another
        continues the stream or gets the request; and where none takes it, it waits.
        """
        if got.wish.id.startswith(POISON):
            return (got.end, got.status, code) in POISONED
        match got.end, got.status, code:
            case "whole", 500, "":  # a replica's own answer, which is not ours to doubt
                return member in self.ill(got, Ill.ERRING)
            case (
                ("whole", 502, "replica_lost")
                | ("whole", 504, "first_byte_timeout")
                | ("broken", 200, "stream_broken" | "replica_lost" | "first_byte_timeout")
            ):
                return attempts >= 2 and len(self.ill(got, *FATAL)) >= 2
            case ("whole", 503, "no_replica_ready") | ("broken", 200, "no_replica_ready"):
                patience = min(self.settings.queue_timeout, self.settings.start_wait)
                patience = patience if got.wish.method == "POST" else min(patience, MOMENT)
                since, lasted = self.all_closed(got)
                return lasted + min(SLACK, patience / 2) >= patience and got.ended - since >= patience
        return False

    @property
    def settings(self) -> Settings:
        return Settings(**self.stage.settings)

    def ill(self, got: Got, *hows: Ill) -> set[str]:
        """The names of the replicas that were unwell in one of these ways while this request was under way."""
        return {
            self.stage.name_of(replica)
            for replica in self.stage.replicas
            for spell in replica.spells
            if spell.how in hows and spell.began <= got.ended and got.began <= spell.ended + ECHO
        }

    def all_closed(self, got: Got) -> tuple[float, float]:
        """Since when no replica could take a request while this one was under way, and for how many seconds."""
        closed = [[spell for spell in one.spells if spell.how in CLOSED] for one in self.stage.replicas]
        edges = sorted({got.ended, *(at for spells in closed for one in spells for at in (one.began, one.ended))})
        since, lasted, longest = INF, 0.0, (INF, 0.0)
        for begin, end in itertools.pairwise(edge for edge in edges if edge <= got.ended):
            if not all(any(one.began <= begin and end <= one.ended for one in spells) for spells in closed):
                since, lasted = INF, 0.0
                continue
            since, lasted = min(since, begin), lasted + end - begin
            longest = max(longest, (since, lasted), key=lambda found: found[1])
        return longest

    def forget_spells(self) -> None:
        """Those that are over: whatever began since is well."""
        for replica in self.stage.replicas:
            replica.spells[:] = [spell for spell in replica.spells if spell.ended == INF]

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
            whole = {made["process"]: self.whole.get((got.wish.id, made["process"])) for made in repeats.doubled}
            ill = {one.address: one.spells for one in self.stage.replicas if one.spells}
            told = "\n  ".join(map(str, (*repeats.doubled, f"answered whole: {whole}", f"ill lately: {ill}")))
            raise Violation(f"generated twice: {got}\n  {told}\n  log: {self.logged[got.wish.id]}")

    def repeats(self, got: Got) -> "Repeats":
        """How often it was generated again, and why. One that was stopped may read later what it was sent at first."""
        found = Repeats()
        stopped = {one.address for one in self.stage.replicas if self.stage.name_of(one) in self.ill(got, Ill.DEAF)}
        made = sorted(self.generated.get(got.wish.id, []), key=lambda entry: entry["address"] not in stopped)
        waited_since = self.all_closed(got)[0]  # for any replica, then, also the one that it was at
        for earlier, later in itertools.pairwise(made):
            # A replica that was restarted is another one, at whatever address.
            is_elsewhere = later["process"] != earlier["process"] or waited_since <= later["at"]
            if is_elsewhere and self._was_lost(got, earlier, later["at"]) and not found.moved:
                found.moved += 1
            else:
                found.doubled = found.doubled or (earlier, later)
        return found

    def _was_lost(self, got: Got, made: dict[str, Any], moment: float) -> bool:
        """Had this generation been lost by then, because its replica was unwell? Not if its answer had arrived whole.

        One that was stopped begins, once it goes on, with what it was sent before.
        """
        if any(at <= moment for at in self.whole[got.wish.id, made["process"]]):
            return False
        spells = [spell for one in self.stage.replicas if one.address == made["address"] for spell in one.spells]
        return any(
            spell.began <= moment and (got.began if spell.how is Ill.DEAF else made["at"]) <= spell.ended + ECHO
            for spell in spells
            if spell.how in FATAL
        )

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
            elif entry["generated"] and entry["outcome"] == "answered" and entry["is_heard"]:
                self.whole[entry["id"], entry["process"]].append(entry["at"])

    def _new_lines(self, path: str) -> list[dict[str, Any]]:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(self._read[path])
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read[path] += len(whole + newline)
        return [json.loads(line) for line in whole.splitlines()]
