"""Answers that break off: no client may take one for whole, and clients of streams are told why."""

import asyncio
import gzip
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import CHAT, Answer, chat, request
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

STREAM = request(body=chat(stream=True, tokens=5))
WHY = "What arrived so far is incomplete; send the request again."


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, idle_timeout=0.4) as house:
        yield house


def told(answer: Answer) -> dict[str, Any]:
    """The error in the event that ends the stream."""
    assert not answer.is_whole
    assert b"[DONE]" not in answer.body
    event = answer.body.replace(b"\r\n", b"\n").split(b"\n\n")[-2]
    body = orjson.loads(event.removeprefix(b"data: "))
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert error["message"].endswith(WHY)
    assert (error["type"], error["code"], error["param"]) == ("server_error", "stream_broken", None)
    return error


AT_BOUNDARY = {
    "reset": {"cut": "after_tokens", "cut_after": 2},
    "closed": {"cut": "after_tokens", "cut_after": 2, "cut_by": "close"},
    "before the first event": {"cut": "after_head"},
    "CRLF line ends": {"cut": "after_tokens", "cut_after": 2, "event_end": "\r\n\r\n"},
    "in small pieces": {"cut": "after_tokens", "cut_after": 2, "split": 1},
    "silent": {"hang": "after_tokens", "hang_after": 2, "service_status": "hang"},
}


@pytest.mark.parametrize("fault", **each(AT_BOUNDARY))
@in_house
async def test_stream_breaks_between_events(house: House, fault: dict[str, object]) -> None:
    """A stream that breaks between two events ends with an error event."""
    a = house.replicas[0]
    failures = house.member("a").failures_total
    a.set(**fault)
    answer = await house.ask(STREAM)
    assert answer.status == 200
    error = told(answer)
    assert ("silent for 0.4 s" in error["message"]) == ("hang" in fault)
    await house.at_rest()
    line = (await house.logged(1))[0]
    assert (line["status"], line["attempts"], line["error"]) == (200, 1, "stream_broken")
    assert house.member("a").failures_total == failures + 1
    if "hang" in fault:
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")


@on_uvloop
async def test_slow_first_event() -> None:
    """A stream's first event is waited for as long as a head, if the replica says that it is alive.

    SGLang sends the head of /generate at once, before the request is queued and prefilled.
    """
    stream = request(path="/generate", body=chat(stream=True, tokens=5))
    async with LabReplica() as a, serving(a, idle_timeout=1.0, first_byte_timeout=2.5) as house:
        a.next(1, first_token_delay=1.5)
        answer = await house.ask(stream)
        assert answer.is_whole
        assert answer.body.endswith(b"data: [DONE]\n\n")
        a.next(1, hang="after_head")
        answer = await house.ask(stream)
        assert (answer.status, answer.is_whole) == (200, False)
        error = orjson.loads(answer.body.removeprefix(b"data: "))["error"]
        assert error["code"] == "first_byte_timeout"
        assert "within 2.5 s" in error["message"]
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")


@on_uvloop
async def test_silent_stream_of_a_live_replica() -> None:
    """A stream that is silent goes on while its replica says that it is alive."""
    async with LabReplica(token_interval=2) as a, serving(a, idle_timeout=0.8) as house:
        silent = await house.client()
        await silent.send(request(body=chat(stream=True, tokens=2)))
        await silent.until(b"t00")
        a.set(token_interval=0.1)  # its other streams flow, which says nothing about this one
        flowing = await house.client()
        await flowing.send(request(body=chat(stream=True, tokens=1000)))
        assert (await silent.until(b"[DONE]")).count(b"data:") > 1
        asked = [r.target for r in a.seen.probes if r.target == "/server_info"]
        assert 2 <= len(asked) < 12, "not at each look"


@on_uvloop
async def test_silent_stream_of_a_dead_replica() -> None:
    """A silent stream is cut if its replica does not say that it is alive, although others flow."""
    async with LabReplica(token_interval=0.05) as a, serving(a, idle_timeout=0.8) as house:
        flowing = await house.client()
        await flowing.send(request(body=chat(stream=True, tokens=1000)))
        a.set(hang="after_tokens", service_status="hang")
        began = asyncio.get_running_loop().time()
        answer = await house.ask(STREAM)
        assert told(answer)["code"] == "stream_broken"
        assert 0.8 <= asyncio.get_running_loop().time() - began < 3


@on_uvloop
async def test_longest_silence() -> None:
    """A stream that is silent for first_byte_timeout is cut even if its replica is alive."""
    async with LabReplica(hang="after_tokens") as a, serving(a, idle_timeout=1, first_byte_timeout=2) as house:
        began = asyncio.get_running_loop().time()
        assert "for 2 s (first_byte_timeout)" in told(await house.ask(STREAM))["message"]
        assert 2 <= asyncio.get_running_loop().time() - began < 5


AMID = {
    "amid an event": {"cut": "mid_event", "cut_after": 2},
    "amid a chunk": {"cut": "mid_chunk", "cut_after": 2},
}


@pytest.mark.parametrize("fault", **each(AMID))
@in_house
async def test_whole_events(house: House, fault: dict[str, object]) -> None:
    """The client gets no part of an event that breaks off, and the usual error event."""
    house.replicas[0].set(**fault)
    answer = await house.ask(STREAM)
    told(answer)
    assert b"t01" in answer.body
    assert answer.body.count(b"data: ") == 4, "the role, two tokens, and why it ends"


ENCODED = {
    "after the type": "Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\n",
    "before the type": "Content-Encoding: gzip\r\nContent-Type: text/event-stream\r\n",
}


@pytest.mark.parametrize("fields", **each(ENCODED))
@in_house
async def test_an_encoded_stream_gets_no_plain_event(house: House, fields: str) -> None:
    data = gzip.compress(b"data: 1\n\n") + b"\n\n"  # the last bytes look like an event's end
    head = f"HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n"
    house.replicas[0].set(raw=head + data.decode("latin-1") + "\r\n", raw_then="reset")
    answer = await house.ask(STREAM)
    assert (answer.body, answer.is_whole) == (data, False)


@pytest.mark.parametrize("behind", ["", "data: 2\n\n"])
@in_house
async def test_a_stream_of_announced_length_is_not_filled_up(house: House, behind: str) -> None:
    """An error event in place of the missing bytes would make the answer look whole."""
    events = "data: 1\n\n" + behind
    fields = f"Content-Type: text/event-stream\r\nContent-Length: {len(events) + 14}\r\n"
    house.replicas[0].set(raw=f"HTTP/1.1 200 OK\r\n{fields}\r\n{events}", raw_then="close")
    answer = await house.ask(STREAM)
    assert (answer.body, answer.is_whole) == (events.encode(), False)


@in_house
async def test_the_anthropic_path_gets_anthropics_error_event(house: House) -> None:
    house.replicas[0].set(
        raw="HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        "1f\r\nevent: message_start\ndata: {}\n\n\r\n",
        raw_then="reset",
    )
    answer = await house.ask(request(path="/v1/messages", body=chat(stream=True)))
    assert not answer.is_whole
    assert answer.body.startswith(b"event: message_start\ndata: {}\n\nevent: error\ndata: ")
    body = orjson.loads(answer.body.split(b"data: ")[-1])
    assert body["type"] == "error"
    assert body["error"]["type"] == "api_error"
    assert body["error"]["message"].endswith(WHY)


@in_house
async def test_an_http_1_0_client_is_told_too(house: House) -> None:
    house.replicas[0].set(cut="after_tokens", cut_after=2)
    answer = await house.ask(request(body=chat(stream=True, tokens=5), version="1.0"))
    assert b'"stream_broken"' in answer.body
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(("framing", "size", "sent"), [("content-length", 200_000, 100_000), ("chunked", 1000, 500)])
@in_house
async def test_an_answer_that_is_no_stream_just_ends(house: House, framing: str, size: int, sent: int) -> None:
    """One that is too long to be held back, or of which nobody knows how long it is."""
    house.replicas[0].set(framing=framing, body="x" * size, cut="after_bytes", cut_after=sent)
    answer = await house.ask(request("GET", "/v1/models/lab"), "GET")
    assert (answer.status, answer.body, answer.is_whole) == (200, b"x" * sent, False)
    line = (await house.logged(1))[0]
    assert (line["bytes_out"], line["error"]) == (sent, "stream_broken")


@in_house
async def test_after_a_break_the_connection_serves_nothing_more(house: House) -> None:
    house.replicas[0].next(1, cut="after_tokens", cut_after=1)
    client = await house.client()
    await client.send(STREAM + request("POST", CHAT, chat()))
    assert not (await client.answer()).is_whole
    assert await client.is_ended()
    assert len(house.replicas[0].seen.requests) == 1
