"""A replica's answers, in every framing of HTTP/1.1 and HTTP/1.0, passed to clients; no part of one reaches another."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

POST = request(body=chat())
MODELS = request("GET", "/v1/models/lab")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


FRAMINGS = ("content-length", "chunked", "close", "http/1.0", "http/1.0+length")


@pytest.mark.parametrize("size", [0, 1, 70_000])
@pytest.mark.parametrize("framing", FRAMINGS)
@in_house
async def test_a_body_comes_whole_however_the_replica_frames_it(house: House, framing: str, size: int) -> None:
    house.replicas[0].set(framing=framing, body="x" * size)
    client = await house.client()
    for _ in range(2):
        await client.send(POST)
        answer = await client.answer()
        assert (answer.status, answer.body, answer.is_last) == (200, b"x" * size, False)
        known = framing in ("content-length", "http/1.0+length")
        assert answer.header("content-length") == (str(size) if known else None)
        assert answer.header("transfer-encoding") == (None if known else "chunked")


@pytest.mark.parametrize("split", [1, 2, 3, 16, 1000])
@in_house
async def test_a_stream_comes_as_it_was_however_it_is_cut(house: House, split: int) -> None:
    a = house.replicas[0]
    whole = await house.ask(request(body=chat(stream=True)))
    a.set(split=split)
    cut = await house.ask(request(body=chat(stream=True)))
    assert len(cut.body) == len(whole.body)
    assert cut.body.endswith(b"data: [DONE]\n\n")


REDIRECTS = {
    "to itself": ("http://{here}/generate?a=http://{here}/b", "/generate?a=http://{here}/b"),
    "to itself, as it was asked": ("https://{here}/generate", "/generate"),
    "to another port": ("http://{here}0/generate", "http://{here}0/generate"),
    "elsewhere": ("http://elsewhere.test/generate", "http://elsewhere.test/generate"),
    "to what would be another host": ("http://{here}//elsewhere.test/", "http://{here}//elsewhere.test/"),
    "to a path": ("/generate?a=http://{here}/b", "/generate?a=http://{here}/b"),
}


@pytest.mark.parametrize("row", **each(REDIRECTS))
@in_house
async def test_redirects_stay_at_the_endpoint(house: House, row: tuple[str, str]) -> None:
    """A redirect leads to the endpoint, not to a replica directly."""
    a = house.replicas[0]
    said, told = (place.format(here=a.url.removeprefix("http://")) for place in row)
    a.set(raw=f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {said}\r\ncontent-length: 0\r\n\r\n")
    answer = await house.ask(request(path="/generate/", body=chat()))
    assert (answer.status, answer.header("location")) == (307, told)


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("length", ["", "content-length: 5\r\n"], ids=["", "with a length"])
@in_house
async def test_answers_without_a_body(house: House, status: int, length: str) -> None:
    a = house.replicas[0]
    a.set(raw=f"HTTP/1.1 {status} Bare\r\netag: x\r\n{length}\r\n", raw_then="keep")
    client = await house.client()
    for _ in range(2):
        await client.send(MODELS)
        answer = await client.answer("GET")
        assert (answer.status, answer.header("etag"), answer.is_last) == (status, "x", False)
        assert answer.header("transfer-encoding") is None
        assert answer.header("content-length") == ("5" if length and status == 304 else None)
    assert len({r.connection for r in a.seen.requests}) == 1, "its connection stays usable"


@pytest.mark.parametrize("interim", [[100], [102, 103], [103, 103, 103]])
@in_house
async def test_interim_answers_are_left_out(house: House, interim: list[int]) -> None:
    a = house.replicas[0]
    a.set(interim=interim)
    client = await house.client()
    for _ in range(2):
        await client.send(POST)
        answer = await client.answer()
        assert (answer.status, answer.interim) == (200, ())
    assert len({r.connection for r in a.seen.requests}) == 1


@in_house
async def test_a_connection_that_the_replica_closes_is_not_used_again(house: House) -> None:
    house.replicas[0].set(connection_close=True)
    for _ in range(3):
        assert (await house.ask(POST)).status == 200
    assert len({r.connection for r in house.replicas[0].seen.requests}) == 3


@in_house
async def test_repeated_and_odd_fields_pass_as_they_came(house: House) -> None:
    sent = [
        ("Set-Cookie", "a=1; Path=/"), ("set-cookie", "b=2"), ("X-Odd", "caf\xe9 \t| tail"), ("X-Empty", ""),
        ("Link", "<a>; rel=x"), ("Link", "<b>; rel=y"), ("Server", "SGLang"), ("Content-Encoding", "br"),
    ]  # fmt: skip
    house.replicas[0].set(headers=sent, body="x")
    answer = await house.ask(POST)
    names = {name.lower() for name, _ in sent} - {"server"}
    assert [(n, v) for n, v in answer.headers if n.lower() in names] == [(n, v) for n, v in sent if n != "Server"]
    assert answer.all("server") == ["uvicorn", "SGLang"]


@in_house
async def test_hop_by_hop_fields(house: House) -> None:
    """An answer's hop-by-hop fields, and the fields that Connection names, are dropped."""
    house.replicas[0].set(
        raw="HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: timeout=5\r\nX-Mine: 1\r\nX-Kept: 1\r\n"
        "Upgrade: h2c\r\nTrailer: X-T\r\nProxy-Authenticate: Basic\r\nTE: trailers\r\nX-Request-Id: forged\r\n"
        "X-Replica-Id: forged\r\nContent-Length: 2\r\n\r\nhi",
        raw_then="keep",
    )
    answer = await house.ask(POST)
    assert {name.lower() for name, _ in answer.headers} == {"x-kept", "x-request-id", "x-replica-id", "content-length"}
    assert answer.header("x-replica-id") == "a"
    assert answer.header("x-request-id") != "forged"


# No part of one answer in another

BEHIND = {
    "a second answer": "HTTP/1.1 200 OK\r\nX-Stolen: 1\r\nContent-Length: 6\r\n\r\nstolen",
    "half a second answer": "HTTP/1.1 200 OK\r\nX-Stolen: 1\r\nConten",
    "the beginning of one": "HTT",
    "garbage": "\0\1garbage",
    "a body that it did not announce": "stolen",
}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "a moment later"])
@pytest.mark.parametrize("behind", **each(BEHIND))
@in_house
async def test_bytes_behind_an_answer_reach_nobody(house: House, behind: str, later: bool) -> None:
    a = house.replicas[0]
    first = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"
    a.set(raw=first if later else first + behind, raw_then="hang" if later else "keep")
    client = await house.client()
    await client.send(POST)
    assert (await client.answer()).body == b"first"
    if later:
        connection = next(c for c in a._connections if c.request and c.request.target == "/v1/chat/completions")
        connection.transport.write(behind.encode("latin-1"))
    a.set(raw=None)
    for _ in range(2):
        await client.send(POST)
        answer = await client.answer()
        assert (answer.status, answer.header("x-stolen")) == (200, None)
        assert b"stolen" not in answer.body
        assert b'"chat.completion"' in answer.body
    assert a.seen.requests[1].connection != a.seen.requests[0].connection, "not used again"


@in_house
async def test_trailers_are_dropped(house: House) -> None:
    """An answer's trailers are dropped and do not end up in the next head."""
    a = house.replicas[0]
    a.next(
        1,
        raw="HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Stolen: 1\r\n\r\n",
        raw_then="keep",
    )
    client = await house.client()
    await client.send(POST + POST)
    first, second = await client.answer(), await client.answer()
    assert (first.body, first.trailers) == (b"hi", ())
    assert (second.status, second.header("x-stolen")) == (200, None)


# Early answers


@pytest.mark.parametrize("early", ["read", "close"])
@on_uvloop
async def test_an_answer_that_comes_before_the_body_was_taken(early: str) -> None:
    async with LabReplica() as a, serving(a) as house:
        a.next(1, early=early, status=413, body="too much")
        answer = await house.ask(request(body=b"x" * (8 << 20)))
        assert (answer.status, answer.body) == (413, b"too much")
        assert (await house.ask(POST)).status == 200


# A replica that sends its answer slowly


@on_uvloop
async def test_bytes_are_passed_on_as_they_come() -> None:
    """The head and each event are passed on without waiting for what follows."""
    async with LabReplica(first_token_delay=0.2, token_interval=0.2) as a, serving(a) as house:
        loop = asyncio.get_running_loop()
        client = await house.client()
        began = loop.time()
        await client.send(request(body=chat(stream=True, tokens=2)))
        assert (await client.head())[0] == 200
        assert loop.time() - began < 0.15
        await client.until(b"t00")
        assert 0.15 < loop.time() - began < 0.35
        await client.until(b"t01")
        assert 0.35 < loop.time() - began < 0.6


@pytest.mark.parametrize("knobs", [{"framing": "close"}, {"framing": "chunked"}, {"framing": "content-length"}])
@on_uvloop
async def test_a_large_answer_comes_whole(knobs: dict[str, Any]) -> None:
    async with LabReplica(body_mib=64, **knobs) as a, serving(a) as house:
        client = await house.client()
        await client.send(POST)
        status, headers = await client.head()
        assert status == 200
        chunked = ("transfer-encoding", "chunked") in [(n.lower(), v) for n, v in headers]
        assert chunked == (knobs["framing"] != "content-length")
        size = 0
        tail = client.received
        while size < 64 << 20:
            data = await client.more()
            assert data, size
            size += len(client.received)
            tail = (tail + client.received)[-5:]
            client.received = b""
            if chunked and tail == b"0\r\n\r\n":
                break
        assert size >= 64 << 20
