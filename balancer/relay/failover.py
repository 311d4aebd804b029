"""What may be tried again after an attempt ended badly, and what the client is told when nothing is left: a table."""

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.outcome import Outcome
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


# What no replica took: it goes to another one at once.
UNTAKEN = frozenset((Outcome.REFUSED, Outcome.UNREACHED, Outcome.UNKNOWN, Outcome.BUSY))
# What a replica may have taken: it goes to another one if it is a GET or HEAD (or `retry_sent`), at the budget's cost.
PERHAPS_TAKEN = frozenset((Outcome.LOST,))


def may_repeat(outcome: Outcome, method: bytes, sent: int, settings: Settings, budget: RetryBudget, now: float) -> bool:
    """May this request go to another member? `sent` counts the attempts that a replica may have seen."""
    if outcome in UNTAKEN:
        return True
    if outcome not in PERHAPS_TAKEN or not (method in SAFE_METHODS or settings.retry_sent):
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
