"""`keep_alive_comments`: comments for a client whose stream has not begun, and what an early head costs."""

import asyncio
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Answer, chat, request
from tests.support.until import until
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

LINE = b": waiting\n\n"
BODY = chat(stream=True, tokens=3)
STREAM = request(body=BODY)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, keep_alive_comments=0.15, first_byte_timeout=1.0, cors_origins=("http://a",)) as house:
        yield house


def behind_comments(answer: Answer, least: int = 1) -> bytes:
    """The body after its comments, all of which come first."""
    events = answer.body
    while events.startswith(LINE):
        events = events.removeprefix(LINE)
        least -= 1
    assert least <= 0, answer.body
    assert LINE not in events
    return events


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/generate"])
@pytest.mark.parametrize("slow", ["head_delay", "first_token_delay"])
@in_house
async def test_a_stream_that_does_not_begin_shows_signs_of_life(house: House, path: str, slow: str) -> None:
    a = house.replicas[0]
    plain = await house.ask(request(path=path, body=BODY))
    a.set(**{slow: 0.6}, token_interval=0.25)
    client = await house.client()
    for _ in range(2):
        await client.send(request(path=path, body=BODY))
        answer = await client.answer()
        assert (answer.status, answer.is_whole, answer.is_last) == (200, True, False)
        assert (answer.header("content-type") or "").startswith("text/event-stream")
        events = behind_comments(answer, 2)
        assert events.count(b"\n\n") == plain.body.count(b"\n\n")
        assert events[-14:] == plain.body[-14:]
    lines = await house.logged(3)
    assert all(line["ttft"] >= 0.6 for line in lines[1:]), "a comment is no token"
    assert all(line["bytes_out"] < len(answer.body) for line in lines[1:])


@in_house
async def test_quick_answers_have_no_comment(house: House) -> None:
    """A quick answer has the replica's own head and no comment."""
    house.replicas[0].set(token_interval=0.3)
    answer = await house.ask(STREAM)
    assert LINE not in answer.body
    assert answer.header("x-replica-id") == "a"


@pytest.mark.parametrize("body", [chat(), chat(stream=False), b"no JSON", b'{"tools":[{"stream":true}]}'])
@in_house
async def test_who_asked_for_no_stream_gets_none(house: House, body: bytes) -> None:
    house.replicas[0].set(head_delay=0.5)
    answer = await house.ask(request(body=body))
    assert LINE not in answer.body
    assert answer.header("content-type") == "application/json"


@in_house
async def test_an_http_1_0_client_gets_them_too(house: House) -> None:
    house.replicas[0].set(head_delay=0.5)
    client = await house.client()
    await client.send(request(body=BODY, version="1.0"))
    status, headers = await client.head()
    assert status == 200
    assert "transfer-encoding" not in {name.lower() for name, _ in headers}
    assert (await client.rest()).startswith(LINE)


def told(answer: Answer) -> dict[str, Any]:
    """The one event after the comments: an error, in a stream that is not whole."""
    assert (answer.status, answer.is_whole) == (200, False)
    lines = behind_comments(answer).rstrip(b"\n").split(b"\n")
    body: dict[str, Any] = orjson.loads(lines[-1].removeprefix(b"data: "))
    if body.get("type") == "error":
        assert lines[:-1] == [b"event: error"]
    else:
        assert lines[:-1] == []
    error: dict[str, Any] = body["error"]
    return error


ENDS = {
    "refused by the replica": ({"status": 400}, "BadRequestError", "replica_error"),
    "failed there": ({"status": 500}, "InternalServerError", "replica_error"),
    "full": ({"status": 503}, "server_error", "replicas_busy"),
    "lost": ({"cut": "before_head"}, "server_error", "replica_lost"),
    "lost behind its head": ({"cut": "after_head"}, "server_error", "stream_broken"),
    "silent": ({"hang": "before_head"}, "server_error", "first_byte_timeout"),
    "no stream": ({"body": "{}", "content_type": "application/json"}, "server_error", "replica_error"),
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/generate"])
@pytest.mark.parametrize("row", **each(ENDS))
@on_uvloop
async def test_what_goes_wrong_later_comes_as_an_event(row: tuple[dict[str, Any], str, str], path: str) -> None:
    knobs, kind, code = row
    async with (
        LabReplica(head_delay=0.3, **knobs) as a,
        serving(a, keep_alive_comments=0.1, first_byte_timeout=0.6, queue_timeout=1) as house,
    ):
        error = told(await house.ask(request(path=path, body=BODY)))
        assert error["message"]
        if path != "/v1/messages":
            assert error["type"] == kind or code == "replica_error", error
        else:
            assert error["type"] in ("invalid_request_error", "api_error", "overloaded_error", "timeout_error")
        assert (await house.logged())[0]["error"] == code


@on_uvloop
async def test_comments_while_waiting_for_room() -> None:
    """A client that waits for room or for a start gets comments and then the answer."""
    async with (
        LabReplica(ready=500, head_delay=0.4) as a,
        serving(a, ready=0, max_in_flight=1, ready_interval=0.1, keep_alive_comments=0.1) as house,
    ):
        first, second = await house.client(), await house.client()
        for client in (first, second):
            await client.send(STREAM)
            assert await client.until(LINE)
        a.set(ready=200)
        for client in (first, second):
            assert b"[DONE]" in await client.until(b"0\r\n\r\n")
        assert [line["attempts"] for line in await house.logged(2)] == [1, 1]


@on_uvloop
async def test_a_request_is_still_tried_elsewhere() -> None:
    async with (
        LabReplica(status=503, head_delay=0.4) as a,
        LabReplica(head_delay=0.4) as b,
        serving(a, b, keep_alive_comments=0.1) as house,
    ):
        assert behind_comments(await house.ask(STREAM), 4).endswith(b"data: [DONE]\n\n")
        assert [len(replica.seen.requests) for replica in (a, b)] == [1, 1]


@on_uvloop
async def test_a_client_that_leaves_meanwhile_frees_its_replica() -> None:
    async with LabReplica(head_delay=30) as a, serving(a, keep_alive_comments=0.1) as house:
        client = await house.client()
        await client.send(STREAM)
        await client.until(LINE)
        client.leave()
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")
        await house.at_rest()


@on_uvloop
async def test_without_the_setting_nothing_comes_before_the_answer() -> None:
    async with LabReplica(head_delay=0.5) as a, serving(a) as house:
        began = asyncio.get_running_loop().time()
        client = await house.client()
        await client.send(STREAM)
        assert (await client.head())[0] == 200
        assert asyncio.get_running_loop().time() - began >= 0.5
        assert LINE not in await client.until(b"[DONE]")
        await until(house.is_at_rest)
