"""What may be retried after a failed attempt, and which error the client gets when no attempt is left."""

from typing import Final

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.outcome import Outcome
from balancer.relay.paths import WAITED_FOR
from balancer.routing.body import parsed
from balancer.spec.settings import Settings

SAFE_METHODS: Final = (b"GET", b"HEAD")
MAX_DEATHS = 2  # failed attempts on which a replica may have begun: after this many the request is given up
BUDGET_SHARE: Final = 0.2
BUDGET_PER_SECOND = 3


class RetryBudget:
    """Limits retries of requests that a replica may have seen: a fifth of the traffic, or three per second.

    The clock is passed in, in seconds. (The rule is Finagle's, which Envoy and Linkerd adopted.) Generating requests
    whose replica died do not draw on it: one that dies loses all its requests at once, and each is sent again at most
    once. Those do that a live replica let wait: where all are too slow, most must not be made twice.
    """

    def __init__(self) -> None:
        self._tokens = float(BUDGET_PER_SECOND)
        self._filled_at = 0.0

    def deposit(self) -> None:
        """Call it for each request."""
        self._tokens = min(self._tokens + BUDGET_SHARE, 100.0)

    def withdraw(self, now: float) -> bool:
        """Takes one retry from the budget; False if none is left."""
        refill = (now - self._filled_at) * BUDGET_PER_SECOND
        self._filled_at = now
        self._tokens = min(self._tokens + refill, max(self._tokens, float(BUDGET_PER_SECOND)))
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


# No replica took the request: it goes to another one at once.
UNTAKEN = frozenset((Outcome.REFUSED, Outcome.UNREACHED, Outcome.UNKNOWN, Outcome.BUSY))
# A replica may have taken the request: it goes to another one if that is harmless.
PERHAPS_TAKEN = frozenset((Outcome.LOST, Outcome.SILENT))
# Its replica may be gone, which is known only a moment later.
PERHAPS_GONE = frozenset((Outcome.LOST, Outcome.BROKEN, Outcome.REFUSED, Outcome.UNREACHED))
# The answer broke off while it was held back: if the client has nothing of it, the request is as good as lost.
HELD_BACK = frozenset((Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK))
# The answer, whose head the client has, broke off: a stream may continue on another replica.
BROKEN_OFF = frozenset((Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK, Outcome.SILENT, Outcome.AWAY))


def only_generates(path: str, body: list[bytes]) -> bool:
    """Does a POST to this path have no effect except its cost, however often it is repeated?"""
    if path not in WAITED_FOR:
        return False
    if path != "/v1/responses":
        return True
    # A replica stores the answer for later requests to build on unless told not to, and may run tools by itself.
    asked = parsed(b"".join(body))
    if not isinstance(asked, dict) or asked.get("store") is not False:
        return False
    tools = asked.get("tools") or []
    return isinstance(tools, list) and all(isinstance(t, dict) and t.get("type") == "function" for t in tools)


def may_repeat(
    outcome: Outcome,
    method: bytes,
    only_generates: bool,
    deaths: int,
    settings: Settings,
    budget: RetryBudget,
    now: float,
) -> bool:
    """May this request, none of whose answer was relayed, be sent to another replica?

    `only_generates`: repeating it has no effect except its cost. `deaths` counts the failed attempts on which a replica
    may have begun.
    """
    if outcome in UNTAKEN:
        return True
    if outcome not in PERHAPS_TAKEN or deaths >= MAX_DEATHS:
        return False
    if method not in SAFE_METHODS:
        if not only_generates or settings.retry_sent != "once":
            return False
        if outcome is Outcome.LOST:
            return True
    return budget.withdraw(now)


def may_continue(outcome: Outcome, deaths: int, settings: Settings) -> bool:
    """May an answer that has begun continue on another replica?"""
    if outcome in UNTAKEN:  # the replica that was to continue it did not take the request
        return True
    return settings.continue_broken and outcome in BROKEN_OFF and deaths < MAX_DEATHS


def final_error(outcome: Outcome, settings: Settings, retry_after: int, deaths: int = 1) -> ServeError:
    """What the client is told when the request cannot be repeated."""
    match outcome:
        case Outcome.LOST if deaths >= MAX_DEATHS:
            return errors.lost_twice()
        case Outcome.BROKEN if deaths >= MAX_DEATHS:
            return errors.stream_broken("two replicas went away.")
        case Outcome.REFUSED | Outcome.UNREACHED | Outcome.UNKNOWN:
            return errors.unreachable()
        case Outcome.BUSY:
            return errors.replicas_busy(retry_after)
        case Outcome.LOST:
            return errors.lost()
        case Outcome.SILENT:
            return errors.first_byte_timeout(settings.first_byte_timeout)
        case Outcome.AWAY:
            return errors.not_awake(retry_after, f"after {settings.start_wait:g} s, start_wait")
        case Outcome.STALLED:
            return errors.stream_broken(f"the replica was silent for {settings.idle_timeout:g} s (idle_timeout).")
        case Outcome.STUCK:
            longest = max(settings.first_byte_timeout, settings.idle_timeout)
            return errors.stream_broken(f"nothing more came for {longest:g} s (first_byte_timeout).")
        case Outcome.BROKEN:
            return errors.stream_broken("the replica went away.")
        case _:
            return errors.bad_answer()
