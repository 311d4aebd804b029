"""What fails at SGLang itself, asked directly as well as through the balancer, and why.

A check that is not here and fails, or is here and passes, fails the run: so each line stays true.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.clients.outcome import Outcome

# (suite, check): why.
KNOWN: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Verdict:
    """unexpected: failed and should not; mended: passed and should not; gone: known, and not among the checks."""

    unexpected: tuple[Outcome, ...]
    mended: tuple[Outcome, ...]
    gone: tuple[tuple[str, str], ...]

    @property
    def is_good(self) -> bool:
        return not (self.unexpected or self.mended or self.gone)


def judge(outcomes: Iterable[Outcome], known: dict[tuple[str, str], str]) -> Verdict:
    """Compares what came out with what is known, for the suites that were run."""
    all = list(outcomes)
    suites = {one.suite for one in all}
    ran = {(one.suite, one.check) for one in all}
    return Verdict(
        tuple(one for one in all if one.problem and (one.suite, one.check) not in known),
        tuple(one for one in all if not one.problem and (one.suite, one.check) in known),
        tuple(one for one in known if one[0] in suites and one not in ran),
    )
