"""Keys that are issued on the admin port, what is counted for them, and the limits that they are held to."""

import asyncio
import base64
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from balancer.accounts.store import Store
from tests.lab.replica import LabReplica
from tests.support.client import CHAT, Answer, chat, request
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving

ADMIN = "the-admin-key"


class Office:
    """A balancer that keeps accounts, and its admin port."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._client = httpx.AsyncClient(
            base_url=house.balancer.admin_endpoint, headers={"Authorization": f"Bearer {ADMIN}"}, trust_env=False
        )

    async def told(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        answer = await self._client.request(method, path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def add(self, name: str = "alice", **terms: Any) -> str:
        key: str = (await self.told("POST", f"/keys/{name}", json=terms))["key"]
        return key

    async def ask(self, key: str = "", body: bytes | None = None, path: str = CHAT, **fields: str) -> Answer:
        headers = (*(("Authorization", f"Bearer {key}"),) * bool(key), *fields.items())
        return await self.house.ask(request(path=path, body=body or chat(), headers=headers))

    async def usage(self, by: str = "key") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (await self.told("GET", "/usage", params={"by": by}))["data"]
        return rows

    async def close(self) -> None:
        await self._client.aclose()


@contextlib.asynccontextmanager
async def office(folder: Path, *replicas: LabReplica, **more: Any) -> AsyncIterator[Office]:
    config = {"state": folder / "state", "admin_key": ADMIN, **more.pop("config", {})}
    async with serving(*replicas, config=config, **more) as house:
        one = Office(house)
        try:
            yield one
        finally:
            await one.close()


@on_uvloop
async def test_the_first_key_closes_the_door_for_everyone_else(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        assert (await at.ask()).status == 200
        key = await at.add()
        assert (await at.ask()).status == 401
        assert (await at.ask(key)).status == 200
        assert lab.seen.last.header("authorization") is None
        await at.told("DELETE", "/keys/alice")
        assert (await at.ask(key)).status == 401
        assert (await at.ask()).status == 401, "the last key's end lets nobody in"
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        assert (await at.ask()).status == 401, "nor does a restart"
        assert (await at.told("GET", "/keys"))[0]["revoked"]


@on_uvloop
async def test_a_rotated_key_has_a_new_secret_and_the_old_limits(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        old = await at.add(requests_per_minute=2)
        digest = hashlib.sha256(old.encode()).hexdigest()
        await at.add("bob")
        for path in ("/keys/carol", "/keys/bob/rotate"):
            said = await at.told("POST", path, 422, json={}, params={"digest": digest})
            assert "another key has this secret" in said["error"]["message"]
        assert (await at.ask(old)).status == 200
        new = (await at.told("POST", "/keys/alice/rotate"))["key"]
        assert old != new
        assert (await at.ask(old)).status == 401
        assert (await at.ask(new)).status == 200
        assert (await at.ask(new)).status == 429


@on_uvloop
async def test_a_key_gets_other_limits_and_keeps_its_secret(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(requests_per_minute=1, models=["other"])
        assert (await at.ask(key)).status == 403
        assert await at.told("PUT", "/keys/alice", json={"requests_per_minute": 100}) == {"changed": "alice"}
        answers = [await at.ask(key) for _ in range(3)]
        assert [answer.status for answer in answers] == [200] * 3
        assert answers[-1].header("x-ratelimit-limit-requests") == "100"
        assert await at.usage()
        await at.told("PUT", "/keys/alice", json={"requests_per_day": 5})
        assert [(await at.ask(key)).status for _ in range(3)] == [200, 429, 429], "what it used today counts"
        assert [row["name"] for row in await at.told("GET", "/keys")] == ["alice"]
        await at.told("PUT", "/keys/alice", 422, json={"requests_per_day": 0})
        said = await at.told("PUT", "/keys/bob", 422, json={})
        assert "no key bob in use" in said["error"]["message"]


@on_uvloop
async def test_a_change_of_other_terms_refills_nothing(tmp_path: Path) -> None:
    """Nor does a request that was under way then pay into what it took nothing from."""
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(requests_per_minute=2, tokens_per_day=10_000)
        assert (await at.ask(key)).status == 200
        lab.next(hang="before_head")
        client = await at.house.client()
        await client.send(request(body=chat(9000), headers=(("Authorization", f"Bearer {key}"),)))
        await lab.seen.until(lambda seen: len(seen.requests) == 2)

        def left() -> list[float]:
            return [bucket.left for bucket in at.house.balancer.keys.named("alice").quota.tokens]  # type: ignore[union-attr]

        (before,) = left()
        terms = {"requests_per_minute": 2, "tokens_per_day": 10_000, "priority": "bulk"}
        await at.told("PUT", "/keys/alice", json=terms)
        assert (await at.ask(key)).status == 429
        await at.told("PUT", "/keys/alice", json={**terms, "tokens_per_minute": 500})
        assert (await at.ask(key)).status == 429
        assert left() == [500, pytest.approx(before, abs=10)]
        at.house.balancer.keys.named("alice").quota.tokens[0].left = 100.0  # type: ignore[union-attr]
        client.leave()
        await at.house.at_rest()
        assert await at.usage()
        assert left() == [pytest.approx(100, abs=50), pytest.approx(10_000, abs=500)]


@on_uvloop
async def test_only_the_admin_key_changes_keys(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        wrong = {"Authorization": "Bearer wrong"}
        for method, path in (
            ("POST", "/keys/a"),
            ("POST", "/keys/a/rotate"),
            ("PUT", "/keys/a"),
            ("DELETE", "/keys/a"),
        ):
            await at.told(method, path, 401, headers=wrong, json={})
        assert await at.told("GET", "/keys") == []
    async with LabReplica() as lab, office(tmp_path, lab, config={"admin_key": None}) as at:
        said = await at.told("POST", "/keys/a", 403, json={})
        assert "--admin-key" in said["error"]["message"]
    async with LabReplica() as lab, office(tmp_path, lab, config={"state": None}) as at:
        for method, path in (("GET", "/keys"), ("POST", "/keys/a"), ("GET", "/usage")):
            said = await at.told(method, path, 404, json={})
            assert "--state FOLDER" in said["error"]["message"]


WRONG = {
    "a count of nothing": {"max_in_flight": 0},
    "a text for a number": {"tokens_per_day": "5M"},
    "no date": {"expires": "tomorrow"},
    "another priority": {"priority": "urgent"},
    "too many models": {"models": ["m"] * 101},
}


@pytest.mark.parametrize("terms", **each(WRONG))
@on_uvloop
async def test_terms_that_mean_nothing_are_refused(terms: dict[str, Any], tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        await at.told("POST", "/keys/alice", 422, json=terms)
        assert await at.told("GET", "/keys") == []
        await at.told("POST", "/keys/a%20b", 422, json={})


@on_uvloop
async def test_an_expired_key_lets_nobody_in(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        past, future = await at.add("past", expires="2020-01-01"), await at.add("future", expires="2999-01-01")
        assert (await at.ask(past)).status == 401
        assert (await at.ask(future)).status == 200


@on_uvloop
async def test_a_file_of_keys_goes_on_working_beside_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-of-the-file\n")
    async with LabReplica() as lab, office(tmp_path, lab, config={"api_keys": tmp_path / "keys"}) as at:
        assert (await at.ask("sk-of-the-file")).status == 200
        issued = await at.add()
        assert (await at.ask("sk-of-the-file")).status == 200
        assert (await at.ask(issued)).status == 200
        assert [row["key"] for row in await at.usage()] == ["alice", "line-1"]


ASKED = {
    "whole": (CHAT, {}),
    "a stream": (CHAT, {"stream": True}),
    "a stream that wants usage": (CHAT, {"stream": True, "stream_options": {"include_usage": True}}),
    "a stream that does not": (CHAT, {"stream": True, "stream_options": {"include_usage": False}}),
    "text": ("/v1/completions", {"prompt": "once upon", "stream": True}),
    "messages": ("/v1/messages", {"stream": True}),
    "a long one": (CHAT, {"messages": [{"role": "user", "content": "word " * 20_000}], "stream": True}),
}


@pytest.mark.parametrize("row", **each(ASKED))
@on_uvloop
async def test_tokens_are_counted_whatever_the_client_asks(row: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    path, more = row
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add()
        answer = await at.ask(key, chat(7, **more), path)
        assert answer.status == 200
        wants = more.get("stream_options", {}).get("include_usage", False)
        if path != "/v1/messages" and more.get("stream"):
            assert (b'"choices":[]' in answer.body) == wants
            assert answer.body.endswith(b"data: [DONE]\n\n")
        (told,) = await at.usage("key,model")
        assert (told["key"], told["model"], told["requests"], told["failed"]) == ("alice", lab.knobs.served_model, 1, 0)
        assert told["completion_tokens"] == 7
        assert told["prompt_tokens"] > 0


@on_uvloop
async def test_without_accounts_streams_are_counted_too() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        answer = await house.ask(request(body=chat(5, stream=True)))
        assert b'"choices":[]' not in answer.body
        (line,) = await house.logged()
        assert line["completion_tokens"] == 5
    async with LabReplica() as lab, serving(lab, count_streams=False) as house:
        sent = chat(5, stream=True)
        await house.ask(request(body=sent))
        assert lab.seen.last.body == sent, "the request is passed on as it is"


@on_uvloop
async def test_a_client_that_leaves_is_counted_what_it_got(tmp_path: Path) -> None:
    async with LabReplica(token_interval=0.01) as lab, office(tmp_path, lab) as at:
        key = await at.add()
        client = await at.house.client()
        await client.send(request(body=chat(100_000, stream=True), headers=(("Authorization", f"Bearer {key}"),)))
        await client.until(b"t20")
        client.leave()
        await at.house.at_rest()
        (told,) = await at.usage()
        assert told["requests"] == 1
        assert told["failed"] == 1
        assert 20 <= told["completion_tokens"] <= lab.seen.generations_started * 100_000
        assert told["prompt_tokens"] > 0


@on_uvloop
async def test_leaving_before_the_answer_is_not_for_free(tmp_path: Path) -> None:
    """Who leaves an answer that is no stream before its end pays for what may have been made until then."""
    async with LabReplica(token_interval=1) as lab, office(tmp_path, lab) as at:
        key = await at.add(tokens_per_day=100_000)
        for tokens in (30, 90_000):
            client = await at.house.client()
            await client.send(request(body=chat(tokens), headers=(("Authorization", f"Bearer {key}"),)))
            await until(lambda: lab.generating == 1, "it generates")
            await asyncio.sleep(0.1)
            client.leave()
            await at.house.at_rest()
        (told,) = await at.usage()
        assert told["requests"] == told["failed"] == 2
        assert told["prompt_tokens"] > 0
        assert 30 + 50 <= told["completion_tokens"] < 50_000
        bucket = at.house.balancer.keys.named("alice").quota.tokens[0]  # type: ignore[union-attr]
        assert 50_000 < bucket.left <= 100_000 - 80


LINE = orjson.dumps({"model": "lab", "message": {"role": "assistant", "content": "word "}, "done": False}) + b"\n"


@pytest.mark.parametrize("end", ["left", "broken"])
@on_uvloop
async def test_a_stream_of_ollama_counts_its_lines(end: str, tmp_path: Path) -> None:
    """However many come at once, and though SGLang tells no counts in it."""
    raw = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += f"{len(LINE) * 20:x}\r\n{LINE.decode() * 20}\r\n" * 100
    asked = {"model": "lab", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(tokens_per_day=10_000)
        lab.next(raw=raw, raw_then="hang" if end == "left" else "close")
        client = await at.house.client()
        sent = request(path="/api/chat", body=orjson.dumps(asked), headers=(("Authorization", f"Bearer {key}"),))
        await client.send(sent)
        while client.received.count(b"word") < 2000:
            await client.more()
        client.leave()
        await at.house.at_rest()
        (told,) = await at.usage()
        assert told["completion_tokens"] == 2000
        assert told["prompt_tokens"] > 0
        bucket = at.house.balancer.keys.named("alice").quota.tokens[0]  # type: ignore[union-attr]
        assert bucket.left <= 8000


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/api/chat", {"options": {"num_predict": 900}}),
        ("/v1/responses", {"max_output_tokens": 900, "max_tokens": 1, "num_predict": 1}),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 900, "max_new_tokens": 1}),
        ("/generate", {"sampling_params": {"max_new_tokens": 900}, "max_tokens": 1}),
    ],
)
@on_uvloop
async def test_a_request_takes_the_most_that_it_may_use(path: str, more: dict[str, Any], tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(tokens_per_day=1000)
        lab.next(hang="before_head")
        client = await at.house.client()
        body = orjson.dumps({"model": "lab", "text": "hi", "stream": False, **more})
        await client.send(request(path=path, body=body, headers=(("Authorization", f"Bearer {key}"),)))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        bucket = at.house.balancer.keys.named("alice").quota.tokens[0]  # type: ignore[union-attr]
        assert 50 < bucket.left < 100
        client.leave()


@pytest.mark.parametrize("is_large", [False, True])
@on_uvloop
async def test_what_is_made_in_the_background_is_paid_ahead(is_large: bool, tmp_path: Path) -> None:
    queued = '{"id": "resp_a", "object": "response", "status": "queued", "usage": null}'
    filler = {"metadata": {"stream": True, "max_output_tokens": 1, "a": "x y " * 25_000}} if is_large else {}
    body = orjson.dumps({**filler, "model": "lab", "input": "hi", "background": True, "max_output_tokens": 900})
    async with LabReplica(body=queued) as lab, office(tmp_path, lab) as at:
        key = await at.add(tokens_per_day=50_000)
        assert (await at.ask(key, body, "/v1/responses")).status == 200
        await at.house.at_rest()
        (told,) = await at.usage()
        assert told["prompt_tokens"] == len(body) // 4
        assert told["completion_tokens"] == 900
        bucket = at.house.balancer.keys.named("alice").quota.tokens[0]  # type: ignore[union-attr]
        assert bucket.left == pytest.approx(50_000 - 900 - len(body) // 4, abs=5)


@on_uvloop
async def test_who_leaves_pays_for_no_bytes_of_an_image(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 1000).decode()
    told = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = orjson.dumps({"model": "lab", "max_tokens": 9, "messages": [{"role": "user", "content": told}]})
    async with LabReplica(token_interval=1) as lab, office(tmp_path, lab) as at:
        key, client = await at.add(), await at.house.client()
        await client.send(request(body=body, headers=(("Authorization", f"Bearer {key}"),)))
        await until(lambda: lab.generating == 1, "it generates")
        client.leave()
        await at.house.at_rest()
        (used,) = await at.usage()
        assert 10 < used["prompt_tokens"] < 200


@on_uvloop
async def test_requests_per_minute_are_held_to(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key, other = await at.add(requests_per_minute=2), await at.add("bob")
        answer = await at.ask(key)
        assert answer.header("x-ratelimit-limit-requests") == "2"
        assert answer.header("x-ratelimit-remaining-requests") == "1"
        assert (await at.ask(key)).status == 200
        refused = await at.ask(key)
        assert refused.status == 429
        assert refused.error["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.header("retry-after") or 0) <= 30
        assert refused.header("x-ratelimit-remaining-requests") == "0"
        unlimited = await at.ask(other)
        assert unlimited.status == 200
        assert unlimited.header("x-ratelimit-limit-requests") is None
        assert [row["requests"] for row in await at.usage()] == [2, 1], "what is refused used nothing"


@on_uvloop
async def test_usage_is_told_as_openai_does(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add()
        for _ in range(2):
            assert (await at.ask(key)).status == 200
        path, now = "/v1/organization/usage/completions", int(time.time())
        asked = {"start_time": now - 2 * 86400, "group_by": ["model", "api_key_id"]}
        told = await at.told("GET", path, params=asked)
        assert [bucket["object"] for bucket in told["data"]] == ["bucket"] * 3
        assert [bucket["start_time"] % 86400 for bucket in told["data"]] == [0] * 3
        assert [len(bucket["results"]) for bucket in told["data"]] == [0, 0, 1]
        (used,) = await at.usage("key,model")
        (result,) = told["data"][-1]["results"]
        assert (result["num_model_requests"], result["model"], result["api_key_id"]) == (2, "lab", "alice")
        assert (result["input_tokens"], result["output_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
        first = await at.told("GET", path, params={"start_time": now - 7200, "bucket_width": "1h", "limit": 2})
        assert first["has_more"]
        rest = await at.told(
            "GET", path, params={"start_time": now - 7200, "bucket_width": "1h", "page": first["next_page"]}
        )
        assert not rest["has_more"]
        (result,) = rest["data"][-1]["results"]
        assert (result["num_model_requests"], result["model"]) == (2, None)
        for wrong in ({"bucket_width": "1m"}, {"group_by": "user_id"}, {"page": "x"}):
            await at.told("GET", path, 422, params={"start_time": now, **wrong})
        await at.told("GET", path, 401, params=asked, headers={"Authorization": "Bearer wrong"})


@on_uvloop
async def test_a_page_of_usage_reads_no_more_than_it_tells(tmp_path: Path) -> None:
    """Else an early page of a long time would have too many rows."""
    hour = int(time.time()) // 3600
    Store(tmp_path / "state").write(
        [(hour - age, f"key-{key}", "m", 1, 0, 1, 1, 0) for age in range(505) for key in range(200)], {}
    )
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        asked = {"start_time": (hour - 504) * 3600, "bucket_width": "1h", "group_by": "api_key_id", "limit": 2}
        told = await at.told("GET", "/v1/organization/usage/completions", params=asked)
        assert [len(bucket["results"]) for bucket in told["data"]] == [200, 200]
        assert told["next_page"] == str((hour - 502) * 3600)
        begin = (hour // 24 - 2) * 24
        asked = {"start_time": begin * 3600, "end_time": (begin + 30) * 3600}
        told = await at.told("GET", "/v1/organization/usage/completions", params=asked)
        days = [[result["num_model_requests"] for result in bucket["results"]] for bucket in told["data"]]
        assert days == [[24 * 200], [24 * 200]], "whole days"


@on_uvloop
async def test_requests_per_day_outlive_a_restart(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(requests_per_day=3)
        assert [(await at.ask(key)).status for _ in range(2)] == [200, 200]
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        assert [(await at.ask(key)).status for _ in range(2)] == [200, 429]
        refused = await at.ask(key)
        assert "requests per day" in refused.error["message"]
        assert 3600 < int(refused.header("retry-after") or 0) <= 86400 / 3


@on_uvloop
async def test_tokens_are_estimated_before_and_settled_after(tmp_path: Path) -> None:
    async with LabReplica(hang="before_head") as lab, office(tmp_path, lab) as at:
        key = await at.add(tokens_per_minute=1000)
        client = await at.house.client()
        await client.send(request(body=chat(900, stream=True), headers=(("Authorization", f"Bearer {key}"),)))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        refused = await at.ask(key, chat(900))
        assert refused.status == 429
        assert int(refused.header("x-ratelimit-remaining-tokens") or 0) < 100
        assert 30 < int(refused.header("retry-after") or 0) <= 60
        client.leave()
        bucket = at.house.balancer.keys.named("alice").quota.tokens[0]  # type: ignore[union-attr]
        await until(lambda: bucket.left > 950, "what was not used has come back: all but the prompt")
    async with LabReplica(tokens=3) as lab, office(tmp_path, lab) as at:
        key = await at.add("bob", tokens_per_minute=1000)
        assert (await at.ask(key, chat(900))).status == 200
        bucket = at.house.balancer.keys.named("bob").quota.tokens[0]  # type: ignore[union-attr]
        await until(lambda: bucket.left > 900, "the answer was shorter than it might have been")
        assert (await at.ask(key, chat(900))).status == 200


@on_uvloop
async def test_what_is_counted_is_what_the_replicas_made(tmp_path: Path) -> None:
    """Over a run in which replicas die: the sum of what is kept is the sum of what the clients got."""
    async with (
        LabReplica(token_interval=0.002) as a,
        LabReplica(token_interval=0.002) as b,
        office(tmp_path, a, b) as at,
    ):
        keys = [await at.add(name) for name in ("alice", "bob")]
        told = {"prompt": 0, "completion": 0, "answers": 0}

        async def work(number: int) -> None:
            for turn in range(4):
                usage = {"stream": True, "stream_options": {"include_usage": True}} if turn % 2 else {}
                answer = await at.ask(keys[number % 2], chat(40, **usage))
                if answer.status != 200 or not answer.is_whole:
                    told["completion"] += answer.body.count(b'"content":" t')
                    continue
                said = answer.body
                if turn % 2:
                    said = next(event[6:] for event in said.split(b"\n\n") if b'"choices":[]' in event)
                counted = orjson.loads(said)["usage"]
                told["answers"] += 1
                told["prompt"] += counted["prompt_tokens"]
                told["completion"] += counted["completion_tokens"]

        workers = [asyncio.create_task(work(number)) for number in range(8)]
        await until(lambda: len(a.seen.requests) >= 6)
        a.fall()
        await asyncio.gather(*workers)
        rows = await at.usage("key")
        assert told["answers"] > 24, "most were answered, by whichever was left"
        assert told["answers"] == sum(row["requests"] - row["failed"] for row in rows)
        assert told["completion"] == sum(row["completion_tokens"] for row in rows)
        if not any(row["failed"] for row in rows):  # else their prompts are estimates
            assert told["prompt"] == sum(row["prompt_tokens"] for row in rows)


@on_uvloop
async def test_a_key_may_be_for_some_models_only(tmp_path: Path) -> None:
    async with LabReplica(served_model="llama-3") as lab, office(tmp_path, lab) as at:
        await until(lambda: at.house.balancer.service.has_told_models)
        right, wrong = await at.add("right", models=["llama*"]), await at.add("wrong", models=["llava"])
        assert (await at.ask(right)).status == 200
        assert (await at.ask(right, chat(model="llama-3"))).status == 200
        seen = len(lab.seen.requests)
        for body in (chat(), chat(model="llama-3"), chat(model="llava"), chat(model="gpt-4o")):
            refused = await at.ask(wrong, body)
            assert refused.status == 403
            assert refused.error["code"] == "model_not_allowed"
        for body in (
            chat(model="gpt-4o"),
            b'{"model": "llama-3", "messages": [], "model": "other"}',
            b'{"model": "other", "messages": [], "model": "llama-3"}',
            chat(lora_path="other"),
            chat(lora_path=["other"]),
        ):
            assert (await at.ask(right, body)).status == 403
        assert (await at.ask(right, chat(), **{"X-Model": "other"})).status == 403
        assert len(lab.seen.requests) == seen
        assert orjson.loads(chat(lora_path=None))["lora_path"] is None
        assert (await at.ask(right, chat(lora_path=None))).status == 200


@on_uvloop
async def test_a_key_holds_only_so_many_at_once(tmp_path: Path) -> None:
    async with LabReplica(hang="before_head") as lab, office(tmp_path, lab) as at:
        key = await at.add(max_in_flight=1)
        client = await at.house.client()
        await client.send(request(body=chat(), headers=(("Authorization", f"Bearer {key}"),)))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        assert (await at.ask(key)).error["code"] == "key_at_limit"
        client.leave()


@on_uvloop
async def test_bulk_waits_until_nobody_else_does(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab, max_in_flight=1) as at:
        bulk, other = await at.add("bulk", priority="bulk"), await at.add("other")
        holder = await at.house.client()
        held = chat(100_000, stream=True)
        lab.set(token_interval=0.02)
        await holder.send(request(body=held, headers=(("Authorization", f"Bearer {bulk}"),)))
        await until(lambda: at.house.balancer.service.fleet.generating == 1)
        lab.set(token_interval=0)
        asking = []
        for count, key in enumerate([bulk, bulk, other, other], 1):
            asking.append(asyncio.create_task(at.ask(key, **{"X-Request-Id": f"{count}"})))
            await until(lambda due=count: at.house.balancer.service.admission.queue_depth == due)  # type: ignore[misc]
        holder.leave()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 4
        assert [seen.id for seen in lab.seen.requests[1:]] == ["3", "4", "1", "2"]
