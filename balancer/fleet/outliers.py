"""Which members are ejected: those that fail by their own fault, and those that answer far worse than another.

A replica answers 500 to an image that cannot be fetched, and to every request once its GPU is lost; it breaks one
stream or all of them. Only a comparison with the other members tells the two apart: an outlier is one that differs (as
in Envoy's success-rate detection). But a policy that sends similar prompts to one replica sends all bad ones there, and
a client's bad requests may coincide with one replica's turns in a round robin. So bad answers only make a member a
suspect. Then replicas are chosen at random for a while, and only the outcomes of those requests decide.
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from balancer.fleet.member import Member

# A member is suspected if at least this many of its last answers were doubtful.
SUSPICIOUS = 5
# To be suspected, its share of doubtful answers must be larger than that of all others by LARGER; to be ejected, larger
# than that of one other by FAR_LARGER.
LARGER, FAR_LARGER = 0.3, 0.5
# A difference between two shares of this many standard deviations is not chance.
SURE = 4.0
# A trial has this many random choices per member, and waits for this many seconds for their outcomes.
DEALT = 16
PATIENCE = 60.0


@dataclass(slots=True, eq=False)
class Trial:
    """A period of random choices, and how those requests ended."""

    suspect: Member
    until: float
    left: int  # random choices still to be made
    open: int = 0  # chosen at random, and not over yet
    scores: dict[Member, tuple[int, int]] = field(default_factory=dict)  # (doubtful answers, all answers)

    def note(self, member: Member, is_well: bool) -> None:
        bad, count = self.scores.get(member, (0, 0))
        self.scores[member] = bad + (not is_well), count + 1

    def is_proved(self) -> bool:
        """Does the suspect answer far worse than another member?"""
        own = self.scores.get(self.suspect, (0, 0))
        return any(_is_far_worse(own, score) for member, score in self.scores.items() if member is not self.suspect)


def _is_far_worse(own: tuple[int, int], other: tuple[int, int]) -> bool:
    """Compares two shares of (bad, all) answers, by the usual test for two proportions."""
    (bad, count), (other_bad, other_count) = own, other
    if not count or not other_count:
        return False
    difference = bad / count - other_bad / other_count
    if difference < FAR_LARGER:
        return False
    mean = (bad + other_bad) / (count + other_count)
    return difference >= SURE * math.sqrt(mean * (1 - mean) * (1 / count + 1 / other_count))


class Outliers:
    """Judges the members by how their requests end. `members` returns them, `clock` the time in seconds."""

    def __init__(self, clock: Callable[[], float], members: Callable[[], Collection[Member]]) -> None:
        self._clock = clock
        self._members = members
        self._trial: Trial | None = None

    def deal(self, candidates: Sequence[Member]) -> tuple[Sequence[Member], Trial | None]:
        """The candidates that the policy may choose from, and the trial that the choice counts in, if any.

        During a trial that is one candidate, picked at random.
        """
        trial = self._trial
        if trial is None or not trial.left or trial.suspect not in candidates:
            return candidates, None
        trial.left -= 1
        trial.open += 1
        return (random.choice(candidates),), trial

    def given_back(self, trial: Trial) -> None:
        """Notes that a request of the trial is over, judged or not; ends the trial after the last one."""
        trial.open -= 1
        if trial is self._trial and (not (trial.left or trial.open) or self._clock() > trial.until):
            self._acquit(trial)

    def answered(self, member: Member, is_well: bool, trial: Trial | None) -> bool:
        """Notes how a request ended: well, or badly by its own or the member's fault. True if a suspect is ejected."""
        now = self._clock()
        if member.ejected_until > now:
            return False
        member.outlier.answered(now, is_well)
        if trial is not None and trial is self._trial:
            trial.note(member, is_well)
            if trial.is_proved():
                self._trial = None
                return self._eject(trial.suspect, now)
        elif not is_well and self._is_suspected(member, now):
            self._trial = Trial(member, now + PATIENCE, DEALT * len(self._members()))
        return False

    def failed(self, member: Member) -> bool:
        """Notes a failure that is the member's own fault. True if it is ejected."""
        now = self._clock()
        return member.ejected_until <= now and member.outlier.failed() and self._eject(member, now)

    def _is_suspected(self, member: Member, now: float) -> bool:
        bad, count = member.outlier.lately(now)
        if bad < SUSPICIOUS or now < member.outlier.trusted_until or not self._may_eject(member, now):
            return False
        if self._trial is not None:
            if now <= self._trial.until and self._trial.suspect in self._members():
                return False
            self._acquit(self._trial)
        others = [other.outlier.lately(now) for other in self._members() if other is not member]
        theirs = sum(bad for bad, _ in others) / max(1, sum(count for _, count in others))
        return bad / count >= max(theirs + LARGER, (1 + theirs) / 2)

    def _acquit(self, trial: Trial) -> None:
        self._trial = None
        trial.suspect.outlier.acquit(self._clock())

    def _may_eject(self, member: Member, now: float) -> bool:
        """The last available member is never ejected, and never more than half of all members."""
        members = self._members()
        ejected = sum(other.ejected_until > now for other in members)
        others = any(other is not member and other.is_available(now) for other in members)
        return others and (ejected + 1) * 2 <= len(members)

    def _eject(self, member: Member, now: float) -> bool:
        if not self._may_eject(member, now):
            return False
        member.ejected_until = member.outlier.eject(now)
        return True
