import math
import random

import pytest

from tests.lab.model import ModelSettings, QueueFull, ReplicaModel, TooLong
from tests.lab.radix import TOKEN
from tests.lab.request import Request

SETTINGS = ModelSettings(
    prefill_rate=1000.0,
    step_overhead=0.0,
    itl_base=0.010,
    itl_per_request=0.001,
    max_total_tokens=10_000,
    max_running_requests=8,
    chunk_tokens=4096,
)


def tokens(count: int, name: str) -> bytes:
    """`count` tokens that are unique to this name; a longer run for a name begins with its shorter ones."""
    return random.Random(name).randbytes(count * TOKEN)


def settle(model: ReplicaModel) -> list[Request]:
    over = []
    while model.next_time() < math.inf:
        over += model.advance(model.next_time())
    return over


def check(model: ReplicaModel) -> None:
    """Checks what must hold between the model's steps."""
    cached = held = 0
    stack = [model.cache.root]
    while stack:
        node = stack.pop()
        cached += len(node.tokens) // TOKEN
        held += len(node.tokens) // TOKEN if node.holders and node is not model.cache.root else 0
        for key, child in node.children.items():
            assert child.parent is node
            assert child.tokens.startswith(key)
            assert child.holders <= node.holders or node is model.cache.root
        stack.extend(node.children.values())
    assert (cached, held) == (model.cache.cached, model.cache.held)
    assert 0 <= model.used_tokens <= model.settings.max_total_tokens
    assert model.free_tokens >= 0
    assert len(model.running) <= model.settings.max_running_requests
    if model.is_idle:
        assert (model.used_tokens, len(model.running), len(model.waiting)) == (0, 0, 0)


def test_lone_request() -> None:
    """A single request takes its prefill, and then one inter-token latency per further token."""
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(500, "a"), 11)
    model.submit(request, 1.0)
    assert settle(model) == [request]
    assert request.ttft == pytest.approx(0.5)
    assert request.finished_at == pytest.approx(1.0 + 0.5 + 10 * 0.011)
    check(model)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_itl_is_a_plus_b_times_the_batch(batch: int) -> None:
    model = ReplicaModel(SETTINGS)
    requests = [Request(tokens(10, f"r{number}"), 101) for number in range(batch)]
    for request in requests:
        model.submit(request, 0.0)
    settle(model)
    last = requests[-1]
    assert last.finished_at is not None
    assert last.first_token_at is not None
    assert last.finished_at - last.first_token_at == pytest.approx(100 * (0.010 + 0.001 * batch))


def test_single_tokens_come_one_itl_apart() -> None:
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(100, "a"), 4)
    model.submit(request, 0.0)
    times: list[float] = []
    while not model.is_idle:
        now = model.next_token_time()
        model.advance(now)
        assert model.made(request) == len(times) + 1
        times.append(now)
    assert times == pytest.approx([0.1, 0.111, 0.122, 0.133])


def test_running_requests_stand_still_during_a_prefill() -> None:
    model = ReplicaModel(SETTINGS)
    first, second = Request(tokens(100, "a"), 101), Request(tokens(2000, "b"), 2)
    model.submit(first, 0.0)
    model.advance(0.5)
    made = model.made(first)
    model.submit(second, 0.5)
    model.advance(2.4)
    assert made <= model.made(first) <= made + 1
    settle(model)
    assert second.ttft == pytest.approx(2.0, abs=0.012)
    assert first.finished_at == pytest.approx(0.1 + 100 * 0.011 + 2.0 + 0.001, abs=0.002)


def test_chunked_prefill() -> None:
    """A long prompt is computed in chunks while the next ones wait."""
    model = ReplicaModel(SETTINGS)
    long, short = Request(tokens(9000, "long"), 1), Request(tokens(10, "short"), 1)
    model.submit(long, 0.0)
    model.submit(short, 0.1)
    ends = []
    while not model.is_idle:
        ends.append(model.next_time())
        model.advance(ends[-1])
    assert ends == [pytest.approx(4.096), pytest.approx(8.192), pytest.approx(9.010)]
    assert long.first_token_at == short.first_token_at


def test_a_repeated_prompt_is_cached_but_for_its_last_token() -> None:
    model = ReplicaModel(SETTINGS)
    first, again = Request(tokens(799, "a"), 5), Request(tokens(799, "a"), 5)
    model.submit(first, 0.0)
    settle(model)
    model.submit(again, 10.0)
    settle(model)
    assert (first.cached_tokens, again.cached_tokens) == (0, 798)
    assert again.ttft == pytest.approx(0.001)
    assert (model.prompt_tokens_total, model.cached_tokens_total) == (1598, 798)


def test_another_question_reuses_the_shared_system_prompt() -> None:
    model = ReplicaModel(SETTINGS)
    for number in range(2):
        request = Request(tokens(787, "system") + tokens(12, f"question {number}"), 5)
        model.submit(request, number * 10.0)
        settle(model)
    assert request.cached_tokens == 787


def test_prefixes_are_reused_while_the_first_request_still_runs() -> None:
    model = ReplicaModel(SETTINGS)
    model.submit(Request(tokens(500, "a"), 1000), 0.0)
    model.advance(1.0)
    second = Request(tokens(500, "a") + tokens(5, "b"), 2)
    model.submit(second, 1.0)
    model.advance(2.0)
    assert second.cached_tokens == 500


def test_conversation_finds_its_answers() -> None:
    """A conversation finds its own earlier answers in the cache, except for their last token."""
    model = ReplicaModel(SETTINGS)
    question, answer = tokens(100, "question"), tokens(50, "answer")
    model.submit(Request(question, 50, answer), 0.0)
    settle(model)
    second = Request(question + answer + tokens(20, "more"), 1)
    model.submit(second, 10.0)
    settle(model)
    assert second.cached_tokens == 100 + 49


@pytest.mark.parametrize(("shared", "expected"), [(99, 96), (96, 96), (15, 0), (16, 16)])
def test_only_whole_pages_are_reused(shared: int, expected: int) -> None:
    model = ReplicaModel(ModelSettings(page_size=16))
    for number in range(2):
        request = Request(tokens(shared, "shared") + tokens(40, f"own {number}"), 3)
        model.submit(request, number * 10.0)
        settle(model)
        check(model)
    assert request.cached_tokens == expected


def test_an_image_is_reused_at_the_same_position_only() -> None:
    model = ReplicaModel(SETTINGS)
    image, other = tokens(1, "image") * 576, tokens(1, "other") * 576
    question, text = tokens(20, "question"), tokens(30, "text")
    cached = []
    for number, prompt in enumerate(
        [text + image + question, text + image + tokens(9, "else"), text + other + question, image + text + question]
    ):
        request = Request(prompt, 1)
        model.submit(request, number * 10.0)
        settle(model)
        cached.append(request.cached_tokens)
    assert cached == [0, 30 + 576, 30, 0]


def test_the_least_recently_used_prefix_goes_first() -> None:
    model = ReplicaModel(SETTINGS)  # a pool of 10,000
    cached = {}
    for number, name in enumerate(["a", "b", "c", "a", "d", "a", "b"]):
        request = Request(tokens(3000, name), 1)
        model.submit(request, number * 10.0)
        settle(model)
        check(model)
        cached[number, name] = request.cached_tokens
    # d evicted b, because a was used more recently; then b evicted c.
    assert cached == {(0, "a"): 0, (1, "b"): 0, (2, "c"): 0, (3, "a"): 2999} | {
        (4, "d"): 0,
        (5, "a"): 2999,
        (6, "b"): 0,
    }


def test_what_running_requests_use_is_not_evicted() -> None:
    model = ReplicaModel(SETTINGS)
    running = Request(tokens(4000, "running"), 500)
    model.submit(running, 0.0)
    model.advance(4.0)
    for number in range(4):
        model.submit(Request(tokens(4000, f"other {number}"), 1), 4.0)
    again = Request(tokens(4000, "running"), 1)
    model.submit(again, 4.0)
    settle(model)
    assert again.cached_tokens == 3999


def test_no_more_than_the_running_limit_run_at_once() -> None:
    model = ReplicaModel(SETTINGS)
    requests = [Request(tokens(10, f"r{number}"), 101) for number in range(20)]
    for request in requests:
        model.submit(request, 0.0)
    most = 0
    while not model.is_idle:
        model.advance(model.next_token_time())
        check(model)
        most = max(most, len(model.running))
    assert most == 8
    finished = [request.finished_at for request in requests]
    assert finished == sorted(finished, key=lambda at: at or 0.0)


@pytest.mark.parametrize("in_one_step", [False, True])
@pytest.mark.parametrize(("reserve", "waits"), [(0.0, False), (0.5, False), (1.0, True)])
def test_room_is_kept_for_what_others_may_still_make(reserve: float, waits: bool, in_one_step: bool) -> None:
    model = ReplicaModel(ModelSettings(max_total_tokens=1000, reserve=reserve))
    first, second = Request(tokens(200, "a"), 300), Request(tokens(200, "b"), 400)
    if in_one_step:
        model.submit(Request(tokens(10, "c"), 1), 0.0)
    model.submit(first, 0.0)
    if not in_one_step:
        model.advance(0.1)
    model.submit(second, 0.1 if not in_one_step else 0.0)
    settle(model)
    assert first.finished_at is not None
    assert second.started_at is not None
    assert (second.started_at >= first.finished_at) == waits
    check(model)


def test_a_full_queue_refuses_and_has_room_again_later() -> None:
    model = ReplicaModel(ModelSettings(max_running_requests=1, max_queued_requests=2))
    for number in range(3):
        model.submit(Request(tokens(10, f"r{number}"), 100), 0.0)
    with pytest.raises(QueueFull):
        model.submit(Request(tokens(10, "r3"), 100), 0.0)
    assert len(model.waiting) == 2
    assert len(settle(model)) == 3
    model.submit(Request(tokens(10, "r4"), 100), 100.0)
    assert len(settle(model)) == 1


def test_a_prompt_bigger_than_the_pool_is_refused() -> None:
    model = ReplicaModel(SETTINGS)
    with pytest.raises(TooLong, match="10000 tokens do not fit a pool of 10000"):
        model.submit(Request(tokens(10_000, "a"), 1), 0.0)
    assert model.is_idle


def test_abort_in_the_queue() -> None:
    """An aborted request leaves the queue at once and lets the next one in."""
    model = ReplicaModel(ModelSettings(max_running_requests=1))
    first, second, third = (Request(tokens(10, name), 100) for name in "abc")
    for request in (first, second, third):
        model.submit(request, 0.0)
    model.abort(second, 0.5)
    assert second.finished_at == 0.5
    assert list(model.waiting) == [third]
    assert settle(model) == [second, first, third]
    assert second.first_token_at is None
    check(model)


def test_abort_while_running() -> None:
    """A request aborted while running ends with the current step and leaves its prefix cached."""
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(100, "a"), 1000)
    model.submit(request, 0.0)
    model.advance(1.005)
    model.abort(request, 1.005)
    assert settle(model) == [request]
    assert request.aborted
    assert request.finished_at == pytest.approx(0.1 + 83 * 0.011)
    assert model.aborted_total == 1
    check(model)
    assert model.cache.predict(tokens(100, "a")) == 100


def test_abort_during_prefill() -> None:
    """An abort during the request's own prefill takes effect after that step."""
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(9000, "a"), 10)
    model.submit(request, 0.0)
    model.abort(request, 1.0)
    assert settle(model) == [request]
    assert request.finished_at == pytest.approx(4.096)
    check(model)


def test_an_abort_after_the_end_changes_nothing() -> None:
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(10, "a"), 1)
    model.submit(request, 0.0)
    settle(model)
    model.abort(request, 5.0)
    assert not request.aborted
    assert model.aborted_total == 0


def test_pool_that_fills_while_decoding() -> None:
    """A pool that fills up during decoding retracts the youngest request, and all finish in the end."""
    model = ReplicaModel(ModelSettings(max_total_tokens=1000, reserve=0.0, max_running_requests=8))
    requests = [Request(tokens(200, f"r{number}"), 300) for number in range(4)]
    for request in requests:
        model.submit(request, 0.0)
    while not model.is_idle:
        model.advance(model.next_time())
        check(model)
    assert model.retracted_total > 0
    assert all(request.finished_at is not None and model.made(request) == 300 for request in requests)
    assert requests[0].retractions == 0


def test_an_answer_longer_than_the_pool_ends_when_the_pool_does() -> None:
    model = ReplicaModel(SETTINGS)
    request = Request(tokens(9000, "a"), 5000)
    model.submit(request, 0.0)
    assert settle(model) == [request]
    assert model.made(request) == 1000
    check(model)


def scenario(seed: int) -> tuple[ModelSettings, list[tuple[float, Request, float | None]]]:
    """Random settings, and requests with their arrival times and, for some, the time at which the client leaves."""
    chance = random.Random(seed)
    settings = ModelSettings(
        prefill_rate=chance.choice([500.0, 5000.0]),
        max_total_tokens=chance.choice([700, 2000, 20_000]),
        page_size=chance.choice([1, 1, 4, 16]),
        max_running_requests=chance.choice([1, 3, 16]),
        chunk_tokens=chance.choice([64, 256, 4096]),
        reserve=chance.choice([0.0, 0.3, 1.0]),
    )
    arrivals = []
    at = 0.0
    for _ in range(120):
        at += chance.expovariate(8.0)
        prompt = tokens(chance.randrange(1, 300), f"shared {chance.randrange(4)}")
        prompt += tokens(chance.randrange(0, 100), f"own {chance.randrange(40)}")
        leaves = at + chance.expovariate(1.0) if chance.random() < 0.2 else None
        arrivals.append((at, Request(prompt, chance.randrange(1, 250)), leaves))
    return settings, arrivals


def play(seed: int, fine: bool) -> list[tuple[float | None, float | None, int, bool, int]]:
    settings, arrivals = scenario(seed)
    model = ReplicaModel(settings)
    happenings = sorted(
        [(at, 0, number) for number, (at, _, _) in enumerate(arrivals)]
        + [(leaves, 1, number) for number, (_, _, leaves) in enumerate(arrivals) if leaves is not None]
    )
    over: list[Request] = []
    chance = random.Random(seed)

    def run(until: float) -> None:
        nonlocal over
        while (due := model.next_token_time() if fine else model.next_time()) <= until and due < math.inf:
            over += model.advance(due)
            if chance.random() < 0.2:
                check(model)

    for at, kind, number in happenings:
        run(at)
        request = arrivals[number][1]
        if kind == 0:
            model.submit(request, at)
        else:
            model.abort(request, at)
        check(model)
    run(math.inf)
    over += model.advance(1e9)
    assert model.is_idle
    assert sorted(id(request) for request in over) == sorted(id(request) for _, request, _ in arrivals)
    assert all(model.made(one) == one.output_tokens for _, one, _ in arrivals if not one.aborted)
    return [
        (
            one.first_token_at and round(one.first_token_at, 6),
            one.finished_at and round(one.finished_at, 6),
            one.cached_tokens,
            one.aborted,
            one.retractions,
        )
        for _, one, _ in arrivals
    ]


@pytest.mark.parametrize("seed", range(20))
def test_steps_taken_together_end_as_steps_taken_one_by_one(seed: int) -> None:
    assert play(seed, fine=False) == play(seed, fine=True)
