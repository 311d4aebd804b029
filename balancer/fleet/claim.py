"""A place at one member, which a request holds while the member works on it."""

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from balancer.fleet.member import Member
from balancer.fleet.outliers import Trial
from balancer.fleet.tenancy import Tenancy

if TYPE_CHECKING:
    from balancer.fleet.fleet import Fleet


class Chosen(Protocol):
    """A policy's choice: a member, how many blocks it has to compute, and hooks for what happens later."""

    member: Member
    computing: int

    def begun(self) -> None:
        """The member has computed the prompt."""

    def over(self) -> None:
        """The place is given back."""


C = TypeVar("C", bound=Chosen)


class Claim(Generic[C]):
    """A place at one member, given back when the `with` block ends."""

    __slots__ = (
        "_computing",
        "_fleet",
        "_is_generating",
        "_is_pending",
        "_tenancy",
        "_was_awake",
        "choice",
        "member",
        "number",
        "trial",
        "when_over",
    )

    def __init__(self, fleet: "Fleet", choice: C, is_generating: bool, trial: Trial | None = None) -> None:
        self.choice = choice
        self.member = member = choice.member
        self.trial = trial  # the trial for which the member was chosen at random, if any
        self._is_generating = is_generating
        self._fleet = fleet
        self.when_over: Callable[[], None] | None = None  # called when the place is given back
        fleet.turns += 1
        self.number = member.turn = fleet.turns
        fleet.in_flight += 1
        fleet.generating += is_generating
        if not member.in_flight:
            member.busy_since = fleet.clock()
        member.in_flight += 1
        member.generating += is_generating
        member.requests_total += 1
        self._tenancy = member.tenancy
        if self._tenancy is not None:
            self._was_awake = self._awake(self._tenancy)
        self._is_pending = is_generating and fleet.settings.max_pending is not None
        member.pending += self._is_pending
        self._computing = choice.computing
        member.computing += self._computing

    def _awake(self, tenancy: Tenancy) -> float:
        now = self._fleet.clock()
        return now - tenancy.away(now)

    @property
    def is_pending(self) -> bool:
        """Does it count as a request whose answer the member has not begun?"""
        return self._is_pending

    def begun(self, is_computed: bool = True) -> None:
        """The member has begun to answer, so the next may be sent; `is_computed`: it has computed the prompt."""
        if is_computed:
            self.choice.begun()
            if self.member.said_full_to and self._is_generating and self.number > self.member.said_full_at:
                self.member.said_full_to = 0  # it accepts other requests, so it is not full
        self._go_on()

    def _go_on(self) -> None:
        self.member.computing -= self._computing
        self._computing = 0
        if self._is_pending:
            self._is_pending = False
            self.member.pending = max(0, self.member.pending - 1)
            self._fleet.room_made()

    def __enter__(self) -> Member:
        return self.member

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fleet.in_flight -= 1
        self._fleet.generating -= self._is_generating
        self.member.in_flight -= 1
        self.member.generating -= self._is_generating
        self.choice.over()
        if (tenancy := self._tenancy) is not None:
            tenancy.took(self._awake(tenancy) - self._was_awake, self._fleet.clock())
        was_pending = self._is_pending
        self._go_on()
        if self.trial is not None:
            self._fleet.outliers.given_back(self.trial)
        if self.when_over is not None:
            self.when_over()
        if not was_pending:
            self._fleet.room_made()
