"""The bounded queue in front of full replicas: which requests wait, which are refused, and with what answer."""

import asyncio

import pytest

from balancer.routing.admission import Waiter
from balancer.routing.prompt import Prompt
from tests.lab.replica import LabReplica
from tests.support.client import Client, chat, request
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving

POST = request(body=chat())
MODELS = request("GET", "/v1/models/lab")


async def waiting(house: House, count: int, first: int = 0) -> list[Client]:
    """That many new clients, each with a request that waits behind the earlier ones."""
    clients = []
    for number in range(first, first + count):
        client = await house.client()
        await client.send(request(body=chat(), headers=(("X-Request-Id", f"n{number}"),)))
        await until(lambda depth=number - first + 1: house.balancer.service.admission.queue_depth == depth)  # type: ignore[misc]
        clients.append(client)
    return clients


async def occupied(house: House, count: int = 1) -> list[Client]:
    """That many requests that keep their places."""
    clients = [await house.client() for _ in range(count)]
    for client in clients:
        await client.send(request(body=chat(stream=True, tokens=100_000)))
    await until(lambda: sum(m.generating for m in house.balancer.service.fleet.members.values()) == count)
    return clients


@on_uvloop
async def test_requests_beyond_the_limits_wait() -> None:
    """Requests beyond the limits wait, and are served in the order in which they came."""
    async with (
        LabReplica(token_interval=0.01) as a,
        LabReplica(token_interval=0.01) as b,
        serving(a, b, max_in_flight=1) as house,
    ):
        holders = await occupied(house, 2)
        clients = await waiting(house, 5)
        assert [m.in_flight for m in house.balancer.service.fleet.members.values()] == [1, 1]
        for holder in holders:
            holder.leave()
        for client in clients:
            answer = await client.answer()
            assert answer.status == 200
        served = sorted((r for r in (*a.seen.requests, *b.seen.requests) if r.id.startswith("n")), key=lambda r: (
                r.received_at + (0 if r in a.seen.requests else b.seen.started - a.seen.started)))  # fmt: skip
        assert [r.id for r in served] == [f"n{n}" for n in range(5)]
        lines = [line for line in await house.logged(7) if line["status"] == 200]
        assert all(line["queued"] > 0 for line in lines)


@on_uvloop
async def test_no_member_ever_holds_more_than_its_limit() -> None:
    async with (
        LabReplica(head_delay=0.02) as a,
        LabReplica(head_delay=0.02) as b,
        serving(a, b, max_in_flight=3) as house,
    ):
        clients = [await house.client() for _ in range(30)]
        most = 0
        for client in clients:
            await client.send(POST)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(client.answer()) for client in clients]
            while not all(answer.done() for answer in answers):
                most = max(most, *(m.generating for m in house.balancer.service.fleet.members.values()))
                await asyncio.sleep(0)
        assert most == 3
        assert {answer.result().status for answer in answers} == {200}
        assert a.seen.generations_started + b.seen.generations_started == 30


@on_uvloop
async def test_only_generating_posts_count_and_wait() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, queue_size=1) as house:
        await occupied(house)
        await waiting(house, 1)
        for data in (MODELS, request("POST", "/v1/tokenize", b"{}"), request("OPTIONS"), request("GET", "/health")):
            answer = await house.ask(data, data.partition(b" ")[0].decode())
            assert answer.status == 200
        assert house.member("a").generating == 1


@on_uvloop
async def test_a_full_queue_is_429_with_retry_after() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, queue_size=2) as house:
        await occupied(house)
        await waiting(house, 2)
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert 5 <= int(answer.header("retry-after") or 0) <= 8, "nobody knows how long; not all at once"
        assert answer.error["type"] == "rate_limit_error"
        assert not answer.is_last, "the connection stays usable"


@on_uvloop
async def test_a_queue_of_no_size_says_no_at_once() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, queue_size=0) as house:
        await occupied(house)
        assert (await house.ask(POST)).error["code"] == "queue_full"


@on_uvloop
async def test_who_waited_out_is_told_429() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, queue_timeout=0.4) as house:
        await occupied(house)
        began = asyncio.get_running_loop().time()
        answer = await house.ask(POST)
        assert 0.4 <= asyncio.get_running_loop().time() - began < 1.5
        assert (answer.status, answer.error["code"]) == (429, "queue_timeout")
        assert 5 <= int(answer.header("retry-after") or 0) <= 8
        line = house.log()[-1]
        assert (line["attempts"], line["error"]) == (0, "queue_timeout")


@on_uvloop
async def test_who_waits_when_the_last_member_goes_is_told_503() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, start_wait=0) as house:
        await occupied(house)
        (client,) = await waiting(house, 1)
        house.balancer.service.fleet.drain(house.member("a"))
        answer = await client.answer()
        assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "no_replica_ready", "5")


@on_uvloop
async def test_who_waits_gets_the_place_of_a_member_that_joins() -> None:
    async with (
        LabReplica(token_interval=0.01) as a,
        LabReplica(ready=503) as b,
        serving(a, b, ready=1, max_in_flight=1, ready_interval=0.1) as house,
    ):
        await occupied(house)
        (client,) = await waiting(house, 1)
        b.set(ready=200)
        answer = await client.answer()
        assert (answer.status, answer.header("x-replica-id")) == (200, "b")


@on_uvloop
async def test_while_a_replica_starts_requests_wait_for_it() -> None:
    async with LabReplica(ready=500) as a, serving(a, ready=0, ready_interval=0.1) as house:
        clients = await waiting(house, 3)
        a.set(ready=200)
        for client in clients:
            assert (await client.answer()).status == 200


@on_uvloop
async def test_who_waited_out_for_a_start_is_told_503() -> None:
    async with LabReplica(ready=500) as a, serving(a, ready=0, start_wait=0.4) as house:
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "no_replica_ready", "5")
        assert 0.3 < house.log()[-1]["duration"] < 1.5


@on_uvloop
async def test_while_all_are_gone_requests_wait_for_them() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b, ready_interval=0.1) as house:
        a.set(ready=503)
        b.refuse()
        b.drop_connections()
        await until(lambda: not house.balancer.service.fleet.available(), "both are gone")
        clients = await waiting(house, 3)
        a.set(ready=200)
        for client in clients:
            assert (await client.answer()).status == 200


@on_uvloop
async def test_a_request_that_nobody_takes_is_offered_again() -> None:
    async with LabReplica() as a, serving(a, ready_interval=0.1) as house:
        a.refuse()
        (client,) = await waiting(house, 1)
        await a.accept()
        assert (await client.answer()).status == 200
        assert house.log()[-1]["retries"] == "refused"
        a.refuse()  # it listens on another socket than before, which would count as left open


@on_uvloop
async def test_who_has_been_gone_for_long_is_not_waited_for() -> None:
    async with LabReplica() as a, serving(a, ready_interval=0.1, queue_timeout=0.5) as house:
        fleet = house.balancer.service.fleet
        a.set(ready=503)
        await until(lambda: not fleet.available(), "it is gone")
        began = asyncio.get_running_loop().time()
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"]) == (503, "no_replica_ready")
        assert 0.3 < asyncio.get_running_loop().time() - began < 2
        began = asyncio.get_running_loop().time()
        assert (await house.ask(POST)).status == 503
        assert asyncio.get_running_loop().time() - began < 0.2


WHAT_IS_THERE = {
    "models": MODELS,
    "all models": request("GET", "/v1/models"),
    "tokens of a text": request("POST", "/v1/tokenize", b"{}"),
    "tokens of a message": request("POST", "/v1/messages/count_tokens", b"{}"),
    "a check that takes no time": request("POST", "/v1/moderations", b"{}"),
    "not even a method of the path": request("GET", "/v1/chat/completions"),
}


@pytest.mark.parametrize("data", **each(WHAT_IS_THERE))
@on_uvloop
async def test_who_asks_what_is_there_is_told_soon_that_nothing_is_yet(data: bytes) -> None:
    async with LabReplica(ready=500) as a, serving(a, ready=0) as house:
        began = asyncio.get_running_loop().time()
        answer = await house.ask(data, data.partition(b" ")[0].decode())
        assert (answer.status, answer.header("retry-after")) == (503, "5")
        assert asyncio.get_running_loop().time() - began < 5


@pytest.mark.parametrize("method", ["GET", "POST"])
@on_uvloop
async def test_uncounted_requests_pass_a_full_queue(method: str) -> None:
    """Requests that do not count get through when a replica comes up behind a full queue."""
    async with (
        LabReplica(ready=500, token_interval=0.01) as a,
        serving(a, ready=0, max_in_flight=1, ready_interval=0.1) as house,
    ):
        holders = [await house.client() for _ in range(3)]
        for depth, holder in enumerate(holders, 1):
            await holder.send(request(body=chat(stream=True, tokens=100_000)))
            await until(lambda depth=depth: house.balancer.service.admission.queue_depth == depth)  # type: ignore[misc]
        client = await house.client()
        await client.send(request(method, "/v1/models/lab"))
        await until(lambda: house.balancer.service.admission.queue_depth == 4)
        a.set(ready=200)
        assert (await client.answer(method)).status == 200


@on_uvloop
async def test_free_place_is_taken_at_once() -> None:
    """A request does not wait for a free place behind one that has just got its own.

    Two places are given back while one request waits: a request in the same loop iteration gets the other place.
    """
    async with LabReplica() as a, serving(a, max_in_flight=2) as house:
        admission = house.balancer.service.admission
        waiter = Waiter(Prompt("/v1/completions", []), is_generating=True)
        held = [admission.claim_now(waiter), admission.claim_now(waiter)]
        waiting = asyncio.ensure_future(admission.claim(waiter))
        await asyncio.sleep(0)
        assert admission.queue_depth == 1
        for place in held:
            assert place is not None
            place.__exit__(None, None, None)
        free = admission.claim_now(waiter)
        assert free is not None
        for place in (free, await waiting):
            place.__exit__(None, None, None)


@on_uvloop
async def test_a_place_given_in_the_moment_of_leaving_is_given_on() -> None:
    async with LabReplica() as a, serving(a, max_in_flight=1) as house:
        admission = house.balancer.service.admission
        waiter = Waiter(Prompt("/v1/completions", []), is_generating=True)
        held = admission.claim_now(waiter)
        first, second = (asyncio.ensure_future(admission.claim(waiter)) for _ in range(2))
        await asyncio.sleep(0)
        assert held is not None
        held.__exit__(None, None, None)  # the place now belongs to the first request, which does not know it yet
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        (await second).__exit__(None, None, None)


@on_uvloop
async def test_unreadable_prompt_holds_up_no_queue() -> None:
    """A prompt that cannot be understood holds up no queue.

    It gets its place from another client's request, or from the loop that serves everybody.
    """
    absurd = b'{"messages":[],"tools":' + b"[" * 300 + b"]" * 300 + b"}"
    prefix_aware = {"policy": "prefix_aware"}
    async with LabReplica(token_interval=0.01) as a, serving(a, config=prefix_aware, max_in_flight=1) as house:
        (holder,) = await occupied(house)
        first = await house.client()
        await first.send(request(body=absurd))
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        second = await house.client()
        await second.send(POST)
        await until(lambda: house.balancer.service.admission.queue_depth == 2)
        holder.leave()
        assert (await second.answer()).status == 200
        assert (await first.answer()).header("x-replica-id") == "a", "what it makes of it is the replica's business"


# Held here rather than in a replica's own queue


@on_uvloop
async def test_stream_waits_for_a_first_token() -> None:
    """With max_pending, a stream waits here until the one before it has its first token."""
    async with (
        LabReplica(first_token_delay=0.3, token_interval=0.05) as a,
        serving(a, max_pending=1) as house,
    ):
        clients = [await house.client() for _ in range(3)]
        for client in clients:
            await client.send(request(body=chat(stream=True, tokens=20)))
        await until(lambda: house.balancer.service.admission.queue_depth == 2)
        member = house.member("a")
        most = 0
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(client.answer()) for client in clients]
            while not all(answer.done() for answer in answers):
                assert member.pending <= 1
                most = max(most, member.generating)
                await asyncio.sleep(0.001)
        assert most == 3, "what has begun does not hold others back"
        assert all(b"[DONE]" in answer.result().body for answer in answers)
        assert member.pending == 0


@on_uvloop
async def test_plain_answers_with_max_pending() -> None:
    """Plain answers follow each other as the replica reports that nothing waits there."""
    async with LabReplica(head_delay=0.5) as a, serving(a, max_pending=1, ready_interval=0.05) as house:
        clients = [await house.client() for _ in range(3)]
        for client in clients:
            await client.send(POST)
        await a.seen.until(lambda seen: seen.generations_started == 3)
        assert a.seen.generations_finished == 0, "none of them had to end first"
        for client in clients:
            assert (await client.answer()).status == 200
        assert house.member("a").pending == 0


@on_uvloop
async def test_leaving_before_the_first_token() -> None:
    """A client that leaves before its first token makes room for the next."""
    async with LabReplica(first_token_delay=30) as a, serving(a, max_pending=1, ready_interval=60) as house:
        first, second = await house.client(), await house.client()
        for client in (first, second):
            await client.send(request(body=chat(stream=True)))
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        first.leave()
        await until(lambda: house.balancer.service.admission.queue_depth == 0)
        assert house.member("a").pending == 1
        second.leave()
        await house.at_rest()
        assert house.member("a").pending == 0


# Counts of arrivals, for autoscaling


@on_uvloop
async def test_arrivals_are_counted_once() -> None:
    """Each generating request that arrives is counted once, refused or not."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, max_in_flight=1, queue_size=0) as house:
        admission = house.balancer.service.admission
        a.next(1, status=503)
        b.next(1, status=503)
        assert (await house.ask(POST)).status == 503
        assert (admission.arrived_total, admission.turned_away_total) == (1, 1), "two attempts, one request"
        for member in house.balancer.service.fleet.members.values():
            member.full_until = 0.0
        holders = await occupied(house, 2)
        for _ in range(5):
            assert (await house.ask(POST)).status == 429
            assert (await house.ask(MODELS, "GET")).status == 200
        assert (admission.arrived_total, admission.turned_away_total) == (8, 6)
        for holder in holders:
            holder.leave()


@on_uvloop
async def test_waking_a_sleeping_service() -> None:
    """A sleeping service is woken by requests that generate, and not by polling."""
    async with serving(ready=0, start_wait=5) as house:
        house.balancer.service.fleet.is_asleep = True
        assert (await house.ask(MODELS, "GET")).status == 503
        assert (house.balancer.service.admission.arrived_total, house.balancer.service.admission.generating_queued) == (
            0,
            0,
        )
        client = await house.client()
        await client.send(POST)
        await until(lambda: house.balancer.service.admission.generating_queued == 1)
        assert house.balancer.service.admission.arrived_total == 1
