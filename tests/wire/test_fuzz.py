"""Mutated requests and answers, the same ones in every run; `make fuzz` plays others."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.client import chat, chunks, request
from tests.wire.fuzz import ANSWERS, CHUNKED, REQUESTS, WITH_CLIENTS, WITH_REPLICAS, answers, fuzz, requests
from tests.wire.running import House, in_house, kept


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, **WITH_CLIENTS) as house:
        yield house


@pytest.fixture(scope="module")
def odd_house() -> Iterator[House]:
    with kept({}, **WITH_REPLICAS) as house:
        yield house


@pytest.mark.parametrize("seed", range(5))
@in_house
async def test_mutated_requests(house: House, seed: int) -> None:
    await fuzz(house, requests, [seed])


WHOLE = {
    "length": (request(body=chat(), headers=(("X-A", "b"),)), 1),
    "chunks": (request("PUT", "/v1/images/edits", headers=CHUNKED) + chunks(b"hello", b"world"), 1),
    "pipelined": (
        request("GET", "/v1/images/edits") + request("GET", "/nowhere") + request("OPTIONS", "/v1/images/edits"),
        3,
    ),
    "upgrade": (REQUESTS[9] + request("GET", "/v1/images/edits"), 2),
}


@pytest.mark.parametrize("row", WHOLE.values(), ids=WHOLE)
@in_house
async def test_a_cut_at_any_offset_changes_nothing(house: House, row: tuple[bytes, int]) -> None:
    data, count = row
    client = await house.client()
    expected = None
    for cut in range(len(data)):
        await client.send(data[:cut])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await client.send(data[cut:])
        said = [await client.answer() for _ in range(count)]
        told = [(answer.status, len(answer.body)) for answer in said]
        expected = expected or told
        assert told == expected, cut


SAID = {"length": ANSWERS[0], "chunks": ANSWERS[1], "interim": ANSWERS[5]}


@pytest.mark.parametrize("data", SAID.values(), ids=SAID)
@in_house
async def test_an_answer_cut_at_any_offset_is_the_same(house: House, data: bytes) -> None:
    a = house.replicas[0]
    client = await house.client()
    expected = None
    for cut in range(1, len(data)):
        a.set(raw=data[:cut].decode("latin-1"), raw_then="hang")
        await client.send(request(body=chat()))
        await a.seen.until(lambda seen, cut=cut: len(seen.requests) == cut and seen.last.bytes_sent == cut)  # type: ignore[misc]
        next(c for c in a._connections if c.request is a.seen.last).transport.write(data[cut:])
        answer = await client.answer()
        expected = expected or (answer.status, answer.body)
        assert (answer.status, answer.body) == expected, cut
        house.balancer.destination.pool.forget(
            house.member("a").address
        )  # the lab sends nothing more on that connection


# Last: while `odd_house` stands, connections that `house` opens anew would count as left behind.
@pytest.mark.parametrize("seed", range(5))
def test_mutated_answers(odd_house: House, seed: int) -> None:
    @in_house
    async def played(house: House) -> None:
        await fuzz(house, answers, [seed])

    played(odd_house)
