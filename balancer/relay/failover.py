"""What may be tried again after an attempt ended badly, and what the client is told when nothing is left: a table."""

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.outcome import Outcome
from balancer.relay.paths import WAITED_FOR
from balancer.routing.body import parsed
from balancer.spec.settings import Settings

SAFE_METHODS = (b"GET", b"HEAD")
MAX_DEATHS = 2  # attempts that a replica may have begun on, and that came to nothing: another is one too many
BUDGET_SHARE = 0.2
BUDGET_PER_SECOND = 3


class RetryBudget:
    """How many GETs and HEADs that a replica may have seen can go again: a fifth of the traffic, or three a second.

    The clock is passed in, in seconds. (The rule is Finagle's, which Envoy and Linkerd took over.) What generates does
    not ask here: a replica that dies loses all that it has at once, and each of that is sent once more at most.
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
# What a replica may have taken: it goes to another one if that does no harm, a GET or HEAD at the budget's cost.
PERHAPS_TAKEN = frozenset((Outcome.LOST,))
# What broke amid its answer: a stream may go on at another one.
BROKEN_OFF = frozenset((Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK))


def only_generates(path: str, body: list[bytes]) -> bool:
    """Has a POST there no effect but what it costs, however often it is done?"""
    if path not in WAITED_FOR:
        return False
    if path != "/v1/responses":
        return True
    # A replica keeps the answer for later ones to go on from unless it is told not to, and may use tools by itself.
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

    `only_generates`: done twice it has no effect but cost. `deaths` counts the attempts that came to nothing at a
    replica which may have begun on them.
    """
    if outcome in UNTAKEN:
        return True
    if outcome not in PERHAPS_TAKEN or deaths >= MAX_DEATHS:
        return False
    if method in SAFE_METHODS:
        return budget.withdraw(now)
    return only_generates and settings.retry_sent == "once"


def may_continue(outcome: Outcome, deaths: int, settings: Settings) -> bool:
    """May an answer that has begun go on at another replica?"""
    if outcome in UNTAKEN:  # by one that was to go on with it
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
        case Outcome.STALLED:
            return errors.stream_broken(f"the replica was silent for {settings.idle_timeout:g} s (idle_timeout).")
        case Outcome.STUCK:
            longest = max(settings.first_byte_timeout, settings.idle_timeout)
            return errors.stream_broken(f"nothing more came for {longest:g} s (first_byte_timeout).")
        case Outcome.BROKEN:
            return errors.stream_broken("the replica went away.")
        case _:
            return errors.bad_answer()
