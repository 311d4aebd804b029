"""The shipped fleet, admission and policies in front of replica models, in virtual time."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from balancer.contract.listing import ReplicaListing
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import PrefixAware
from balancer.spec.settings import ReadinessProbe, Settings
from tests.bench.stats import quantile
from tests.lab.baselines import BoundedHashing, CacheAware, LlmD, ModelsOf, Oracle, Smg
from tests.lab.earlier import prefix_aware
from tests.lab.model import ModelSettings, QueueFull, ReplicaModel, TooLong
from tests.lab.request import Request
from tests.lab.virtual import VirtualReplicas
from tests.lab.workloads import Conversation, Turn

# Virtual seconds between reports of the replicas' own queues, if requests are held back.
LOOK = 0.02

POLICIES: dict[str, Callable[[ModelsOf], Policy]] = {
    "prefix_aware": lambda _: PrefixAware(),
    "least_load": lambda _: LeastLoad(),
    "round_robin": lambda _: RoundRobin(),
    "cache_aware": lambda _: CacheAware(),
    "bounded_hashing": lambda _: BoundedHashing(),
    "smg": Smg,
    "llm-d": LlmD,
    "oracle": Oracle,
}


def policy_named(name: str, models_of: ModelsOf) -> Policy:
    """One of POLICIES, or `prefix_aware@COMMIT`: as it was then. Raises ValueError."""
    kind, _, commit = name.partition("@")
    if commit and kind == PrefixAware.name:
        return prefix_aware(commit)()
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}: choose from {', '.join(POLICIES)}, or prefix_aware@COMMIT")
    return POLICIES[name](models_of)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run. Times are virtual, in seconds; only `choice_us` is real time, on this machine."""

    requests: int
    errors: int
    seconds: float
    goodput: float  # answered requests a second
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    cached: float  # share of the prompts' tokens that were in a cache
    spread: float  # requests of the busiest member, divided by the mean
    largest: float  # share of all requests that the busiest member got
    choice_us: float  # median time of a choice


def fleet_before(
    models: Sequence[ReplicaModel], clock: Callable[[], float], max_pending: int | None = None, ranks: int = 1
) -> Fleet:
    """A fleet of READY members, as the prober would leave them: their KV pools and limits are known.

    Each member has `ranks` of the models.
    """
    fleet = Fleet(Settings(max_pending=max_pending), ReadinessProbe(), clock)
    fleet.reconcile([ReplicaListing(f"r{n}", f"http://127.0.0.1:{9000 + n}") for n in range(len(models) // ranks)])
    for member, model in zip(fleet.members.values(), models[::ranks], strict=True):
        member.ready.passed(clock())
        member.service.passed(clock())
        member.has_passed = True
        member.ranks = ranks
        member.limit = model.settings.max_running_requests * ranks
        member.capacity_tokens = model.settings.max_total_tokens * ranks
    fleet.changed()
    return fleet


class Simulation:
    """One workload with one policy. `at_once` requests are under way, as long as there are that many.

    With `max_pending`, requests are held back as in the balancer, by what each replica reports of its queue at that
    moment. A replica with several data-parallel ranks gives them requests in turn, as SGLang's controller does.
    """

    def __init__(
        self, policy: str, settings: ModelSettings, replicas: int, max_pending: int | None = None, ranks: int = 1
    ) -> None:
        models = [ReplicaModel(settings) for _ in range(replicas * ranks)]
        self.replicas = VirtualReplicas(models)
        self.ranks = ranks
        self.fleet = fleet_before(models, lambda: self.replicas.now, max_pending, ranks)
        self.first_rank = {member: ranks * number for number, member in enumerate(self.fleet.members.values())}
        self.policy = policy_named(policy, self.models_of)
        self.admission = Admission(self.fleet, self.policy)
        self.choice_times: list[int] = []
        self.errors = 0
        self._held_back = max_pending is not None
        self._coming: Iterator[tuple[float, Conversation]] = iter(())  # with the time at which each may begin
        self._next: tuple[float, Conversation] | None = None  # the first of those
        self._ready: deque[tuple[Turn, Conversation]] = deque()  # a turn, and those after it
        self._waiting: deque[tuple[float, Turn, Conversation]] = deque()  # at the balancer, with the time since when
        self._flying: dict[Request, tuple[float, Claim[Choice], Turn, Conversation]] = {}
        self._computing: list[Request] = []  # those of them whose first token has not been seen yet
        self._waits: list[float] = []

    def models_of(self, member: Member) -> Sequence[ReplicaModel]:
        first = self.first_rank[member]
        return self.replicas.models[first : first + self.ranks]

    def run(
        self,
        conversations: Iterable[Conversation],
        at_once: int,
        arrivals: Iterable[float] | None = None,
        before: Iterable[Conversation] = (),
    ) -> Result:
        """Plays `conversations`, each from its time in `arrivals` on; without `arrivals` all may begin at once.

        The conversations `before` them fill the pools and are not counted.
        """
        for _ in self._play(before, at_once, repeat(0.0)):
            pass
        began = self.replicas.now
        got = [model.requests_total for model in self.replicas.models]
        self._waits.clear()
        self.choice_times.clear()
        self.errors = 0
        times = (began + at for at in arrivals) if arrivals is not None else repeat(0.0)
        done = list(self._play(conversations, at_once, times))
        return self._result(done, began, got)

    def _play(
        self, conversations: Iterable[Conversation], at_once: int, arrivals: Iterable[float]
    ) -> Iterator[tuple[int, int]]:
        """Yields, for each answered prompt, its number of tokens and how many of them were cached."""
        self._coming = zip(arrivals, conversations, strict=False)
        self._next = next(self._coming, None)
        self._ask(at_once)
        for _, request in self._events(at_once):
            sent_at, claim, turn, later = self._flying.pop(request)
            claim.begun()
            claim.__exit__(None, None, None)
            self.policy.answered(claim.choice, turn, request.prompt_tokens, request.cached_tokens)
            assert request.first_token_at is not None
            self._waits.append(request.first_token_at - sent_at)
            yield request.prompt_tokens, request.cached_tokens
            if later:
                self._ready.append((later[0], later[1:]))
            self._ask(at_once)

    def _events(self, at_once: int) -> Iterator[tuple[int, Request]]:
        """Yields requests as they end; time passes until the next arrival or report of the replicas' queues."""
        while self._flying or self._waiting or self._next:
            until = self._next[0] if self._next and self._next[0] > self.replicas.now else math.inf
            if self._held_back:
                until = min(until, self.replicas.now + LOOK)
            yield from self.replicas.run(until)
            self._ask(at_once)

    def _see_first_tokens(self) -> None:
        """Reports first tokens as the relay does: a prompt is computed when its answer begins."""
        computing, self._computing = self._computing, []
        for request in computing:
            if request.first_token_at is None or request.first_token_at > self.replicas.now:
                self._computing.append(request)
            elif request in self._flying:
                self._flying[request][1].begun()

    def _ask(self, at_once: int) -> None:
        self._see_first_tokens()
        self._let_in(at_once)
        while self._waiting:
            if self._held_back:
                for member in self.first_rank:
                    self.fleet.note_queue(member, sum(len(model.waiting) for model in self.models_of(member)))
            sent_at, turn, later = self._waiting[0]
            turn.blocks  # noqa: B018  cutting a prompt into blocks is not part of the choice
            began = time.perf_counter_ns()
            claim = self.admission.claim_now(Waiter(turn, True))
            self.choice_times.append(time.perf_counter_ns() - began)
            if claim is None:
                return  # all members are full: it waits at the balancer
            self._waiting.popleft()
            request = Request(turn.tokens, turn.answer_tokens, turn.answer)
            rank = claim.member.requests_total % self.ranks
            try:
                self.replicas.submit(self.first_rank[claim.member] + rank, request)
            except (QueueFull, TooLong):
                claim.__exit__(None, None, None)
                self.errors += 1
            else:
                self._flying[request] = sent_at, claim, turn, later
                self._computing.append(request)

    def _let_in(self, at_once: int) -> None:
        """Lets in new conversations whose time has come, then the next turns of others, up to `at_once`."""
        now = self.replicas.now
        while len(self._flying) + len(self._waiting) < at_once:
            if self._next and self._next[0] <= now:
                turns = self._next[1]
                self._waiting.append((now, turns[0], turns[1:]))
                self._next = next(self._coming, None)
            elif self._ready:
                self._waiting.append((now, *self._ready.popleft()))
            else:
                return

    def _result(self, done: Sequence[tuple[int, int]], began: float, got_before: Sequence[int]) -> Result:
        waits = sorted(self._waits)
        of_ranks = [model.requests_total - n for model, n in zip(self.replicas.models, got_before, strict=True)]
        got = [sum(of_ranks[first : first + self.ranks]) for first in range(0, len(of_ranks), self.ranks)]
        seconds = self.replicas.now - began
        return Result(
            requests=len(done),
            errors=self.errors,
            seconds=seconds,
            goodput=len(done) / seconds,
            ttft_mean=sum(waits) / len(waits),
            ttft_p50=quantile(waits, 0.5),
            ttft_p99=quantile(waits, 0.99),
            cached=sum(cached for _, cached in done) / sum(tokens for tokens, _ in done),
            spread=max(got) * len(got) / sum(got),
            largest=max(got) / sum(got),
            choice_us=sorted(self.choice_times)[len(self.choice_times) // 2] / 1000,
        )
