"""What is known of a replica that shares its GPUs: its state, and when it had its turn.

States are those of `replica/tenant.py`, as `GET /lease` tells them. DOZING and ASLEEP are no failure: such a replica
answers once it is woken, and until then nothing is asked of it.
"""

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

REMEMBERED = 900.0  # seconds for which past turns are kept
MOST_TURNS = 512
# The weight of the newest answer in how long answers usually take.
NEWEST = 0.2
LONGEST_REASON = 300


class TenantState(enum.StrEnum):
    STARTING = "STARTING"
    AWAKE = "AWAKE"
    DOZING = "DOZING"
    ASLEEP = "ASLEEP"

    @property
    def is_away(self) -> bool:
        """Are its GPUs free for others to take, or taken?"""
        return self in (TenantState.DOZING, TenantState.ASLEEP)


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of `GET /lease`. `seconds`: how long it has been in its state; `gpus`: their UUIDs.

    `problem`: why it cannot wake or doze; `starting`: who has its GPUs in order to start. Both empty: nobody, nothing.
    By GPU, `weights`: bytes that it gives back when it falls asleep; `lacks`: bytes that its last wake lacked.
    """

    state: TenantState
    gpus: tuple[str, ...]
    seconds: float = 0.0
    problem: str = ""
    starting: str = ""
    weights: Mapping[str, int] = field(default_factory=dict)
    lacks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self | None:
        """None if the body is not such an answer, or the replica is broken."""
        state, gpus, seconds, problem = (body.get(name) for name in ("state", "gpus", "for", "problem"))
        if state not in list(TenantState) or not isinstance(gpus, list) or not gpus:
            return None
        if not all(isinstance(gpu, str) for gpu in gpus):
            return None
        others = body.get("others")
        starting = [
            str(other.get("note"))
            for other in (others if isinstance(others, list) else [])
            if isinstance(other, dict) and other.get("state") == TenantState.STARTING
        ]
        return cls(
            TenantState(str(state)),
            tuple(gpus),
            max(0.0, float(seconds)) if isinstance(seconds, int | float) else 0.0,
            problem[:LONGEST_REASON] if isinstance(problem, str) else "",
            starting[0][:LONGEST_REASON] if starting else "",
            _bytes(body.get("weights_bytes")),
            _bytes(body.get("lacks_bytes")),
        )


def _bytes(said: object) -> Mapping[str, int]:
    """Sizes by GPU, as far as they are such."""
    known = said.items() if isinstance(said, dict) else ()
    return {gpu: size for gpu, size in known if isinstance(size, int)}


@dataclass(slots=True)
class Tenancy:
    """One replica's part in the turns on its GPUs. Times are loop times in seconds, `gpus` their UUIDs."""

    gpus: tuple[str, ...]
    state: TenantState
    since: float  # when it entered this state
    away_since: float = 0.0  # when it was last awake, while it is away
    problem: str = ""  # why it cannot wake or doze
    starting: str = ""  # who has its GPUs in order to start
    cannot_wake: str = ""  # why the last attempt to wake it failed, if nothing else could be tried
    retry_at: float = 0.0  # after a failed wake, the earliest time of the next attempt
    is_lost: bool = False  # it does not answer: nothing of this is known any more
    is_told: bool = False  # it has been told to change its state, and has not answered yet
    orders: int = 0  # how often it has been told so
    wakes: int = 0
    idle_since: float = 0.0  # since when it has had no requests
    usual: float | None = None  # seconds that its answers usually take, its absences not counted
    _away: float = 0.0  # seconds that it was away before `away_since`
    _turns: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST_TURNS))

    @property
    def is_away(self) -> bool:
        """Does it doze or sleep, as far as is known?"""
        return self.state.is_away and not self.is_lost

    @property
    def why_away(self) -> str:
        """What keeps it from waking; empty if nothing does."""
        return (
            self.cannot_wake
            or self.problem
            or (f"its GPU is taken until {self.starting} has started" if self.starting else "")
        )

    def away(self, now: float) -> float:
        """How many seconds it has not been awake so far, since the balancer has known it."""
        return self._away + (now - self.away_since if self.state.is_away else 0.0)

    def enter(self, state: TenantState, at: float) -> None:
        if state.is_away and not self.state.is_away:
            self.away_since = at
        elif self.state.is_away and not state.is_away:
            self._away += at - self.away_since
            self.wakes += 1
        if self.state is TenantState.AWAKE:
            self._turns.append((self.since, at))
        self.state, self.since = state, at

    def told(self) -> None:
        """It is told to change its state. Until it answers that order, nothing else that it says counts."""
        self.is_told = True
        self.orders += 1

    def took(self, seconds: float, now: float) -> None:
        """A request ended; it took that long, the replica's absences not counted."""
        self.idle_since = now
        self.usual = seconds if self.usual is None else self.usual + NEWEST * (seconds - self.usual)

    def turns(self, now: float) -> list[tuple[float, float]]:
        """Its turns of the last `REMEMBERED` seconds: when each began and ended; the present one ends now."""
        present = [(self.since, now)] if self.state is TenantState.AWAKE and not self.is_lost else []
        return [turn for turn in (*self._turns, *present) if now - turn[1] < REMEMBERED]
