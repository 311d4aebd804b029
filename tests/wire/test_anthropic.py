"""What the balancer itself answers to Anthropic's clients under /v1/messages: errors in their format, and the id."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Answer, chat, request
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
KEY = ("x-api-key", "right")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"mine:{sha256(b'right').hexdigest()}\n")
    with kept({}, config={"api_keys": Path(keys)}, max_body_bytes=2000, max_head_bytes=4000) as house:
        yield house


def kind(answer: Answer) -> str:
    """The type of an error in Anthropic's format."""
    body = orjson.loads(answer.body)
    assert answer.header("content-type") == "application/json"
    assert answer.header("request-id") == answer.header("x-request-id") == body["request_id"]
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["message"].endswith(".")
    found: str = body["error"]["type"]
    return found


REFUSED = {
    "wrong key": (request(path=MESSAGES, body=chat(), headers=(("x-api-key", "wrong"),)), 401, "authentication_error"),
    "no key": (request(path=COUNT, body=chat()), 401, "authentication_error"),
    "no such path": (request("PUT", "/v1/messages/%0A", b"", (KEY,)), 404, "not_found_error"),
    "no such method": (request("TRACE", MESSAGES), 405, "invalid_request_error"),
    "a body too large": (request(path=MESSAGES, body=b"x" * 3000, headers=(KEY,)), 413, "request_too_large"),
    "a head too large": (request(path=COUNT, headers=(("x", "x" * 5000),)), 431, "invalid_request_error"),
    "a host too many": (request(path=MESSAGES, headers=(("Host", "b"),)), 400, "invalid_request_error"),
    "another spelling": (request(path="//v1/x/../messages?beta=1", body=b""), 401, "authentication_error"),
}


@pytest.mark.parametrize("row", **each(REFUSED))
@in_house
async def test_refusals_have_anthropics_shape(house: House, row: tuple[bytes, int, str]) -> None:
    data, status, expected = row
    answer = await house.ask(data)
    assert (answer.status, kind(answer)) == (status, expected)


@in_house
async def test_all_else_has_openais_shape(house: House) -> None:
    assert (await house.ask(request(path="/v1/messagesx", body=chat()))).error["code"] == "not_found"
    for path in ("/v1/score", "/v1/chat/completions", "/v1/responses"):
        answer = await house.ask(request(path=path, body=chat()))
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert answer.header("request-id") is None


@in_house
async def test_request_id_of_an_answer(house: House) -> None:
    """A replica's answer has the request id where Anthropic's clients look for it."""
    house.replicas[0].set(headers=[("Request-Id", "of another")])
    answer = await house.ask(request(path=MESSAGES, body=chat(), headers=(KEY, ("X-Request-Id", "mine"))))
    assert (answer.status, answer.header("request-id"), answer.header("x-request-id")) == (200, "mine", "mine")
    answer = await house.ask(request(body=chat(), headers=(KEY,)))
    assert answer.header("request-id") == "of another", "elsewhere it is the replica's"


ENDS = {
    "nobody is there": ({"ready": 500}, 503, "overloaded_error", "5"),
    "the replica is full": ({"status": 503, "retry_after": "7"}, 503, "overloaded_error", "7"),
    "the replica is lost": ({"cut": "before_head"}, 502, "api_error", None),
    "the replica is silent": ({"hang": "before_head"}, 504, "timeout_error", None),
}


@pytest.mark.parametrize("row", **each(ENDS))
@on_uvloop
async def test_what_goes_wrong_later_has_anthropics_shape_too(row: tuple[dict[str, object], int, str, str]) -> None:
    knobs, status, expected, retry_after = row
    is_there = "ready" not in knobs
    settings = {"start_wait": 0, "first_byte_timeout": 0.5, "queue_timeout": 5}  # too short to wait out the 7 seconds
    async with LabReplica(**knobs) as a, serving(a, ready=is_there, **settings) as house:
        answer = await house.ask(request(path=MESSAGES, body=chat()))
        assert (answer.status, kind(answer), answer.header("retry-after")) == (status, expected, retry_after)


@on_uvloop
async def test_a_full_queue_is_a_rate_limit() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1, queue_size=0) as house:
        holder = await house.client()
        await holder.send(request(body=chat(stream=True, tokens=100_000)))
        await a.seen.until(lambda seen: seen.generations_started == 1)
        answer = await house.ask(request(path=MESSAGES, body=chat()))
        assert (answer.status, kind(answer)) == (429, "rate_limit_error")
        assert 5 <= int(answer.header("retry-after") or 0) <= 8, "five seconds, and up to half of that as jitter"


@on_uvloop
async def test_a_stream_that_does_not_begin_ends_with_what_it_is() -> None:
    async with LabReplica(hang="after_head") as a, serving(a, first_byte_timeout=0.5) as house:
        answer = await house.ask(request(path=MESSAGES, body=chat(stream=True)))
        name, data = answer.body.rstrip().split(b"\n")
        assert (answer.is_whole, name) == (False, b"event: error")
        body = orjson.loads(data.removeprefix(b"data: "))
        assert (body["type"], body["error"]["type"]) == ("error", "timeout_error")
        assert body["request_id"] == answer.header("request-id")
