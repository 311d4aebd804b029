"""What prefix routing remembers: prompts that a replica has begun to answer, and nothing else."""

import asyncio
from collections.abc import Iterator

import pytest

from balancer.routing.prefix_aware import PrefixAware
from balancer.routing.prefix_index import PrefixIndex
from balancer.routing.prompt import Prompt
from tests.support.client import chat, request
from tests.wire.running import House, in_house, kept

PROMPT = [{"role": "system", "content": "You are the clerk of a lending library. " * 100}]
BLOCKS = 7
POST = request(body=chat(messages=PROMPT))
STREAM = request(body=chat(messages=PROMPT, stream=True, tokens=1000))


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, config={"policy": "prefix_aware"}) as house:
        yield house


def forgetful(house: House) -> PrefixIndex:
    """The index, emptied."""
    policy = house.balancer.service.admission.policy
    assert isinstance(policy, PrefixAware)
    policy.forget(house.member("a"))
    return policy.index


def known(index: PrefixIndex, house: House) -> int:
    """The number of blocks of PROMPT that, as answers have shown, are at the replica."""
    blocks = Prompt("/v1/chat/completions", [chat(messages=PROMPT)]).blocks
    matched = dict(index.matched(blocks)).get(house.member("a"), 0)
    coming = index.expect(house.member("a"), blocks, matched)
    coming.over()
    return coming.known


@in_house
async def test_an_answer_leaves_its_prompt(house: House) -> None:
    index = forgetful(house)
    assert (await house.ask(POST)).status == 200
    await house.at_rest()
    assert known(index, house) == len(index) == BLOCKS


@in_house
async def test_a_stream_leaves_it_with_its_first_token(house: House) -> None:
    index = forgetful(house)
    house.replicas[0].set(head_delay=0.1, token_interval=0.01)
    client = await house.client()
    await client.send(STREAM)
    await house.replicas[0].seen.until(lambda seen: seen.generations_started == 1)
    assert (len(index), known(index, house)) == (BLOCKS, 0), "the next of its kind finds its way, and is not judged"
    await client.until(b"t00")
    assert known(index, house) == BLOCKS


@pytest.mark.parametrize("status", [400, 500, 503])
@in_house
async def test_an_error_leaves_nothing(house: House, status: int) -> None:
    index = forgetful(house)
    house.replicas[0].set(status=status)
    assert (await house.ask(POST)).status >= 400
    await house.at_rest()
    assert len(index) == 0


@pytest.mark.parametrize("data", [POST, STREAM], ids=["whole", "stream"])
@in_house
async def test_who_leaves_before_the_answer_leaves_nothing(house: House, data: bytes) -> None:
    index = forgetful(house)
    house.replicas[0].set(head_delay=60)
    client = await house.client()
    await client.send(data)
    await house.replicas[0].seen.until(lambda seen: seen.generations_started == 1)
    assert len(index) == BLOCKS
    client.leave()
    await house.at_rest()
    assert len(index) == 0


@in_house
async def test_broken_connection_leaves_nothing(house: House) -> None:
    """A connection that breaks before the answer leaves nothing in the prefix index."""
    index = forgetful(house)
    house.replicas[0].set(cut="before_head")
    assert (await house.ask(POST)).status == 502
    await house.at_rest()
    assert len(index) == 0


@in_house
async def test_samples_asked_for_together_find_each_other(house: House) -> None:
    index = forgetful(house)
    house.replicas[0].set(head_delay=0.1)
    answers = await asyncio.gather(*(house.ask(POST) for _ in range(8)))
    assert {answer.status for answer in answers} == {200}
    assert sorted(line["matched"] for line in await house.logged(8)) == [0.0] + [1.0] * 7
    assert known(index, house) == BLOCKS
