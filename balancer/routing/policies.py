"""Which replica: a pure choice among the members that have room."""

from collections.abc import Callable, Sequence
from typing import Protocol

from balancer.fleet.member import Member


class Policy(Protocol):
    """A selection rule. `reads_body` tells whether it looks into requests; if not, nobody parses them."""

    name: str
    reads_body: bool

    def choose(self, members: Sequence[Member], path: str, body: Sequence[bytes]) -> tuple[Member, str]:
        """One of `members` (never empty) and the reason, in a word or two."""

    def forget(self, member: Member) -> None:
        """The member left; nothing may be remembered of it."""


class RoundRobin:
    """Whoever was chosen longest ago; a member that just joined comes first."""

    name = "round_robin"
    reads_body = False

    def choose(self, members: Sequence[Member], path: str, body: Sequence[bytes]) -> tuple[Member, str]:
        return min(members, key=_turn), "in turn"

    def forget(self, member: Member) -> None:
        """Nothing is remembered here."""


class LeastLoad:
    """Whoever has the smallest part of its limit in flight; ties go in turn."""

    name = "least_load"
    reads_body = False

    def choose(self, members: Sequence[Member], path: str, body: Sequence[bytes]) -> tuple[Member, str]:
        return min(members, key=_load), "least load"

    def forget(self, member: Member) -> None:
        """Nothing is remembered here."""


def _turn(member: Member) -> int:
    return member.turn


def _load(member: Member) -> tuple[float, int]:
    return member.in_flight / member.limit, member.turn


def policy_named(name: str) -> Policy:
    """The policy of that name; raises KeyError for another."""
    policies: dict[str, Callable[[], Policy]] = {"round_robin": RoundRobin, "least_load": LeastLoad}
    return policies[name]()
