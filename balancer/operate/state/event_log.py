"""What happened to a service, with times: one line of JSON for each event, in files of bounded size."""

import enum
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from balancer.operate.engines.rotation import RotatedLog


class What(enum.StrEnum):
    """What happened: to the service, its balancer, or a replica."""

    CONTROLLER_STARTED = "controller_started"
    CONTROLLER_ENDED = "controller_ended"
    SCALED = "scaled"
    UPDATE_STARTED = "update_started"
    UPDATED = "updated"
    UPDATE_FAILED = "update_failed"
    UPDATE_ABORTED = "update_aborted"
    BALANCER_STARTED = "balancer_started"
    BALANCER_RESTARTED = "balancer_restarted"
    BALANCER_SILENT = "balancer_silent"
    BALANCER_BACK = "balancer_back"
    TAKEN_OVER = "taken_over"
    STARTED = "started"
    RESTARTED = "restarted"
    READY = "ready"
    NOT_READY = "not_ready"
    EJECTED = "ejected"
    FAILED = "failed"
    GIVEN_UP = "given_up"
    WAITS_FOR_GPU = "waits_for_gpu"
    GPU_FAILED = "gpu_failed"
    LOST = "lost"
    OUTGOING = "outgoing"
    DRAINING = "draining"
    STOPPED = "stopped"
    EVENTS_DROPPED = "events_dropped"


@dataclass(frozen=True, slots=True)
class Event:
    """`replica` is the id of the replica that it happened to, if any; `message` is one line."""

    what: What
    message: str = ""
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """An event as it was written down; `time` is in seconds since the epoch, `what` may be a later version's."""

    time: float
    what: str
    message: str
    replica: int | None

    @classmethod
    def of(cls, text: str) -> Self | None:
        """None if the line is none of ours, or not whole."""
        try:
            said = json.loads(text)
            moment = datetime.fromisoformat(said["time"]).timestamp()
            replica = int(said["replica"]) if "replica" in said else None
            return cls(moment, str(said["event"]), str(said.get("message", "")), replica)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return None

    def to_json(self) -> dict[str, Any]:
        return {
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "event": self.what,
            **({"replica": self.replica} if self.replica is not None else {}),
            **({"message": self.message} if self.message else {}),
        }


class EventLog:
    """Appends events. What cannot be written, because the disk is full, is dropped: `say` is told once, and the log
    tells how many as soon as it can be written again.
    """

    def __init__(self, path: Path, say: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        self._log = RotatedLog(path)
        self._say = say
        self._clock = clock
        self._dropped = 0
        self._why = ""

    def add(self, event: Event) -> None:
        lines = []
        if self._dropped:
            count = "1 event" if self._dropped == 1 else f"{self._dropped} events"
            lines.append(Event(What.EVENTS_DROPPED, f"{count} could not be written: {self._why}"))
        data = b"".join(self._encoded([*lines, event]))
        # The last attempt may have left a part of a line.
        failure = self._log.write(b"\n" + data if self._dropped else data)
        if failure is None:
            self._dropped = 0
            return
        self._why = failure.strerror or str(failure)
        if not self._dropped:
            self._say(f"events cannot be written, so they are dropped until they can: {self._why}")
        self._dropped += 1

    def close(self) -> None:
        self._log.close()

    def _encoded(self, events: list[Event]) -> Iterator[bytes]:
        now = self._clock()
        for event in events:
            # Replicas print without bounds, and their last words become messages.
            line = Line(now, event.what, " ".join(event.message.split())[:1000], event.replica)
            yield json.dumps(line.to_json()).encode() + b"\n"
