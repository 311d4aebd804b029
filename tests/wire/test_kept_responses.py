"""/v1/responses that build on others, or ask for one: they go to the replica that keeps it, or are refused clearly."""

import asyncio
from pathlib import Path

import orjson
import pytest

from balancer.fleet.address import ReplicaAddress
from balancer.relay import kept_responses
from balancer.relay.kept_responses import KeptResponses
from tests.lab.replica import LabReplica
from tests.support.client import Answer, request
from tests.support.until import until
from tests.wire.running import House, on_uvloop, serving
from tests.wire.test_accounts import Office, office

PATH = "/v1/responses"


def body(previous: str | None = None, **more: object) -> bytes:
    return orjson.dumps({"model": "lab", "input": "x", "previous_response_id": previous, **more})


async def created(house: House, replicas: dict[str, LabReplica], number: int) -> tuple[str, str]:
    """A new answer's id, and the replica that has it."""
    for name, replica in replicas.items():
        replica.set(body=f'{{"id": "resp_{name}{number}", "object": "response", "status": "completed"}}')
    answer = await house.ask(request(path=PATH, body=body()))
    name = answer.header("x-replica-id") or ""
    return f"resp_{name}{number}", name


@on_uvloop
async def test_what_builds_on_an_answer_goes_where_it_is_kept() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        replicas = {"a": a, "b": b}
        made = [await created(house, replicas, number) for number in range(4)]
        assert {name for _, name in made} == {"a", "b"}
        for id_, name in made * 2:
            large = body(id_, metadata={"filler": "y" * 50_000})
            explained = request(path=PATH, body=body(id_, stream=True), headers=(("X-Route-Explain", "1"),))
            why = (await house.ask(explained)).header("x-route-reason") or ""
            assert why.startswith("keeps the answer; ")
            for ask in (
                request(path=PATH, body=body(id_, stream=True)),
                request(path=PATH, body=large),
                request("GET", f"{PATH}/{id_}"),
                request("POST", f"{PATH}/{id_}/cancel", body=b""),
            ):
                answer = await house.ask(ask, "GET" if ask.startswith(b"GET") else "POST")
                assert (answer.status, answer.header("x-replica-id")) == (200, name)


@on_uvloop
async def test_a_stream_is_known_from_its_first_event_on() -> None:
    """Its client may go on from its last event before the replica has ended the body."""
    first = 'data: {"type":"response.created","response":{"id":"resp_early","object":"response"}}\n\n'
    raw = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + first
    async with LabReplica(body="{}") as a, LabReplica(body="{}") as b, serving(a, b) as house:
        for replica in (a, b):
            replica.next(raw=raw, raw_then="hang")
        client = await house.client()
        await client.send(request(path=PATH, body=body(stream=True)))
        head = await client.until(b"response.created")
        name = "a" if b"X-Replica-Id: a" in head else "b"
        (a if name == "b" else b).forget_next()
        for _ in range(3):
            assert (await house.ask(request(path=PATH, body=body("resp_early")))).header("x-replica-id") == name


@on_uvloop
async def test_what_nobody_keeps_is_refused_in_openais_words() -> None:
    async with LabReplica(body="{}") as a, LabReplica(body="{}") as b, serving(a, b) as house:
        answer = await house.ask(request(path=PATH, body=body("resp_unknown")))
        assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")
        assert "--enable-response-store" in answer.error["message"]
        answer = await house.ask(request("GET", f"{PATH}/resp_unknown"), "GET")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert a.seen.requests == b.seen.requests == []


@on_uvloop
async def test_a_single_replica_answers_for_itself() -> None:
    """It may know of it from before the balancer was started."""
    async with LabReplica(body="{}") as a, serving(a) as house:
        assert (await house.ask(request(path=PATH, body=body("resp_unknown")))).status == 200
        assert (await house.ask(request("GET", f"{PATH}/resp_unknown"), "GET")).status == 200


@on_uvloop
async def test_no_other_replica_is_asked_when_its_keeper_goes() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        id_, name = await created(house, {"a": a, "b": b}, 1)
        keeper, other = (a, b) if name == "a" else (b, a)
        before = len(other.seen.requests)
        keeper.next(cut="before_head")
        assert (await house.ask(request(path=PATH, body=body(id_)))).status == 502
        house.balancer.service.fleet.drain(house.member(name))
        for ask in (request(path=PATH, body=body(id_)), request("GET", f"{PATH}/{id_}")):
            answer = await house.ask(ask, "GET" if ask.startswith(b"GET") else "POST")
            assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")
            assert name in answer.error["message"]
        assert len(other.seen.requests) == before


@on_uvloop
async def test_it_waits_for_its_own_replica_and_holds_nobody_up() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b, max_in_flight=1) as house:
        id_, name = await created(house, {"a": a, "b": b}, 1)
        keeper = a if name == "a" else b
        keeper.next(hang="before_head")
        busy = await house.client()
        await busy.send(request(path=PATH, body=body(id_)))
        await until(lambda: house.member(name).generating == 1, "its replica is busy")
        waiting = [asyncio.ensure_future(house.ask(request(path=PATH, body=body(id_)))) for _ in range(3)]
        await until(lambda: house.balancer.service.admission.queue_depth == 3, "they wait")
        assert (await house.ask(request(path=PATH, body=body()))).header("x-replica-id") != name
        busy.leave()
        answers: list[Answer] = await asyncio.gather(*waiting)
        assert {(answer.status, answer.header("x-replica-id")) for answer in answers} == {(200, name)}


@on_uvloop
async def test_its_wait_has_an_end() -> None:
    async with LabReplica() as a, LabReplica() as b, serving(a, b, max_in_flight=1, queue_timeout=0.5) as house:
        id_, name = await created(house, {"a": a, "b": b}, 1)
        (a if name == "a" else b).next(hang="before_head")
        busy = await house.client()
        await busy.send(request(path=PATH, body=body(id_)))
        await until(lambda: house.member(name).generating == 1, "its replica is busy")
        answer = await house.ask(request(path=PATH, body=body(id_)))
        assert (answer.status, answer.error["code"]) == (429, "queue_timeout")


@on_uvloop
async def test_no_other_key_gets_to_it(tmp_path: Path) -> None:
    async with LabReplica() as a, LabReplica() as b, office(tmp_path, a, b) as at:
        for replica in (a, b):
            replica.set(body='{"id": "resp_hers"}')
        alice, mallory = await at.add("alice"), await at.add("mallory")
        assert (await at.ask(alice, body(), PATH)).status == 200
        assert (await at.ask(alice, body("resp_hers"), PATH)).status == 200
        assert (await at.ask(mallory, body("resp_hers"), PATH)).status == 400


@on_uvloop
async def test_no_other_key_gets_to_a_lone_replicas_answers(tmp_path: Path) -> None:
    """However its request is spelled; nor is one taken over by choosing its id, which SGLang lets clients do."""
    async with LabReplica(body='{"id": "resp_hers"}') as lab, office(tmp_path, lab) as at:
        alice, mallory = await at.add("alice"), await at.add("mallory")
        assert (await at.ask(alice, body(), PATH)).status == 200
        assert (await at.ask(mallory, body(request_id="resp_hers"), PATH)).status == 200
        before = len(lab.seen.requests)
        plain = body("resp_hers")
        escaped = plain.replace(b"previous_response_id", b"previous\\u005fresponse_id")
        for asked in (
            *(plain, escaped, plain.decode().encode("utf-16"), plain.decode().encode("utf-32-be")),
            *(body("resp_of_an_earlier_process"), body("resp_" + "x" * 200), body("?")),
        ):
            assert (await at.ask(mallory, asked, PATH)).error["code"] == "previous_response_not_found", asked
        for method, path in (("GET", f"{PATH}/resp_hers"), ("POST", f"{PATH}/resp_hers/cancel")):
            asked = request(method, path, body=b"", headers=(("Authorization", f"Bearer {mallory}"),))
            assert (await at.house.ask(asked, method)).status == 404
        assert len(lab.seen.requests) == before
        assert (await at.ask(alice, plain, PATH)).status == 200
        assert (await at.ask(alice, escaped, PATH)).status == 200


@on_uvloop
async def test_it_is_known_after_a_restart(tmp_path: Path) -> None:
    async with LabReplica(body='{"id": "resp_a"}') as a, LabReplica(body='{"id": "resp_b"}') as b:
        async with office(tmp_path, a, b) as at:
            key, other = await at.add("alice"), await at.add("bob")
            made = {(await at.ask(key, body(), PATH)).header("x-replica-id") for _ in range(4)}
            assert made == {"a", "b"}
        async with office(tmp_path, a, b) as at:
            for name in ("a", "b") * 2:
                answer = await at.ask(key, body(f"resp_{name}"), PATH)
                assert (answer.status, answer.header("x-replica-id")) == (200, name)
            assert (await at.ask(other, body("resp_a"), PATH)).status == 400, "it is another key's"
            assert (await at.ask(key, body("resp_c"), PATH)).status == 400, "nobody ever made it"


@on_uvloop
async def test_a_name_that_is_issued_again_inherits_nothing(tmp_path: Path) -> None:
    """A key keeps its answers when it is rotated; whoever gets its name after its end is somebody else."""

    async def statuses(at: Office, key: str) -> list[int]:
        """Of a request that builds on it, one that asks for it, and one to delete it."""
        statuses = [(await at.ask(key, body("resp_hers"), PATH)).status]
        for method in ("GET", "DELETE"):
            asked = request(method, f"{PATH}/resp_hers", body=b"", headers=(("Authorization", f"Bearer {key}"),))
            statuses.append((await at.house.ask(asked, method)).status)
        return statuses

    async with LabReplica(body='{"id": "resp_hers"}') as lab:
        async with office(tmp_path, lab) as at:
            first = await at.add("alice")
            assert (await at.ask(first, body(), PATH)).status == 200
            first = (await at.told("POST", "/keys/alice/rotate"))["key"]
            assert await statuses(at, first) == [200, 200, 200]
        async with office(tmp_path, lab) as at:
            assert await statuses(at, first) == [200, 200, 200]
            for _ in range(2):
                await at.told("DELETE", "/keys/alice")
                key = await at.add("alice")
                assert await statuses(at, key) == [400, 404, 404]
            lab.set(body='{"id": "resp_new"}')
            assert (await at.ask(key, body(), PATH)).status == 200
        async with office(tmp_path, lab) as at:
            assert await statuses(at, key) == [400, 404, 404]
            assert (await at.ask(key, body("resp_new"), PATH)).status == 200


@on_uvloop
async def test_what_comes_after_a_revocation_is_nobodys(tmp_path: Path) -> None:
    """An answer that was asked for with the former key, and begins when another one has its name."""
    async with LabReplica(body='{"id": "resp_late"}') as lab, office(tmp_path, lab) as at:
        first = await at.add("alice")
        lab.next(head_delay=1.0)
        late = asyncio.ensure_future(at.ask(first, body(), PATH))
        await until(lambda: lab.seen.requests, "it is under way")
        await at.told("DELETE", "/keys/alice")
        second = await at.add("alice")
        assert (await late).status == 200
        assert (await at.ask(second, body("resp_late"), PATH)).status == 400


@on_uvloop
async def test_a_new_process_waits_for_its_replicas(tmp_path: Path) -> None:
    """Requests come before the controller's list does."""
    async with LabReplica(body='{"id": "resp_a"}') as a, LabReplica(body='{"id": "resp_b"}') as b:
        async with office(tmp_path, a, b) as at:
            made = [await at.ask(body=body(), path=PATH) for _ in range(2)]
            name = made[0].header("x-replica-id")
            await at.house.balancer.accounts.ledger.written()  # type: ignore[union-attr]
        async with office(tmp_path) as at:
            waiting = asyncio.ensure_future(at.ask(body=body(f"resp_{name}"), path=PATH))
            await asyncio.sleep(0.2)
            listed = [{"name": "a", "endpoint": a.url, "id": 1}, {"name": "b", "endpoint": b.url, "id": 2}]
            await at.told("PUT", "/replicas", json={"replicas": listed})
            answer = await waiting
            assert (answer.status, answer.header("x-replica-id")) == (200, name)


@on_uvloop
async def test_a_keeper_that_left_meanwhile_is_not_waited_for(tmp_path: Path) -> None:
    async with LabReplica(body='{"id": "resp_a"}') as a, LabReplica(body="{}") as b, LabReplica(body="{}") as c:
        async with office(tmp_path, a) as at:
            assert (await at.ask(body=body(), path=PATH)).status == 200
        async with office(tmp_path, b, c) as at:
            answer = await at.ask(body=body("resp_a"), path=PATH)
            assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_responses, "MOST", 3)
    kept, replica = KeptResponses(), ReplicaAddress.of("a", "http://127.0.0.1:1")
    for number in range(4):
        kept.learn(f"resp_{number}", replica, "")
        assert kept.keeper("resp_0", "") is replica, "it was used last"
    assert kept.keeper("resp_1", "") is None
    kept.forget(replica)
    assert kept.keeper("resp_3", "") is None
