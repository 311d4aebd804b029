"""Which replica: a choice among the members that have room."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from balancer.fleet.member import Member
from balancer.routing.prefix_index import Coming
from balancer.routing.prompt import Prompt


class Choice:
    """A member, why it was chosen, and which share of the prompt (0 to 1) it has probably cached; None: not known.

    `computing`: blocks that it has to compute before the answer begins; 0 if nobody sees the answer begin. The claim
    tells `coming` whether the answer begins.
    """

    __slots__ = ("coming", "computing", "matched", "member", "reason")

    def __init__(
        self,
        member: Member,
        reason: str,
        matched: float | None = None,
        computing: int = 0,
        coming: Coming | None = None,
    ) -> None:
        self.member = member
        self.reason = reason
        self.matched = matched
        self.computing = computing
        self.coming = coming

    def begun(self) -> None:
        if self.coming is not None:
            self.coming.begun()

    def over(self) -> None:
        if self.coming is not None:
            self.coming.over()


class Policy(Protocol):
    """A selection rule. It sees only members with room, and its memory is bounded."""

    name: str
    reads_prompts: bool  # does a choice depend on the prompt's blocks?

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        """One of `members`, which is never empty. The request does go there, so the policy may take note of it."""

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        """What the answer said about its prompt; `cached_tokens` is None if the replica does not report it."""

    def forget(self, member: Member) -> None:
        """The member left, restarted or flushed its cache."""


class _Forgetful:
    """A policy that remembers nothing."""

    reads_prompts = False

    def answered(self, choice: Choice, prompt: Prompt, prompt_tokens: int, cached_tokens: int | None) -> None:
        pass

    def forget(self, member: Member) -> None:
        pass


class RoundRobin(_Forgetful):
    """The member that was chosen longest ago; a member that just joined comes first."""

    name = "round_robin"

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        return Choice(min(members, key=turn), "in turn")


class LeastLoad(_Forgetful):
    """The member with the smallest part of its limit in flight; ties go in turn."""

    name = "least_load"

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        return Choice(min(members, key=_load), "least load")


class InstanceAwareLeastLoad(_Forgetful):
    """SkyServe's rule for mixed GPUs: load relative to the requests a second that a GPU of that type should get.

    `target_qps` is by GPU type, as in `target_qps_per_replica`; a type that it does not name gets its smallest value.
    """

    name = "instance_aware_least_load"

    def __init__(self, target_qps: Mapping[str, float]) -> None:
        self._target_qps = {gpu.upper(): max(qps, 1e-9) for gpu, qps in target_qps.items()}
        self._least = min(self._target_qps.values(), default=1.0)

    def choose(self, members: Sequence[Member], prompt: Prompt) -> Choice:
        return Choice(min(members, key=self._relative_load), "least load for its GPU")

    def _relative_load(self, member: Member) -> tuple[float, int]:
        count, _, gpu = member.listing.resources.upper().partition("X ")
        # As in SkyServe, "H100", or "H100:2" for a replica with two of them.
        target = self._target_qps.get(f"{gpu}:{count}") or self._target_qps.get(gpu, self._least)
        return member.load / target, member.turn


def turn(member: Member) -> int:
    """When it was last chosen: the smallest value is the longest ago."""
    return member.turn


def _load(member: Member) -> tuple[float, int]:
    return member.load / member.limit, member.turn
