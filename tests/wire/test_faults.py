"""Every outcome of an attempt: what the client gets, and what the replicas see."""

import asyncio
import resource
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import CHAT, Answer, chat, request
from tests.support.until import until
from tests.wire.running import House, deaf, each, hanging_up, in_house, kept, on_uvloop, serving

POST = request(body=chat())
GET = request("GET", "/v1/models/lab")
SENT_ON = {"GET": GET, "HEAD": request("HEAD", "/v1/models/lab"), "POST": POST}
NEVER = {"ready_interval": 60, "retry_sent": "never"}
METHODS = ["GET", "HEAD", "POST", "OPTIONS"]


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, {}, ejection_time=0.001) as house:
        yield house


def numbers(*replicas: LabReplica) -> list[int]:
    """How many requests each saw."""
    return [len(replica.seen.requests) for replica in replicas]


async def the_line(house: House) -> dict[str, object]:
    """The last line of the access log, once nothing is in flight any more."""
    await house.at_rest()
    return house.log()[-1]


# No connection


@pytest.mark.parametrize("method", METHODS)
@on_uvloop
async def test_a_refused_connection_sends_any_method_to_another_member(method: str) -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b, ready_interval=60) as house:
        a.refuse()
        answer = await house.ask(request(method, CHAT, chat()), method)
        assert answer.status == 200
        assert answer.header("x-replica-id") == "b"
        assert numbers(a, b) == [0, 1]
        assert (await the_line(house))["attempts"] == 2
        assert [m.name for m in house.balancer.service.fleet.available()] == ["b"], "unavailable at once"


@on_uvloop
async def test_all_members_refuse() -> None:
    """Each member that refuses is tried once, and the client gets a 502 where nothing is waited for."""
    async with (
        LabReplica() as a,
        LabReplica() as b,
        LabReplica() as c,
        serving(a, b, c, ready_interval=60, start_wait=0) as house,
    ):
        for replica in (a, b, c):
            replica.refuse()
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"]) == (502, "replica_unreachable")
        assert "safe to send it again" in answer.error["message"]
        line = await the_line(house)
        assert (line["status"], line["attempts"], line["error"]) == (502, 3, "replica_unreachable")
        assert [m.failures_total for m in house.balancer.service.fleet.members.values()] == [1, 1, 1]


@on_uvloop
async def test_refused_connections_and_503s_cost_no_retry_budget() -> None:
    async with (
        LabReplica() as a,
        LabReplica(status=503) as b,
        LabReplica() as c,
        LabReplica(cut="before_head") as d,
        serving(a, b, c, d, ready_interval=60) as house,
    ):
        a.refuse()
        budget, later = house.balancer.destination.budget, house.balancer.loop.time() + 60
        while budget.withdraw(later):  # nothing is added to it until then
            pass
        answer = await house.ask(POST)
        assert (answer.status, answer.header("x-replica-id")) == (200, "c")
        assert (await the_line(house))["attempts"] == 3
        assert (await house.ask(GET, "GET")).status == 502, "a sent request does"


@on_uvloop
async def test_connection_times_out() -> None:
    """If a connection times out, a request of any method goes to another member."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, ready_interval=60, connect_timeout=0.3) as house:
        with deaf(a):
            answer = await house.ask(POST)
        assert (answer.status, answer.header("x-replica-id")) == (200, "b")
        line = await the_line(house)
        assert line["attempts"] == 2
        assert 0.3 <= line["duration"] < 1
        assert house.member("a").failures_total == 1


@on_uvloop
async def test_a_shortage_of_sockets_is_503_and_nobodys_fault() -> None:
    async with LabReplica() as a, serving(a, ready_interval=60) as house:
        client = await house.client()
        await client.send(POST[:20])
        await until(lambda: house.balancer.doors.connections)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no new descriptor can be opened
        try:
            await client.send(POST[20:])
            answer = await client.answer()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "out_of_sockets", "1")
        member = house.member("a")
        assert (member.failures_total, member.is_available(house.balancer.service.fleet.clock())) == (0, True)
        await client.send(POST)
        assert (await client.answer()).status == 200


@on_uvloop
async def test_nothing_available_is_503_within_50_ms() -> None:
    async with LabReplica(ready=500) as a, serving(a, ready=0, start_wait=0) as house:
        client, times = await house.client(), []
        for _ in range(5):
            began = asyncio.get_running_loop().time()
            await client.send(POST)
            answer = await client.answer()
            times.append(asyncio.get_running_loop().time() - began)
            assert (answer.status, answer.error["code"]) == (503, "no_replica_ready")
            assert answer.header("retry-after") == "5"
        assert sorted(times)[2] < 0.05
        assert not answer.is_last, "the connection stays usable"


@on_uvloop
async def test_a_request_at_a_replica_without_life_goes_elsewhere() -> None:
    """One that has got nothing of its answer is not left with a replica that gives no sign of life."""
    quick = {"idle_timeout": 0.8, "ready_interval": 0.1, "ready_timeout": 0.2}
    async with LabReplica() as a, LabReplica() as b, serving(a, b, **quick) as house:
        house.member("a").turn = -1
        a.set(hang="before_head", service_status="hang", ready="hang")
        answer = await house.ask(POST)
        assert (answer.status, answer.header("x-replica-id")) == (200, "b")
        assert house.log()[-1]["retries"] == "lost"


@on_uvloop
async def test_one_long_pass_of_the_scheduler_loses_no_request() -> None:
    """Meanwhile SGLang answers /ready and nothing that asks its scheduler, and perhaps it is on no list any more."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, idle_timeout=0.4) as house:
        a.set(head_delay=1.6, service_status="hang")
        for leaves in (False, True):
            house.member("a").turn = -1
            client = await house.client()
            await client.send(POST)
            await until(lambda: house.member("a").in_flight == 1)
            if leaves:
                house.balancer.service.fleet.reconcile([house.member("b").listing])
            answer = await client.answer()
            assert (answer.status, answer.header("x-replica-id")) == (200, "a")
        assert (a.seen.generations_started, b.seen.generations_started) == (2, 0)


@on_uvloop
async def test_a_request_left_waiting_goes_elsewhere_once() -> None:
    """A replica that lives, and lets a request wait for first_byte_timeout, loses it to another; two of them end it."""
    async with (
        LabReplica(hang="before_head") as a,
        LabReplica() as b,
        serving(a, b, first_byte_timeout=0.4) as house,
    ):
        house.member("a").turn = -1
        answer = await house.ask(POST)
        assert (answer.status, answer.header("x-replica-id")) == (200, "b")
        assert house.log()[-1]["retries"] == "silent"
        b.set(hang="before_head")
        assert (await house.ask(POST)).error["code"] == "first_byte_timeout"


# The keep-alive race


async def asked_while_it_closes(house: House, a: LabReplica, data: bytes, method: str = "POST") -> Answer:
    """Asks as the replica closes the kept connection of its last request, just before the balancer sends on it.

    The event loop reads the request, then it makes the calls that are due: the closing, then the balancer's task. What
    came of the closing it sees only after that.
    """
    client = await house.client()
    await client.send(request("GET", "/health"))
    await client.answer("GET")  # the balancer has accepted the connection, so that the next bytes are read at once
    await client.send(data)
    asyncio.get_running_loop().call_soon(a.close_now, a.seen.last.connection)
    answer = await client.answer(method)
    client.leave()
    return answer


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@on_uvloop
async def test_keep_alive_race(method: str) -> None:
    """A keep-alive race leads to a new connection to the same member within one attempt, whatever the method."""
    async with LabReplica() as a, LabReplica(ready=503) as b, serving(a, b, ready=1, retry_sent="never") as house:
        assert (await house.ask(POST)).status == 200
        b.set(ready=200)
        await house.ready(2)
        house.member("b").turn = 99
        answer = await asked_while_it_closes(house, a, request(method, CHAT, chat()), method)
        assert (answer.status, answer.header("x-replica-id")) == (200, "a")
        assert [r.outcome for r in a.seen.requests] == ["answered", "answered"]
        assert a.seen.requests[0].connection != a.seen.requests[1].connection
        assert numbers(b) == [0]
        line = await the_line(house)
        assert (line["attempts"], line["retries"]) == (1, "race")
        await until(lambda: house.balancer.tallies.retries["race"] == 1, "counted")
        assert house.member("a").failures_total == 0, "no fault of the member"


@on_uvloop
async def test_after_a_race_the_fresh_connection_is_not_repeated() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b, retry_sent="never") as house:
        assert (await house.ask(POST)).status == (await house.ask(POST)).status == 200
        a.set(cut="before_head")
        answer = await asked_while_it_closes(house, a, POST)
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        assert [r.outcome for r in a.seen.requests] == ["answered", "cut"]
        assert numbers(b) == [1]
        line = await the_line(house)
        assert (line["attempts"], line["retries"]) == (1, "race")


@pytest.mark.parametrize("delay", [0, 0.1])
@pytest.mark.parametrize("by", ["close", "reset"])
@on_uvloop
async def test_what_was_acknowledged_was_sent(by: str, delay: float) -> None:
    """A replica that dies with a request that it has is no race, however soon it dies and whatever it does on dying."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, retry_sent="never") as house:
        assert (await house.ask(POST)).status == (await house.ask(POST)).status == 200
        a.set(head_delay=delay, cut="before_head", cut_by=by)
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        assert numbers(a, b) == [2, 1], "it may have been generated"
        assert "retries" not in await the_line(house)
        assert house.member("a").failures_total == 1


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@on_uvloop
async def test_race_and_a_refusal(method: str) -> None:
    """A request that nobody read goes to another member, whatever it does, if the new connection is refused."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, **NEVER) as house:
        house.member("b").turn = 99
        assert (await house.ask(POST)).status == 200
        house.member("b").turn = 99
        a.refuse()
        answer = await asked_while_it_closes(house, a, request(method, CHAT, chat()), method)
        assert answer.status == 200
        assert numbers(a, b) == [1, 1]
        assert (await the_line(house))["retries"] == "race,refused"
        assert [m.name for m in house.balancer.service.fleet.available()] == ["b"], "refused: unavailable at once"


@on_uvloop
async def test_race_and_a_close() -> None:
    """A request that only generates goes to another member if the new connection is closed at once.

    A published port of Docker's does so when its container has died: it accepts connections, then closes them.
    """
    for _ in range(5):  # the replica's kernel sometimes acknowledges the request before that
        async with LabReplica() as a, LabReplica() as b, serving(a, b, ready_interval=60) as house:
            house.member("b").turn = 99
            assert (await house.ask(POST)).status == 200
            house.member("b").turn = 99
            with hanging_up(a):
                answer = await asked_while_it_closes(house, a, POST)
            assert answer.status == 200
            assert numbers(a, b) == [1, 1]
            assert (await the_line(house))["retries"].startswith("race,")


# Sent, but not answered


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("HEAD", ""), ("POST", CHAT), ("POST", "/generate")])
@in_house
async def test_reset_moves_harmless_requests(house: House, method: str, path: str) -> None:
    """After a reset, requests that only generate or only read go to another member."""
    house.replicas[0].set(cut="before_head")
    answer = await house.ask(request(path=path, body=chat()) if path else SENT_ON[method], method)
    assert answer.status == 200
    assert numbers(*house.replicas) == [1, 1]
    line = await the_line(house)
    assert (line["attempts"], line["retries"]) == (2, "lost")
    assert house.member("a").failures_total == 1


STAYS = {
    "a service that wants none": ({"retry_sent": "never"}, request(body=chat())),
    "an answer that is stored": ({}, request(path="/v1/responses", body=b'{"input":"hi"}')),
    "no path that is known": ({}, request(path="/v1/moderations", body=b"{}")),
    "no method that only asks": ({}, request("DELETE", "/v1/models/whatever")),
}


@pytest.mark.parametrize("case", **each(STAYS))
@on_uvloop
async def test_reset_moves_nothing_else(case: tuple[dict[str, str], bytes]) -> None:
    """After a reset, requests whose effects could happen twice go nowhere else."""
    settings, data = case
    async with LabReplica(cut="before_head") as a, LabReplica() as b, serving(a, b, **settings) as house:
        answer = await house.ask(data)
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        assert "may have been processed" in answer.error["message"]
        assert numbers(a, b) == [1, 0]


@pytest.mark.parametrize("method", ["GET", "POST"])
@on_uvloop
async def test_two_deaths(method: str) -> None:
    """A request that was sent goes to two members at most."""
    cut = {"cut": "before_head"}
    async with LabReplica(**cut) as a, LabReplica(**cut) as b, LabReplica() as c, serving(a, b, c) as house:
        answer = await house.ask(SENT_ON[method], method)
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        assert "Two replicas went away" in answer.error["message"]
        assert numbers(a, b, c) == [1, 1, 0]


@on_uvloop
async def test_repeats_of_sent_requests_stay_within_the_retry_budget() -> None:
    async with (
        LabReplica(cut="before_head") as a,
        LabReplica(cut="before_head") as b,
        serving(a, b, ejection_time=0.001) as house,
    ):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(50):
            assert (await house.ask(GET, "GET")).status == 502
        repeats = sum(numbers(a, b)) - 50
        assert 3 <= repeats <= 3 + 0.2 * 50 + 3 * (loop.time() - began) + 1


@pytest.mark.parametrize("partial", ["mid_head", "interim"])
@in_house
async def test_a_head_that_breaks_off_is_as_good_as_none(house: House, partial: str) -> None:
    raw = {"interim": {"raw": "HTTP/1.1 100 Continue\r\n\r\n", "raw_then": "reset"}, "mid_head": {"cut": "mid_head"}}
    house.replicas[0].set(**raw[partial])
    for ask in (house.ask(GET, "GET"), house.ask(POST)):
        answer = await ask
        assert (answer.status, answer.is_whole) == (200, True)


SHORT = {"framing": "content-length", "cut": "after_bytes", "cut_after": 10}


@pytest.mark.parametrize("by", ["reset", "close"])
@on_uvloop
async def test_a_short_answer_that_breaks_off_is_asked_of_another(by: str) -> None:
    """No client has a part of it, so another replica may give it."""
    async with LabReplica(**SHORT, cut_by=by) as a, LabReplica() as b, serving(a, b) as house:
        answer = await house.ask(POST)
        assert (answer.status, answer.is_whole) == (200, True)
        assert answer.header("x-replica-id") == "b"
        assert numbers(a, b) == [1, 1]
        assert (await house.logged(1))[0]["retries"] == "lost"


@on_uvloop
async def test_a_short_answer_that_breaks_off_twice_is_502() -> None:
    async with LabReplica(**SHORT) as a, LabReplica(**SHORT) as b, LabReplica() as c, serving(a, b, c) as house:
        answer = await house.ask(POST)
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        assert numbers(a, b, c) == [1, 1, 0]


@on_uvloop
async def test_a_short_answer_that_stalls_is_asked_of_another() -> None:
    raw = 'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"'
    async with LabReplica(raw=raw, raw_then="hang") as a, LabReplica() as b, serving(a, b, idle_timeout=0.4) as house:
        a.set(service_status="hang", health="hang")
        answer = await house.ask(POST)
        assert (answer.status, answer.is_whole, answer.header("x-replica-id")) == (200, True, "b")


HANGS = {
    "no head": {"hang": "before_head"},
    "half a head": {"raw": "HTTP/1.1 200 OK\r\nContent-", "raw_then": "hang"},
    "only an interim answer": {"raw": "HTTP/1.1 102 Processing\r\n\r\n", "raw_then": "hang"},
    "nothing reads the body": {"early": "close", "hang": "before_head"},
}


@pytest.mark.parametrize("hang", **each(HANGS))
@on_uvloop
async def test_first_byte_timeout(hang: dict[str, object]) -> None:
    """Without a head within first_byte_timeout the exchange is closed; without another try the client gets a 504."""
    settings = {"first_byte_timeout": 0.3, "ready_interval": 60, "retry_sent": "never"}
    async with LabReplica() as a, LabReplica() as b, serving(a, b, **settings) as house:
        a.set(**hang)
        answer = await house.ask(request(body=chat(padding="x" * 10_000_000)))
        assert (answer.status, answer.error["code"]) == (504, "first_byte_timeout")
        assert numbers(a, b) == [1, 0]
        if not hang.get("early"):  # the lab does not read then, and so does not notice
            await a.seen.until(lambda seen: seen.last.outcome == "client_left")
        a.drop_connections()
        await a.seen.until(lambda seen: seen.generations_started == seen.generations_aborted)
        line = await the_line(house)
        assert (line["status"], line["attempts"], line["member"]) == (504, 1, "a")
        assert house.member("a").failures_total == 1


# Busy


@pytest.mark.parametrize("method", ["POST", "GET"])
@in_house
async def test_busy_replica(house: House, method: str) -> None:
    """A request that a busy replica refuses goes to another member, and the replica counts as full."""
    house.replicas[0].set(status=503, retry_after="7")
    for _ in range(2):
        answer = await house.ask(SENT_ON[method], method)
        assert (answer.status, answer.header("x-replica-id")) == (200, "b")
    full_for = house.member("a").full_until - house.balancer.service.fleet.clock()
    assert 6 < full_for <= 7
    house.member("b").turn = 1 << 30
    assert (await house.ask(POST)).header("x-replica-id") == "b", "full: not its turn"
    assert numbers(*house.replicas) == [2, 3]
    assert house.member("a").failures_total == 0, "busy is not broken"
    assert [line["attempts"] for line in await house.logged(3)] == [2, 2, 1]


@pytest.mark.parametrize(("said", "full_for", "told"), [
    ("", 1, "1"), ("3", 3, "3"), ("0", 1, "1"), ("-1", 1, "1"), ("soon", 1, "1"), ("9999", 60, "60"),
    ("Wed, 21 Oct 2099 07:28:00 GMT", 1, "1"),
])  # fmt: skip
@on_uvloop
async def test_all_busy_is_503_with_retry_after_where_nobody_may_wait(said: str, full_for: float, told: str) -> None:
    knobs = {"status": 503, "retry_after": said}
    async with LabReplica(**knobs) as a, LabReplica(**knobs) as b, serving(a, b, queue_size=0) as house:
        for asked in (1, 2):
            answer = await house.ask(POST)
            assert (answer.status, answer.error["code"]) == (503, "replicas_busy")
            assert answer.header("retry-after") == told
            assert numbers(a, b) == [asked, asked]
        for name in "ab":
            assert full_for - 0.5 < house.member(name).full_until - house.balancer.service.fleet.clock() <= full_for


@on_uvloop
async def test_all_replicas_are_full() -> None:
    """A request that all replicas refuse as full waits like those that arrive later."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        for replica in (a, b):
            replica.next(2, status=503)
        clients = [await house.client() for _ in range(4)]
        for client in clients[:2]:
            await client.send(POST)
        await until(lambda: house.balancer.service.admission.queue_depth == 2)
        for client in clients[2:]:
            await client.send(POST)
        for client in clients:
            assert (await client.answer()).status == 200
        lines = await house.logged(4)
        assert all(0.5 < line["queued"] < 3 for line in lines)
        assert sorted(line["attempts"] for line in lines) == [1, 1, 3, 3]


@on_uvloop
async def test_request_that_no_replica_takes() -> None:
    """A request that no replica accepts is retried less and less often, and holds up no other."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, queue_timeout=4) as house:
        for replica in (a, b):
            replica.set(status=503)
        poison = await house.client()
        await poison.send(POST)
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        for replica in (a, b):
            replica.set(status=0)
        for _ in range(5):
            assert (await house.ask(POST)).status == 200
        assert not any(line["queued"] > 0.5 for line in house.log()), "nobody waits because of it"
        for replica in (a, b):
            replica.set(status=503)
        answer = await poison.answer()
        assert (answer.status, answer.error["code"]) == (503, "replicas_busy")
        line = house.log()[-1]
        assert (line["attempts"], line["retries"]) == (6, "busy,busy,busy,busy,busy"), (
            "at once, after one second, after two more"
        )


# Errors of the replica's own


SAID_503 = {
    "after the work": ('{"message": "Request running timeout reached."}', "/v1/chat/completions"),
    "without a word": ("", "/v1/chat/completions"),
    "at length": ("x" * 200_000, "/v1/chat/completions"),
    "by a proxy": ("<h1>503 Service Temporarily Unavailable</h1>", "/generate"),
}


@pytest.mark.parametrize("row", **each(SAID_503))
@in_house
async def test_a_503_that_does_not_say_full_is_an_answer(house: House, row: tuple[str, str]) -> None:
    body, path = row
    house.replicas[0].set(status=503, body=body)
    answer = await house.ask(request(path=path, body=chat()))
    assert (answer.status, answer.body, answer.header("x-replica-id")) == (503, body.encode(), "a")
    assert numbers(*house.replicas) == [1, 0], "it may have been generated"
    assert house.member("a").full_until == 0.0, "nor is the replica full for others"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@in_house
async def test_what_only_asks_goes_elsewhere_from_any_503(house: House, method: str) -> None:
    """An answer to HEAD has no body that could say why; and a read generates nothing twice."""
    house.replicas[0].set(status=503, body="Request running timeout reached.")
    answer = await house.ask(request(method, "/v1/models/whatever"), method)
    assert (answer.status, answer.header("x-replica-id")) == (200, "b")
    assert numbers(*house.replicas) == [1, 1]
    assert house.member("a").full_until == 0.0, "it is not full"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@in_house
async def test_a_503_that_says_full_goes_elsewhere(house: House, path: str) -> None:
    overloaded = '{"type": "error", "error": {"type": "overloaded_error", "message": "Internal server error"}}'
    house.replicas[0].set(status=503, **({"body": overloaded} if path == "/v1/messages" else {}))
    answer = await house.ask(request(path=path, body=chat()))
    assert (answer.status, answer.header("x-replica-id")) == (200, "b")
    assert house.member("a").said_full_to


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 429, 499, 500, 501, 502, 504, 599])
@in_house
async def test_other_errors_pass_unchanged(house: House, status: int) -> None:
    """A replica's other errors pass unchanged, and their requests are not repeated."""
    knobs = {"status": status, "body": '{"odd": "body"}', "retry_after": "11"}
    # The lab takes reason phrases from http.HTTPStatus, which lacks these.
    if status in (499, 599):
        knobs = {"raw": f'HTTP/1.1 {status} Odd\r\nretry-after: 11\r\ncontent-length: 15\r\n\r\n{{"odd": "body"}}'}
    house.replicas[0].set(**knobs)
    failures = house.member("a").failures_total
    answer = await house.ask(POST)
    assert (answer.status, answer.body) == (status, b'{"odd": "body"}')
    assert answer.header("retry-after") == "11"
    assert numbers(*house.replicas) == [1, 0]
    line = await the_line(house)
    assert (line["status"], line["attempts"]) == (status, 1)
    assert house.member("a").failures_total - failures == (status in (500, 502, 504))


ENDLESS = {
    "head": ("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 300_000, False),
    "field": ("HTTP/1.1 200 OK\r\nX: " + "y" * 2_000_000, False),
    "interim answers": ("HTTP/1.1 102 Processing\r\n\r\n" * 100_000, False),
    "trailers": ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n" + "X: y\r\n" * 300_000, True),
    "chunk extension": ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n2;" + "x" * 2_000_000, True),
    "head, and then a body": ("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 20_000 + "Content-Length: 2\r\n\r\nhi", False),
}


@pytest.mark.parametrize("row", **each(ENDLESS))
@in_house
async def test_what_a_replica_says_beside_a_body_has_an_end(house: House, row: tuple[str, bool]) -> None:
    raw, has_begun = row
    a = house.replicas[0]
    a.set(raw=raw, raw_then="hang")
    answer = await house.ask(POST)
    if has_begun:
        assert (answer.status, answer.body, answer.is_whole) == (200, b"hi", False)
    else:
        assert (answer.status, answer.error["code"]) == (502, "replica_bad_answer")
    await a.seen.until(lambda seen: seen.last.outcome == "client_left")
    assert len(answer.headers) < 20


MANGLED = {
    "no HTTP": "hello\r\n\r\n",
    "another protocol": "ICY 200 OK\r\n\r\n",
    "no status": "HTTP/1.1 OK\r\n\r\n",
    "a status of four digits": "HTTP/1.1 2000 OK\r\n\r\n",
    "a status of 0 and a body": "HTTP/1.1 000 OK\r\n\r\nhello",
    "a status of 99, a length and a body": "HTTP/1.1 099 OK\r\nContent-Length: 5\r\n\r\nhello",
    "an upgrade": "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxyz",
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length and chunks": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length that is none": "HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
    "a bare CR in a field": "HTTP/1.1 200 OK\r\nA: b\rX: y\r\nContent-Length: 0\r\n\r\n",
    "a NUL in a field": "HTTP/1.1 200 OK\r\nA: b\0c\r\nContent-Length: 0\r\n\r\n",
    "bare LFs": "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "a folded field": "HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    "a status below 100": "HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("raw", **each(MANGLED))
@in_house
async def test_answer_that_is_no_http(house: House, raw: str) -> None:
    """An answer that is not HTTP becomes a 502, and its connection is closed."""
    house.replicas[0].set(raw=raw)
    failures = house.member("a").failures_total
    answer = await house.ask(POST)
    assert (answer.status, answer.error["code"]) == (502, "replica_bad_answer")
    assert numbers(*house.replicas) == [1, 0]
    await house.at_rest()
    assert house.balancer.destination.pool.idle_connection(house.member("a").address) is None
    assert house.member("a").failures_total - failures == 1


# For every fault

FAULTS = {
    **{
        cut: {"cut": cut} for cut in ("before_head", "mid_head", "after_head", "after_tokens", "mid_event", "mid_chunk")
    },
    **{f"hang {hang}": {"hang": hang} for hang in ("before_head", "after_head", "after_tokens")},
    "race": {"race": True},
    "500": {"status": 500},
    "503": {"status": 503},
}


@pytest.fixture(scope="module")
def impatient_house() -> Iterator[House]:
    with kept({}, {}, first_byte_timeout=0.2, idle_timeout=0.2, ejection_time=0.001, queue_timeout=0.9) as house:
        yield house


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", **each(FAULTS))
def test_no_fault_repeats_too_often(impatient_house: House, fault: dict[str, object], stream: bool) -> None:
    """No fault makes a POST generate three times, or generate twice at one member."""

    @in_house
    async def met(house: House) -> None:
        for _ in range(2 if "race" in fault else 0):  # a race needs kept connections
            await house.ask(POST)
        warm = sum(replica.seen.generations_started for replica in house.replicas)
        for replica in house.replicas:
            replica.set(**fault)
        body = chat(stream=stream, padding=str(fault))  # the same request would be refused after two deaths
        answer = await house.ask(request(body=body, headers=(("X-Request-Id", "once"),)))
        await house.at_rest()
        assert sum(replica.seen.generations_started for replica in house.replicas) - warm <= 2
        for replica in house.replicas:
            assert (
                len([r for r in replica.seen.requests if r.id == "once" and r.outcome != "raced" and r.generated]) <= 1
            )
        if answer.status == 200 and "race" not in fault:
            assert b"[DONE]" not in answer.body
            assert not (answer.is_whole and stream)

    met(impatient_house)
