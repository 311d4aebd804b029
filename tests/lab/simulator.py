"""The shipped fleet, admission and policies before replica models, in virtual time."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from balancer.contract.listing import ReplicaListing
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import PrefixAware
from balancer.spec.settings import ReadinessProbe, Settings
from tests.bench.stats import quantile
from tests.lab.baselines import BoundedHashing, CacheAware, Oracle
from tests.lab.model import ModelSettings, QueueFull, ReplicaModel, TooLong
from tests.lab.request import Request
from tests.lab.virtual import VirtualReplicas
from tests.lab.workloads import Conversation, Turn

# Between two looks at the replicas' own queues, where requests are held back; virtual seconds.
LOOK = 0.02

ModelOf = Callable[[Member], ReplicaModel]
POLICIES: dict[str, Callable[[ModelOf], Policy]] = {
    "prefix_aware": lambda _: PrefixAware(),
    "least_load": lambda _: LeastLoad(),
    "round_robin": lambda _: RoundRobin(),
    "cache_aware": lambda _: CacheAware(),
    "bounded_hashing": lambda _: BoundedHashing(),
    "oracle": Oracle,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one run gave. Times are virtual, in seconds; only `choice_us` is of this machine."""

    requests: int
    errors: int
    seconds: float
    goodput: float  # answered requests a second
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    cached: float  # share of the prompts' tokens that were in a cache
    spread: float  # requests of the busiest member to those of the mean one
    largest: float  # share of all requests that the busiest member got
    choice_us: float  # CPU time of a choice, the median


def fleet_before(models: Sequence[ReplicaModel], clock: Callable[[], float], max_pending: int | None = None) -> Fleet:
    """A fleet of READY members, as the prober would leave them: each knows its KV pool and its limit."""
    fleet = Fleet(Settings(max_pending=max_pending), ReadinessProbe(), clock)
    fleet.reconcile([ReplicaListing(f"r{n}", f"http://127.0.0.1:{9000 + n}") for n in range(len(models))])
    for member, model in zip(fleet.members.values(), models, strict=True):
        member.ready.passed(clock())
        member.service.passed(clock())
        member.has_passed = True
        member.limit = model.settings.max_running_requests
        member.capacity_tokens = model.settings.max_total_tokens
    fleet.changed()
    return fleet


class Simulation:
    """One workload through one policy. As many requests as `at_once` are under way, as long as there are any.

    With `max_pending` requests are held back as in the balancer, by what each replica says of its queue at that moment.
    """

    def __init__(self, policy: str, settings: ModelSettings, replicas: int, max_pending: int | None = None) -> None:
        models = [ReplicaModel(settings) for _ in range(replicas)]
        self.replicas = VirtualReplicas(models)
        self.fleet = fleet_before(models, lambda: self.replicas.now, max_pending)
        self.index = {member: index for index, member in enumerate(self.fleet.members.values())}
        self.policy = POLICIES[policy](lambda member: models[self.index[member]])
        self.admission = Admission(self.fleet, self.policy)
        self.choice_times: list[int] = []
        self.errors = 0
        self._held_back = max_pending is not None
        self._ready: deque[tuple[Turn, Conversation]] = deque()  # a turn, and those after it
        self._waiting: deque[tuple[float, Turn, Conversation]] = deque()  # at the balancer, since when
        self._flying: dict[Request, tuple[float, Claim[Choice], Turn, Conversation]] = {}
        self._computing: list[Request] = []  # of those, the ones whose first token was not seen yet
        self._waits: list[float] = []

    def run(self, conversations: Sequence[Conversation], at_once: int) -> Result:
        self._ready.extend((turns[0], turns[1:]) for turns in conversations)
        done: list[Request] = []
        self._ask(at_once)
        for _, request in self._events(at_once):
            sent_at, claim, turn, later = self._flying.pop(request)
            claim.begun()
            claim.__exit__(None, None, None)
            self.policy.answered(claim.choice, turn, request.prompt_tokens, request.cached_tokens)
            assert request.first_token_at is not None
            self._waits.append(request.first_token_at - sent_at)
            done.append(request)
            if later:
                self._ready.append((later[0], later[1:]))
            self._ask(at_once)
        return self._result(done)

    def _events(self, at_once: int) -> Iterator[tuple[int, Request]]:
        """What ends, one after the other; where requests are held back the replicas are looked at in between."""
        if not self._held_back:
            yield from self.replicas.run()
        while self._flying or self._waiting:
            yield from self.replicas.run(self.replicas.now + LOOK)
            self._ask(at_once)

    def _see_first_tokens(self) -> None:
        """As the relay sees them: a prompt is computed when its answer begins."""
        computing, self._computing = self._computing, []
        for request in computing:
            if request.first_token_at is None or request.first_token_at > self.replicas.now:
                self._computing.append(request)
            elif request in self._flying:
                self._flying[request][1].begun()

    def _ask(self, at_once: int) -> None:
        self._see_first_tokens()
        while self._ready and len(self._flying) + len(self._waiting) < at_once:
            self._waiting.append((self.replicas.now, *self._ready.popleft()))
        while self._waiting:
            if self._held_back:
                for member, index in self.index.items():
                    self.fleet.reported(member, len(self.replicas.models[index].waiting))
            sent_at, turn, later = self._waiting[0]
            turn.blocks  # noqa: B018  cutting a prompt into blocks is not part of the choice
            began = time.perf_counter_ns()
            claim = self.admission.claim_now(Waiter(turn, True))
            self.choice_times.append(time.perf_counter_ns() - began)
            if claim is None:
                return  # all are full: it waits at the balancer
            self._waiting.popleft()
            request = Request(turn.tokens, turn.answer_tokens, turn.answer)
            try:
                self.replicas.submit(self.index[claim.member], request)
            except (QueueFull, TooLong):
                claim.__exit__(None, None, None)
                self.errors += 1
            else:
                self._flying[request] = sent_at, claim, turn, later
                self._computing.append(request)

    def _result(self, done: Sequence[Request]) -> Result:
        waits = sorted(self._waits)
        got = [model.requests_total for model in self.replicas.models]
        seconds = self.replicas.now
        return Result(
            requests=len(done),
            errors=self.errors,
            seconds=seconds,
            goodput=len(done) / seconds,
            ttft_mean=sum(waits) / len(waits),
            ttft_p50=quantile(waits, 0.5),
            ttft_p99=quantile(waits, 0.99),
            cached=sum(r.cached_tokens for r in done) / sum(r.prompt_tokens for r in done),
            spread=max(got) * len(got) / sum(got),
            largest=max(got) / sum(got),
            choice_us=sorted(self.choice_times)[len(self.choice_times) // 2] / 1000,
        )
