"""A balancer of several processes behaves as one: whatever is promised of one process holds for all together."""

import asyncio
import contextlib
import signal
from pathlib import Path

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.relay.continuation.answering import plain, request_for
from tests.support.client import CHAT, Ended, chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop
from tests.workers.running import ADMIN_KEY, Workers, relay_of, workers

LONG = request(body=chat(stream=True, tokens=200))
LONG_PROMPT = "All requests here begin with this sentence, which is long enough for a block. " * 20


def generated(replica: LabReplica) -> int:
    return sum(one.generated for one in replica.seen.requests)


async def counted(at: Workers, count: int) -> None:
    async def is_counted() -> bool:
        return await at.requests() == count

    await at.until(is_counted)


@on_uvloop
async def test_all_is_counted_and_shown_as_if_by_one_process() -> None:
    """Metrics, status, access log and the balancer's own paths are whole, whichever relay had a request."""
    async with LabReplica() as a, LabReplica() as b, workers(a.url, b.url) as at:
        answers = [answer for _ in range(4) for answer in await at.ask_each()]
        assert {answer.status for answer in answers} == {200}
        assert len({relay_of(answer) for answer in answers}) == 2
        assert len({answer.header("x-request-id") for answer in answers}) == 8
        assert generated(a) == generated(b) == 4  # round robin over both relays
        await counted(at, 8)
        service = await at.service()
        assert (service["arrived_total"], service["in_flight"], service["ready"]) == (8, 0, 2)
        lines = [orjson.loads(line) for line in at.balancer.printed.splitlines()]
        assert sum(line["path"] == "/v1/chat/completions" for line in lines) == 8
        info = await at.ask(request("GET", "/server_info"), "GET")
        assert info.status == 200
        assert info.header("x-replica-id") in ("replica-1", "replica-2")
        assert orjson.loads((await at.ask(request("GET", "/health"), "GET")).body)["ready"] == 2


@on_uvloop
async def test_a_prefix_is_found_from_every_relay() -> None:
    """prefix_aware's index is one: relays send hashes of the prompt, and the other relay's request matches."""
    body = orjson.dumps({"messages": [{"role": "user", "content": LONG_PROMPT}], "max_tokens": 2})
    asked = request(body=body, headers=(("X-Route-Explain", "1"),))
    arguments = ("--policy", "prefix_aware")
    async with LabReplica() as a, LabReplica() as b, workers(a.url, b.url, arguments=arguments) as at:
        replicas, reasons = set(), []
        for client in await at.one_each():
            await client.send(asked)
            answer = await client.answer()
            replicas.add(answer.header("x-replica-id"))
            reasons.append(str(answer.header("x-route-reason")).partition(";")[0])
        assert reasons == ["room", "prefix"]
        assert len(replicas) == 1


@on_uvloop
async def test_the_queue_is_one_for_all_relays() -> None:
    """A request at one relay waits for the place that one at the other has; a client that leaves frees its turn."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url, max_in_flight=1) as at:
        first, second = await at.one_each()
        third = await at.balancer.client()
        await first.send(request(body=chat(stream=True, tokens=40)))
        await first.until(b"t00")
        await third.send(request(body=chat()))
        await at.shows(queue_depth=1)
        third.leave()
        await at.shows(queue_depth=0)
        await second.send(request(body=chat()))
        assert (await second.answer()).status == 200
        assert generated(a) == 2


def with_accounts(folder: Path) -> tuple[str, ...]:
    """The arguments of a balancer that keeps keys and usage there."""
    admin = folder / "admin"
    admin.write_text(ADMIN_KEY)
    return "--state", str(folder / "state"), "--admin-key", str(admin)


@on_uvloop
async def test_limits_of_keys_hold_for_all_relays(tmp_path: Path) -> None:
    """max_in_flight, requests a minute and usage are those of the key, not of the key at one relay."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url, arguments=with_accounts(tmp_path)) as at:

        async def issue(name: str, **terms: int) -> tuple[tuple[str, str], ...]:
            answer = await at.admin.post(f"/keys/{name}", json=terms)
            return (("Authorization", f"Bearer {answer.json()['key']}"),)

        alice = await issue("alice", max_in_flight=2)
        await at.ask(request("GET", "/v1/models", headers=alice), "GET")
        streams = []
        for _ in range(2):
            client = await at.balancer.client()
            await client.send(request(body=chat(stream=True, tokens=400), headers=alice))
            await client.until(b"t00")
            streams.append(client)
        for answer in await at.ask_each(request(body=chat(), headers=alice)):
            assert (answer.status, answer.error["code"]) == (429, "key_at_limit")
        for client in streams:
            client.leave()

        async def has_room() -> bool:
            return (await at.ask(request(body=chat(), headers=alice))).status == 200

        await at.until(has_room)

        bob = await issue("bob", requests_per_minute=3)
        asked = request(body=chat(), headers=bob)
        statuses = [answer.status for _ in range(3) for answer in await at.ask_each(asked)]
        assert sorted(statuses) == [200, 200, 200, 429, 429, 429]

        async def is_noted() -> bool:
            rows = (await at.admin.get("/usage", params={"by": "key"})).json()["data"]
            return sum(row["requests"] for row in rows if row["key"] == "bob") == 3

        await at.until(is_noted)


@on_uvloop
async def test_a_relay_gives_back_only_what_its_key_still_holds(tmp_path: Path) -> None:
    """A limit that is set while a request is under way gets nothing of what that took before."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url, arguments=with_accounts(tmp_path)) as at:
        answer = await at.admin.post("/keys/alice", json={"tokens_per_day": 10_000})
        alice = (("Authorization", f"Bearer {answer.json()['key']}"),)
        clients = []
        for tokens in (4000, 700):
            client = await at.balancer.client()
            await client.send(request(body=chat(stream=True, tokens=tokens), headers=alice))
            await client.until(b"t00")
            clients.append(client)
            terms = {"tokens_per_day": 10_000, "tokens_per_minute": 1000}
            assert (await at.admin.put("/keys/alice", json=terms)).status_code == 200
        clients[0].leave()

        async def is_settled() -> bool:
            return (await at.admin.get("/usage", params={"by": "key"})).json()["data"] != []

        await at.until(is_settled)
        answer = await at.ask(request(body=chat(), headers=alice))
        assert (answer.status, answer.header("x-ratelimit-limit-tokens")) == (200, "1000")
        assert 100 < int(answer.header("x-ratelimit-remaining-tokens") or 0) < 500
        clients[1].leave()


@on_uvloop
async def test_a_relay_that_is_killed_takes_only_its_connections() -> None:
    """The other relay's streams go on, counts stay, its places are given back, and another takes its place."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url) as at:
        for _ in range(4):
            await at.ask()
        await counted(at, 4)
        clients = await at.one_each()
        for client in clients:
            await client.send(LONG)
            await client.until(b"t00")
        await at.kill(at.relays[0])
        ends = []
        for client in clients:
            with contextlib.suppress(Ended, ConnectionError):
                await client.until(b"data: [DONE]\n\n")
                ends.append(client)
        assert len(ends) == 1
        await counted(at, 5)
        await at.shows(in_flight=0)
        first, second = await at.one_each()  # both relays serve again
        for client in (first, second):
            await client.send(request(body=chat()))
            assert (await client.answer()).status == 200


@on_uvloop
async def test_a_coordinator_that_is_killed_is_told_what_is_held() -> None:
    """Streams go on, requests that come meanwhile wait, and the places of both relays count at the next coordinator."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url, max_in_flight=2) as at:
        clients = await at.one_each()
        for client in clients:
            await client.send(LONG)
            await client.until(b"t00")
        waiting = await at.balancer.client()
        await waiting.send(request(body=chat()))  # in the queue: both places are taken
        await at.shows(queue_depth=1)
        await at.kill(at.coordinator)
        await at.shows(in_flight=2, queue_depth=1)
        assert generated(a) == 2
        assert (await waiting.answer()).status == 200
        for client in clients:
            await client.until(b"data: [DONE]\n\n")
        await at.shows(in_flight=0)


@on_uvloop
async def test_a_new_coordinator_gives_up_no_request_at_a_live_replica() -> None:
    """It does not know yet that the replica said lately that it is alive, but the relays do."""
    async with LabReplica(head_delay=4) as a, workers(a.url, idle_timeout=1) as at:
        client = await at.balancer.client()
        await client.send(request(body=chat()))
        await asyncio.sleep(1.5)
        await at.kill(at.coordinator)
        assert (await client.answer()).status == 200
        assert generated(a) == 1


@on_uvloop
async def test_kills_under_load_lose_only_what_the_killed_had() -> None:
    """With a coordinator killed thrice under load, no request fails; nothing is left counted at the end."""
    async with LabReplica() as a, LabReplica() as b, workers(a.url, b.url) as at:
        statuses: list[int] = []
        is_over = False

        async def ask() -> None:
            client = await at.balancer.client()
            while not is_over:
                await client.send(request(body=chat(stream=True, tokens=3)))
                statuses.append((await client.answer()).status)

        load = [asyncio.ensure_future(ask()) for _ in range(8)]
        for _ in range(3):
            before = len(statuses)
            await until(lambda before=before: len(statuses) > before + 20, "requests are answered", 30)
            await at.kill(at.coordinator)
            at.coordinator = at.children()[-1]
        before = len(statuses)
        await until(lambda: len(statuses) > before + 20, "requests are answered", 30)
        is_over = True
        await asyncio.gather(*load)
        assert set(statuses) == {200}
        await at.shows(in_flight=0)


@on_uvloop
async def test_a_stream_goes_on_elsewhere_and_a_killer_is_refused() -> None:
    """Continuation works through the coordinator; what killed two replicas is refused by every relay."""
    async with LabReplica() as a, LabReplica() as b, LabReplica() as c, workers(a.url, b.url, c.url) as at:
        stream = request(body=orjson.dumps(request_for(CHAT, 6)))
        whole = plain((await at.ask(stream)).body)
        a.set(cut="after_tokens", cut_after=3)
        answers = [await at.ask(stream) for _ in range(3)]
        assert sum(b": continued on " in answer.body for answer in answers) == 1
        for answer in answers:
            assert answer.is_whole
            assert plain(answer.body) == whole
        for replica in (a, b, c):
            replica.set(cut="", poison="bad")
        bad = request(body=chat(padding="bad"))
        killed = await at.ask(bad)
        assert killed.status in (502, 503)
        for refused in await at.ask_each(bad):
            assert (refused.status, refused.error["code"]) == (422, "kills_replicas")


@on_uvloop
async def test_settings_reach_every_relay(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    text = "service:\n  readiness_probe: /health\n  replicas: 1\nx-groundserve:\n  max_body_bytes: {}\nrun: sglang\n"
    file.write_text(text.format(100_000))
    async with LabReplica() as a, workers(a.url, arguments=("--service", str(file))) as at:
        big = request(body=chat(padding="x" * 2_000))
        clients = await at.one_each()
        for client in clients:
            await client.send(big)
            assert (await client.answer()).status == 200
        file.write_text(text.format(1_000))

        async def is_refused() -> bool:
            return {answer.status for answer in await at.ask_each(big)} == {413}

        await at.until(is_refused)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@on_uvloop
async def test_no_process_is_left_behind(number: signal.Signals) -> None:
    """SIGTERM drains: a stream is finished, and the status is 0. A supervisor that is killed takes all along."""
    async with LabReplica(token_interval=0.01) as a, workers(a.url, drain_grace=0.1) as at:
        client = await at.balancer.client()
        await client.send(request(body=chat(stream=True, tokens=50)))
        await client.until(b"t00")
        children = at.children()
        at.balancer.signal(number)
        if number == signal.SIGTERM:
            await client.until(b"data: [DONE]\n\n")
            client.leave()
        assert await at.balancer.end() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        await until(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in children), "all have ended", 10)


@on_uvloop
async def test_what_builds_on_an_answer_finds_it_from_every_relay() -> None:
    """Each relay hears where an answer is kept, whichever passed it on."""
    path, made_a, made_b = "/v1/responses", LabReplica(body='{"id": "resp_a"}'), LabReplica(body='{"id": "resp_b"}')
    async with made_a as a, made_b as b, workers(a.url, b.url) as at:
        names = {"resp_a": "replica-1", "resp_b": "replica-2"}
        made = {(await at.ask(request(path=path, body=b"{}"))).header("x-replica-id") for _ in range(2)}
        assert made == set(names.values())
        body = b'{"previous_response_id": "%b"}'
        for id_, name in names.items():

            async def is_known(asked: bytes = request(path=path, body=body % id_.encode())) -> bool:
                return {(await at.ask(asked)).status for _ in range(4)} == {200}

            await at.until(is_known)
            answers = [await at.ask(request(path=path, body=body % id_.encode())) for _ in range(16)]
            assert {answer.header("x-replica-id") for answer in answers} == {name}
            assert len({relay_of(answer) for answer in answers}) == 2
        assert (await at.ask(request("GET", f"{path}/resp_a"), "GET")).header("x-replica-id") == "replica-1"


@on_uvloop
async def test_no_relay_gives_answers_to_a_names_next_holder(tmp_path: Path) -> None:
    path, made = "/v1/responses", LabReplica(body='{"id": "resp_hers"}')
    async with made as a, workers(a.url, arguments=with_accounts(tmp_path)) as at:

        async def issued(how: str = "") -> tuple[tuple[str, str], ...]:
            answer = await at.admin.post(f"/keys/alice{how}", json={})
            return (("Authorization", f"Bearer {answer.json()['key']}"),)

        async def get(key: tuple[tuple[str, str], ...], status: int) -> None:
            """Waits until all relays say this."""

            async def is_said() -> bool:
                asked = request(path=path, body=b'{"previous_response_id": "resp_hers"}', headers=key)
                answers = [await at.ask(asked) for _ in range(8)]
                return {answer.status for answer in answers} == {status}

            await at.until(is_said)

        first = await issued()
        answer = None
        while answer is None or answer.status == 401:  # its relay has not heard of the key yet
            answer = await at.ask(request(path=path, body=b"{}", headers=first))
        await get(first, 200)
        await get(await issued("/rotate"), 200)
        await at.admin.delete("/keys/alice")
        second = await issued()
        await get(second, 400)
        for pid in (*at.relays, at.coordinator):
            await at.kill(pid)
        await get(second, 400)


@on_uvloop
async def test_who_keeps_an_answer_outlives_every_process(tmp_path: Path) -> None:
    path, made_a, made_b = "/v1/responses", LabReplica(body='{"id": "resp_a"}'), LabReplica(body='{"id": "resp_b"}')
    arguments = ("--state", str(tmp_path / "state"))
    async with made_a as a, made_b as b, workers(a.url, b.url, arguments=arguments) as at:
        made = {(await at.ask(request(path=path, body=b"{}"))).header("x-replica-id") for _ in range(2)}
        assert made == {"replica-1", "replica-2"}

        async def is_written() -> bool:
            rows = (await at.admin.get("/usage", params={"by": "key"})).json()["data"]
            return sum(row["requests"] for row in rows) == 2

        await at.until(is_written)
        for pid in (at.relays[0], at.relays[1], at.coordinator):
            await at.kill(pid)
        for id_, name in (("resp_a", "replica-1"), ("resp_b", "replica-2")) * 4:
            answer = await at.ask(request(path=path, body=b'{"previous_response_id": "%b"}' % id_.encode()))
            assert (answer.status, answer.header("x-replica-id")) == (200, name)
