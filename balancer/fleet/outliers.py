"""Who is ejected: a member that fails by itself, or answers far worse than another does.

A replica says 500 to an image that cannot be fetched, and to everything when its GPU is lost; it breaks one stream or
all. Only the others tell which it is: an outlier is who differs (as in Envoy's success-rate detection). But a policy
that sends like prompts to one replica sends all bad ones there, and a client's bad requests may fall into step with
the turns. So bad answers only make a member suspected; then places are given by lot for a while, and the outcomes of
those alone decide.
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from balancer.fleet.member import Member

# Doubtful ones among the last answers of a member that make it suspected.
SUSPICIOUS = 5
# How much larger its share of them must be than that of the others to be suspected, and than another's to be ejected.
LARGER, FAR_LARGER = 0.3, 0.5
# Standard deviations between two shares that chance does not make.
SURE = 4.0
# Places given by lot for each member, and seconds for which their outcomes are waited for.
DEALT = 16
PATIENCE = 60.0


@dataclass(slots=True, eq=False)
class Trial:
    """Places given by lot, and how their requests ended; by member (doubtful answers, all answers)."""

    suspect: Member
    until: float
    left: int  # places still to be given
    open: int = 0  # given, and not over yet
    scores: dict[Member, tuple[int, int]] = field(default_factory=dict)

    def note(self, member: Member, is_well: bool) -> None:
        bad, count = self.scores.get(member, (0, 0))
        self.scores[member] = bad + (not is_well), count + 1

    def is_proved(self) -> bool:
        """Does the suspect answer far worse than another?"""
        own = self.scores.get(self.suspect, (0, 0))
        return any(_is_far_worse(own, score) for member, score in self.scores.items() if member is not self.suspect)


def _is_far_worse(own: tuple[int, int], other: tuple[int, int]) -> bool:
    """Two shares of failures compared, by the usual test for proportions."""
    (bad, count), (other_bad, other_count) = own, other
    if not count or not other_count:
        return False
    difference = bad / count - other_bad / other_count
    if difference < FAR_LARGER:
        return False
    mean = (bad + other_bad) / (count + other_count)
    return difference >= SURE * math.sqrt(mean * (1 - mean) * (1 / count + 1 / other_count))


class Outliers:
    """Judges the members by how their requests end; `members` tells who they are, `clock` the time in seconds."""

    def __init__(self, clock: Callable[[], float], members: Callable[[], Collection[Member]]) -> None:
        self._clock = clock
        self._members = members
        self._trial: Trial | None = None

    def deal(self, candidates: Sequence[Member]) -> tuple[Sequence[Member], Trial | None]:
        """Who may be chosen: while a member is on trial, one of those with room by lot; and in which trial."""
        trial = self._trial
        if trial is None or not trial.left or trial.suspect not in candidates:
            return candidates, None
        trial.left -= 1
        trial.open += 1
        return (random.choice(candidates),), trial

    def given_back(self, trial: Trial) -> None:
        """A place that was given by lot is free again, its request judged or not."""
        trial.open -= 1
        if trial is self._trial and (not (trial.left or trial.open) or self._clock() > trial.until):
            self._acquit(trial)

    def answered(self, member: Member, is_well: bool, trial: Trial | None) -> bool:
        """A request at a member ended well, or so that it or the member was bad; True: it is ejected."""
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
        """It failed a request by itself; True: it is ejected."""
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
        """Never the last that is available, never more than half of the members."""
        members = self._members()
        ejected = sum(other.ejected_until > now for other in members)
        others = any(other is not member and other.is_available(now) for other in members)
        return others and (ejected + 1) * 2 <= len(members)

    def _eject(self, member: Member, now: float) -> bool:
        if not self._may_eject(member, now):
            return False
        member.ejected_until = member.outlier.eject(now)
        return True
