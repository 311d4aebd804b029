"""The policies: pure choices among members with room."""

from collections import Counter

import orjson
import pytest

from balancer.contract.listing import ReplicaListing
from balancer.fleet.claim import Claim
from balancer.fleet.member import Member
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice, InstanceAwareLeastLoad, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import FLUSHED_AFTER, PrefixAware
from balancer.routing.prompt import BLOCK_BYTES, Prompt
from tests.support.fleets import fleet_of, make_ready

NO_PROMPT = Prompt("/v1/models", [])


def chat(system: str, question: str = "", stream: bool = False) -> Prompt:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return Prompt("/v1/chat/completions", [orjson.dumps({"model": "m", "stream": stream, "messages": messages})])


def place(admission: Admission, prompt: Prompt, tried: list[Member] | None = None) -> Claim[Choice]:
    claim = admission.claim_now(Waiter(prompt, True, tried or []))
    assert claim is not None
    return claim


def finish(claim: Claim[Choice]) -> None:
    """It is answered whole."""
    claim.begun()
    claim.__exit__(None, None, None)


def leave(claim: Claim[Choice]) -> None:
    """The client leaves before the answer begins."""
    claim.__exit__(None, None, None)


def counts(admission: Admission, prompts: list[Prompt]) -> Counter[str]:
    """Where each prompt goes when every request is over before the next comes."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        claim = place(admission, prompt)
        seen[claim.member.name] += 1
        finish(claim)
    return seen


def system(number: int, size: int = 4_000) -> str:
    return (f"You are clerk number {number}. " * (size // 20))[:size]


@pytest.mark.parametrize("policy", [RoundRobin, LeastLoad, PrefixAware])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_without_a_prompt_to_go_by_idle_members_take_turns(policy: type[Policy], size: int) -> None:
    admission = Admission(fleet_of(size), policy())
    assert set(counts(admission, [NO_PROMPT] * size * 4).values()) == {4}


@pytest.mark.parametrize("policy", [RoundRobin, LeastLoad, PrefixAware])
def test_a_member_that_joins_gets_work_at_once(policy: type[Policy]) -> None:
    fleet = fleet_of(2)
    admission = Admission(fleet, policy())
    counts(admission, [chat(system(n)) for n in range(10)])
    fleet.reconcile(
        [member.listing for member in fleet.members.values()] + [ReplicaListing("new", "http://127.0.0.1:9100")]
    )
    make_ready(fleet, fleet.members[3])
    assert place(admission, chat(system(99))).member.name == "new"


def test_round_robin_after_a_failed_attempt() -> None:
    """Round robin continues in turn when a member has been tried already."""
    fleet = fleet_of(3)
    admission = Admission(fleet, RoundRobin())
    first = place(admission, NO_PROMPT).member
    second = place(admission, NO_PROMPT, tried=[first]).member
    third = place(admission, NO_PROMPT, tried=[first, second]).member
    assert len({first, second, third}) == 3


def test_least_load_is_relative_to_each_members_limit() -> None:
    fleet = fleet_of(2)
    small, large = fleet.members.values()
    small.limit, large.limit = 8, 32
    admission = Admission(fleet, LeastLoad())
    seen = Counter(place(admission, NO_PROMPT).member.name for _ in range(20))
    assert seen == {small.name: 4, large.name: 16}


@pytest.mark.parametrize(
    ("targets", "large"), [({"L4": 1, "H100": 4}, "1x H100"), ({"L4": 1, "h100:2": 4, "H100": 1}, "2x H100")]
)
def test_instance_aware_least_load_knows_what_each_gpu_is_worth(targets: dict[str, float], large: str) -> None:
    fleet = fleet_of(0)
    fleet.reconcile(
        [
            ReplicaListing("l4", "http://127.0.0.1:1", resources="1x L4"),
            ReplicaListing("h100", "http://127.0.0.1:2", resources=large),
        ]
    )
    for member in fleet.members.values():
        make_ready(fleet, member)
    admission = Admission(fleet, InstanceAwareLeastLoad(targets))
    seen = Counter(place(admission, NO_PROMPT).member.name for _ in range(20))
    assert seen == {"l4": 4, "h100": 16}


def test_groups_stay_together() -> None:
    """Groups that share a prefix stay together and are spread evenly."""
    admission = Admission(fleet_of(2), PrefixAware())
    homes: dict[int, set[str]] = {}
    for turn in range(5):
        for group in range(8):
            claim = place(admission, chat(system(group), f"Question {turn}?"))
            homes.setdefault(group, set()).add(claim.member.name)
            finish(claim)
    assert all(len(names) == 1 for names in homes.values())
    assert Counter(name for names in homes.values() for name in names) == {"r1": 4, "r2": 4}


def test_common_system_prompt() -> None:
    """One system prompt for all requests does not pile them up on one member.

    60 % of each prompt is shared by all, 32 requests are in flight on two members.
    """
    admission = Admission(fleet_of(2, capacity_tokens=200_000), PrefixAware())
    seen: Counter[str] = Counter()
    flying: list[Claim[Choice]] = []
    for number in range(320):
        if len(flying) == 32:
            finish(flying.pop(0))
        flying.append(place(admission, chat(system(0, 3_000), system(number + 1, 2_000))))
        seen[flying[-1].member.name] += 1
    assert max(seen.values()) <= 0.6 * 320


def test_one_hot_prefix_is_shared_out_when_its_member_is_loaded() -> None:
    admission = Admission(fleet_of(4), PrefixAware())
    seen = Counter(place(admission, chat(system(0), f"{n}?")).member.name for n in range(40))
    assert len(seen) == 4
    assert max(seen.values()) <= 16


def test_next_best_by_prefix() -> None:
    """If the best member is full, the next best by prefix is taken."""
    fleet = fleet_of(3)
    policy = PrefixAware()
    admission = Admission(fleet, policy)
    one, two, three = fleet.members.values()
    prompt = chat(system(0), "A question. " * 200)
    policy.index.add(two, prompt.blocks)
    policy.index.add(three, prompt.blocks[: len(prompt.blocks) // 2])
    assert policy.choose([one, two, three], prompt).member is two
    two.limit, two.generating = 1, 1
    policy.index.forget(one)
    assert place(admission, prompt).member is three


def test_members_of_different_sizes_get_shares_of_their_size() -> None:
    fleet = fleet_of(2, capacity_tokens=400_000)
    small, large = fleet.members.values()
    small.limit, large.limit = 16, 64
    admission = Admission(fleet, PrefixAware())
    seen = Counter(place(admission, chat(system(n))).member.name for n in range(60))
    assert 9 <= seen[small.name] <= 15


def test_a_conversation_stays_where_its_cache_is() -> None:
    admission = Admission(fleet_of(3), PrefixAware())
    homes = set()
    said = ""
    for turn in range(6):
        said += f"Turn {turn}: " + "something was said. " * 30
        claim = place(admission, chat(said))
        homes.add(claim.member.name)
        finish(claim)
        finish(place(admission, chat(system(turn))))
    assert len(homes) == 1


def test_answers_that_reused_nothing_make_it_forget_the_member() -> None:
    policy = PrefixAware()
    fleet = fleet_of(2)
    one, two = fleet.members.values()
    prompt, other = chat(system(1)), chat(system(2))
    policy.index.add(one, prompt.blocks)
    policy.index.add(one, other.blocks)
    for _ in range(FLUSHED_AFTER):
        assert [member for member, _ in policy.index.matched(other.blocks)] == [one]
        choice = policy.choose([one, two], prompt)
        assert choice.member is one
        assert choice.matched == 1.0
        policy.answered(choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    assert [member for member, _ in policy.index.matched(other.blocks)] == []
    assert [member for member, _ in policy.index.matched(prompt.blocks)] == [one]


def test_misses_with_a_hit_between_them_are_no_flush() -> None:
    """Requests of one prefix that are prefilled together all miss, and prefixes are evicted."""
    policy = PrefixAware()
    (one,) = fleet_of(1).members.values()
    prompt = chat(system(1))
    policy.index.add(one, prompt.blocks)
    for number in range(4 * FLUSHED_AFTER):
        choice = policy.choose([one], prompt)
        assert choice.matched == 1.0
        policy.answered(choice, prompt, prompt_tokens=1_000, cached_tokens=0 if number % FLUSHED_AFTER else 900)


def fill(policy: PrefixAware, member: Member) -> None:
    """Its KV pool holds other prompts up to the brim."""
    while policy.index.occupancy.get(member, 0.0) < 1:
        policy.index.add(member, chat(f"{member.name} {len(policy.index)}: {system(99)}").blocks)


@pytest.mark.parametrize(("here", "there", "is_full", "stays"), [
    (17, 15, False, True),
    (22, 10, True, True),
    (31, 1, False, False),
    (31, 1, True, True),
    (64, 0, True, False),
])  # fmt: skip
def test_prefix_leaves_its_member(here: int, there: int, is_full: bool, stays: bool) -> None:
    """A prefix leaves its member because of load, and hardly ever for a member whose pool is full."""
    policy = PrefixAware()
    one, two = fleet_of(2).members.values()
    if is_full:
        fill(policy, one)
        fill(policy, two)
    prompt = chat(system(1))
    policy.index.add(one, prompt.blocks)
    one.in_flight, two.in_flight = here, there
    assert (policy.choose([one, two], prompt).member is one) == stays


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_prompt_that_all_share_is_shared_out_in_full_pools_too(size: int) -> None:
    """An application's system prompt changed: everybody asks with the new one, and nobody comes back for the old."""
    admission = Admission(fleet_of(size, capacity_tokens=100 * BLOCK_BYTES // 4), PrefixAware())
    for number in range(size * 20):
        finish(place(admission, chat(system(number, 10_000))))
    assert all(share == 1.0 for share in admission.policy.index.occupancy.values())
    claims = [place(admission, chat(system(-1, 20_000), f"question {number}")) for number in range(64 * size)]
    loads = Counter(claim.member.name for claim in claims)
    assert len(loads) == size
    assert max(loads.values()) <= 1.3 * 64


def test_equal_matches() -> None:
    """Of two members with equal matches, the one that computes less for others gets the request."""
    fleet = fleet_of(2)
    policy = PrefixAware()
    admission = Admission(fleet, policy)
    one, two = fleet.members.values()
    prompt = chat(system(1))
    for member in (one, two):
        policy.index.add(member, prompt.blocks)
    long = place(admission, chat(system(2, 20_000), stream=True))
    other = {one: two, two: one}[long.member]
    assert [place(admission, prompt).member for _ in range(4)] == [other] * 4
    long.begun()  # it has computed that prompt, so what counts is in flight again
    assert (one.computing, two.computing) == (0, 0)
    assert place(admission, prompt).member is long.member


def test_samples_of_one_prompt() -> None:
    """Samples of one prompt that are prefilled together make a member forget nothing.

    None of them finds it cached, for none had been computed when they came.
    """
    policy = PrefixAware()
    admission = Admission(fleet_of(1), policy)
    for number in range(5):
        finish(place(admission, chat(system(number))))
    known = len(policy.index)
    prompt = chat(system(99))
    claims = [place(admission, prompt) for _ in range(3 * FLUSHED_AFTER)]
    assert [claim.choice.matched for claim in claims] == [0.0] + [1.0] * (3 * FLUSHED_AFTER - 1)
    for claim in claims:
        finish(claim)
        policy.answered(claim.choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    assert len(policy.index) == known + len(prompt.blocks)


def test_only_computed_matches_are_judged() -> None:
    """Only the part of a match that had been computed before is judged."""
    policy = PrefixAware()
    admission = Admission(fleet_of(1, capacity_tokens=200_000), policy)
    finish(place(admission, chat(system(1))))
    longer = system(1) + system(2, 60_000)
    claims = [place(admission, chat(longer, f"{n}")) for n in range(2 * FLUSHED_AFTER)]
    known = len(policy.index)
    for claim in claims:
        finish(claim)
        # The system prompt was cached, a sixteenth of it all; the rest was under way for all of them.
        policy.answered(claim.choice, chat(longer), prompt_tokens=16_000, cached_tokens=1_000)
    assert len(policy.index) >= known
    assert policy._doubts == {}


def test_flushed_cache_is_noticed() -> None:
    """A flushed cache is noticed from requests that come after an answer has begun."""
    policy = PrefixAware()
    admission = Admission(fleet_of(1), policy)
    prompts = [chat(system(number)) for number in range(4)]
    for prompt in prompts:
        finish(place(admission, prompt))
    for number in range(FLUSHED_AFTER):
        prompt = prompts[number % 2]
        claim = place(admission, prompt)
        finish(claim)
        policy.answered(claim.choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    assert policy.index.matched(prompts[2].blocks) == policy.index.matched(prompts[3].blocks) == []


def test_requests_whose_clients_left_at_once_push_out_nothing() -> None:
    policy = PrefixAware()
    admission = Admission(fleet_of(2, capacity_tokens=8_000), policy)
    hot = [chat(system(number)) for number in range(8)]
    homes = {number: place(admission, prompt) for number, prompt in enumerate(hot)}
    for claim in homes.values():
        finish(claim)
    for number in range(100, 120):
        leave(place(admission, chat(system(number, 600_000))))
    for number, prompt in enumerate(hot):
        assert dict(policy.index.matched(prompt.blocks)) == {homes[number].member: len(prompt.blocks)}
    assert policy.index.matched(chat(system(100, 600_000)).blocks) == []


def test_equal_prompts_are_kept_together_before_the_first_answer() -> None:
    policy = PrefixAware()
    admission = Admission(fleet_of(4, capacity_tokens=200_000), policy)
    prompt = chat(system(1, 40_000))
    for number in range(10):  # other work, so that nobody is idle
        place(admission, chat(system(number + 10, 2_000)))
    claims = [place(admission, prompt) for _ in range(6)]
    assert len({claim.member.name for claim in claims}) == 1
    for claim in claims[:5]:
        leave(claim)
    assert dict(policy.index.matched(prompt.blocks)) == {claims[0].member: len(prompt.blocks)}
    leave(claims[5])
    assert policy.index.matched(prompt.blocks) == []


def test_data_parallel_ranks() -> None:
    """In a replica with data-parallel ranks, one rank has a prefix, and any rank may get the request."""
    policy = PrefixAware()
    fleet = fleet_of(1, capacity_tokens=40_000)
    (member,) = fleet.members.values()
    admission = Admission(fleet, policy)
    member.ranks = 4
    prompt, other = chat(system(1)), chat(system(2))
    for each in (prompt, other):
        finish(place(admission, each))
    for number in range(4 * FLUSHED_AFTER):
        assert policy.index.matched(other.blocks) != [], f"after {number} misses, which chance explains"
        claim = place(admission, prompt)
        assert claim.choice.matched == 0.25
        finish(claim)
        policy.answered(claim.choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    assert policy.index.matched(other.blocks) == []


@pytest.mark.parametrize("stream", [True, False])
def test_computing_ends_with_the_answers_begin(stream: bool) -> None:
    """A member counts as computing a prompt until its answer begins or ends."""
    admission = Admission(fleet_of(1), PrefixAware())
    one = place(admission, chat(system(1), stream=stream))
    # An answer that is not streamed comes when all is done: when its prompt was is not seen.
    assert one.member.computing == (one.choice.computing if stream else 0)
    assert bool(one.member.computing) == stream
    two = place(admission, chat(system(2), stream=stream))
    one.begun()
    finish(one)
    assert one.member.computing == two.choice.computing
    finish(two)
    assert one.member.computing == 0


def test_conversation_stays() -> None:
    """A conversation stays with its member although another one has room in its pool.

    What is new in it must be computed anywhere; what is not new would be there twice.
    """
    policy = PrefixAware()
    one, two = fleet_of(2).members.values()
    fill(policy, one)
    said = system(1, 3_000)
    policy.index.add(one, chat(said).blocks)
    one.in_flight, two.in_flight = 5, 4
    assert policy.choose([one, two], chat(said + system(2, 1_500))).member is one


@pytest.mark.parametrize("size", [2, 8, 64])
def test_no_member_is_idle(size: int) -> None:
    """No member stays idle while the others share a hot prefix."""
    fleet = fleet_of(size)
    policy = PrefixAware()
    *busy, idle = fleet.members.values()
    prompt = chat(system(1))
    for member in busy:
        member.in_flight = 16
        policy.index.add(member, prompt.blocks)
    assert policy.choose([*busy, idle], prompt).member is idle


def test_capacity_is_learned_after_the_request() -> None:
    """The capacity is learned from answers even if the request is gone by then.

    The relay lets go of a body with the answer's last byte, before the policy hears of it.
    """
    policy = PrefixAware()
    (member,) = fleet_of(1, capacity_tokens=64_000).members.values()
    for number in range(100):
        prompt = chat(system(number, 6_000))
        choice = policy.choose([member], prompt)
        prompt.body.clear()
        policy.answered(choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    six_bytes_a_token = 64_000 * 6 / BLOCK_BYTES
    assert 0.93 * six_bytes_a_token <= policy.index.capacity(member) <= 1.07 * six_bytes_a_token


def test_a_member_that_left_is_forgotten() -> None:
    fleet = fleet_of(2)
    policy = PrefixAware()
    admission = Admission(fleet, policy)
    counts(admission, [chat(system(n)) for n in range(6)])
    assert len(policy.index) > 0
    fleet.reconcile([])
    assert len(policy.index) == 0


def test_what_a_member_answers_after_it_left_brings_it_not_back() -> None:
    """Nobody would forget it again."""
    fleet = fleet_of(2)
    policy = PrefixAware()
    admission = Admission(fleet, policy)
    prompt = chat(system(1))
    claims = [place(admission, prompt) for _ in range(FLUSHED_AFTER + 1)]
    fleet.reconcile([])
    for claim in claims:
        policy.answered(claim.choice, prompt, prompt_tokens=1_000, cached_tokens=0)
    assert len(policy.index) == 0
    assert policy._doubts == {}


def test_the_reason_and_the_matched_share_are_told() -> None:
    admission = Admission(fleet_of(2), PrefixAware())
    first = place(admission, chat(system(0)))
    assert (first.choice.reason, first.choice.matched) == ("room", 0.0)
    second = place(admission, chat(system(0)))
    assert (second.choice.reason, second.choice.matched) == ("prefix", 1.0)
