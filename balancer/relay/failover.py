"""What may be tried again after an attempt ended badly, and what the client is told when nothing is left: a table."""

from dataclasses import dataclass

from balancer import errors
from balancer.errors import ServeError
from balancer.relay.upstream import Outcome
from balancer.spec.settings import Settings

SAFE_METHODS = (b"GET", b"HEAD")
MAX_SENT = 3
BUDGET_SHARE = 0.2
BUDGET_PER_SECOND = 3


class RetryBudget:
    """How many requests that a replica may have seen can be sent again: a fifth of the traffic, or three a second.

    The clock is passed in, in seconds. (The rule is Finagle's, which Envoy and Linkerd took over.)
    """

    def __init__(self) -> None:
        self._tokens = float(BUDGET_PER_SECOND)
        self._filled_at = 0.0

    def deposit(self) -> None:
        """A request came."""
        self._tokens = min(self._tokens + BUDGET_SHARE, 100.0)

    def withdraw(self, now: float) -> bool:
        """Takes the place of one repeat; False when there is none left."""
        refill = (now - self._filled_at) * BUDGET_PER_SECOND
        self._filled_at = now
        self._tokens = min(self._tokens + refill, max(self._tokens, float(BUDGET_PER_SECOND)))
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(frozen=True, slots=True)
class Rule:
    """May the request go to another member after this outcome?"""

    any_method: bool = False  # no replica took it: it goes on at once
    safe_methods: bool = False  # a replica may have taken it: for a GET or HEAD, and at the budget's cost
    # Does it speak against the member? (A refused connection is dealt with at once, not counted.)
    is_failure: bool = False
    # Does it speak against the member or the request, as an answered error does? The other members tell which.
    is_doubtful: bool = False


RULES = {
    Outcome.REFUSED: Rule(any_method=True),
    Outcome.UNREACHED: Rule(any_method=True, is_failure=True),
    Outcome.UNKNOWN: Rule(any_method=True),
    Outcome.BUSY: Rule(any_method=True),
    Outcome.LOST: Rule(safe_methods=True, is_failure=True),
    Outcome.SILENT: Rule(is_failure=True),
    Outcome.MANGLED: Rule(is_failure=True),
    Outcome.BROKEN: Rule(is_doubtful=True),
    Outcome.STALLED: Rule(is_doubtful=True),
    Outcome.STUCK: Rule(is_doubtful=True),
}


def may_repeat(outcome: Outcome, method: bytes, sent: int, settings: Settings, budget: RetryBudget, now: float) -> bool:
    """May this request go to another member? `sent` counts the attempts that a replica may have seen."""
    rule = RULES[outcome]
    if rule.any_method:
        return True
    if not rule.safe_methods or not (method in SAFE_METHODS or settings.retry_sent):
        return False
    return sent < MAX_SENT and budget.withdraw(now)


def final_error(outcome: Outcome, settings: Settings, retry_after: int) -> ServeError:
    """What the client is told when the request cannot be repeated."""
    match outcome:
        case Outcome.REFUSED | Outcome.UNREACHED | Outcome.UNKNOWN:
            return errors.unreachable()
        case Outcome.BUSY:
            return errors.replicas_busy(retry_after)
        case Outcome.LOST:
            return errors.lost()
        case Outcome.SILENT:
            return errors.first_byte_timeout(settings.first_byte_timeout)
        case Outcome.STALLED:
            return errors.stream_broken(f"the replica was silent for {settings.idle_timeout:g} s (idle_timeout).")
        case Outcome.STUCK:
            longest = max(settings.first_byte_timeout, settings.idle_timeout)
            return errors.stream_broken(f"nothing more came for {longest:g} s (first_byte_timeout).")
        case Outcome.BROKEN:
            return errors.stream_broken("the replica went away.")
        case _:
            return errors.bad_answer()
