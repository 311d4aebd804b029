import asyncio
import json
from functools import partial
from typing import Any

import httpx
import pytest

from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.lab.seen import Seen
from tests.lab.test_replica import ask_and_leave

FAST = ModelSettings(prefill_rate=100_000.0, step_overhead=0.0, itl_base=0.005, itl_per_request=0.001)


def chat(text: str, tokens: int = 3, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, **more}


async def cached(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, int]:
    """Prompt tokens of a request, and how many of them were cached."""
    usage = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def started(count: int, seen: Seen) -> bool:
    return seen.generations_started == count


def run(talk: Any, settings: ModelSettings, **knobs: Any) -> None:
    async def main() -> None:
        async with (
            LabReplica(model=settings, **knobs) as replica,
            httpx.AsyncClient(base_url=replica.url, timeout=20.0) as client,
        ):
            await talk(replica, client)
            assert replica.live is not None
            async with asyncio.timeout(10.0):
                while not replica.live.model.is_idle:
                    await client.get("/v1/loads")
            assert replica.live.model.used_tokens == 0

    asyncio.run(main())


def test_a_repeated_prompt_is_cached_but_for_its_last_token() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        tokens, none = await cached(client, chat("word " * 400))
        again = await cached(client, chat("word " * 400))
        assert tokens > 500
        assert (none, again) == (0, (tokens, tokens - 1))

    run(talk, FAST)


def test_a_conversation_finds_the_answer_it_sends_back() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        first = chat("word " * 100, tokens=50)
        answer = (await client.post("/v1/chat/completions", json=first)).json()
        said = answer["choices"][0]["message"]
        turns = [
            *first["messages"],
            {"role": "assistant", "content": said["content"]},
            {"role": "user", "content": "?"},
        ]
        found = (await cached(client, {"messages": turns, "max_tokens": 1}))[1]
        assert found == answer["usage"]["prompt_tokens"] + 49

    run(talk, FAST)


def test_image_tokens() -> None:
    """An image counts its tokens and is reused only at its position."""

    def asked(image: str, question: str, before: str = "Look: ") -> dict[str, Any]:
        parts = [
            {"type": "text", "text": before},
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question},
        ]
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}

    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        red, blue = "data:image/png;base64,cmVk", "data:image/png;base64,Ymx1ZQ=="
        tokens, first = await cached(client, asked(red, "What colour?"))
        assert tokens > 576
        assert first == 0
        same = (await cached(client, asked(red, "How many?")))[1]
        assert same > 576
        other = (await cached(client, asked(blue, "What colour?")))[1]
        assert 0 < other < 100
        moved = (await cached(client, asked(red, "What colour?", before="Look at this instead: ")))[1]
        assert 0 < moved < 100

    run(talk, FAST)


def test_full_queue() -> None:
    """A full queue is a 503 for a plain answer and an error event for a stream."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        takers = []
        for number in range(2):
            long = client.post("/v1/chat/completions", json=chat("x", tokens=5000))
            takers.append(asyncio.create_task(long))
            await replica.seen.until(partial(started, number + 1))
        while (await client.get("/v1/loads")).json()["loads"][0]["num_running_reqs"] == 0:
            pass
        load = (await client.get("/v1/loads?include=core")).json()["loads"][0]
        assert (load["num_running_reqs"], load["num_waiting_reqs"], load["max_running_requests"]) == (1, 1, 1)
        refused = await client.post("/v1/chat/completions", json=chat("x"))
        streamed = await client.post("/v1/chat/completions", json=chat("x", stream=True))
        assert (refused.status_code, refused.json()["message"]) == (503, "The request queue is full.")
        assert streamed.status_code == 200
        error, done = streamed.text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
        assert done == "data: [DONE]"
        for taker in takers:
            taker.cancel()
        await replica.seen.until(lambda seen: seen.generations_aborted == 2)
        assert (await client.post("/v1/chat/completions", json=chat("x"))).status_code == 200

    run(talk, ModelSettings(max_running_requests=1, max_queued_requests=1, itl_base=0.01), abort_delay=0.0)


def test_requests_in_a_batch_share_its_steps() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        async def one() -> float:
            began = replica.seen.now()
            await client.post("/v1/chat/completions", json=chat("x", tokens=40))
            return replica.seen.now() - began

        alone = await one()
        together = await asyncio.gather(*[one() for _ in range(8)])
        # 39 steps take 6 ms each alone and 13 ms each with eight requests: far less than eight times as long.
        assert alone >= 39 * 0.006
        assert 39 * 0.012 <= max(together) < 39 * 0.013 + 1.0

    run(talk, FAST)


def test_health_makes_a_token_and_takes_a_second() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        began = replica.seen.now()
        assert (await client.get("/health")).status_code == 200
        assert replica.seen.now() - began >= 1.0
        assert replica.seen.generations_started == 0

    run(talk, FAST)


def test_health_passes_while_a_long_prefill_goes_on_in_chunks() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x" * 16_000, "max_tokens": 1}))
        assert (await client.get("/health")).status_code == 200
        assert not asking.done()
        await asking

    run(talk, ModelSettings(prefill_rate=1500.0, chunk_tokens=1000))


def test_failed_health_makes_it_unready() -> None:
    """A health check that yields no token makes the replica unready until one succeeds."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        replica.set(stuck=True)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        replica.set(stuck=False)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200

    run(talk, FAST, health_timeout=0.5)


@pytest.mark.parametrize(("stream", "delay"), [(True, 0.3), (False, 0.6)])
def test_client_that_leaves(stream: bool, delay: float) -> None:
    """The request of a client that leaves is aborted after SGLang's delay, which frees its place."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        await ask_and_leave(replica, chat("x", tokens=5000, stream=stream))
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        left = replica.seen.last.ended_at
        assert replica.seen.last.outcome == "client_left"
        assert left is not None
        assert replica.seen.now() - left >= delay - 0.01  # timers of the event loop are accurate to 10 ms
        metrics = (await client.get("/metrics")).text
        assert 'num_aborted_requests_total{engine_type="unified",model_name="lab"} 1.0' in metrics

    run(talk, ModelSettings(itl_base=0.05), abort_delay_stream=0.3, abort_delay=0.6)


def test_messages_count_what_is_cached_apart() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        usages = [(await client.post("/v1/messages", json=chat("word " * 100))).json()["usage"] for _ in range(2)]
        tokens = usages[0]["input_tokens"]
        assert usages[0] == {"input_tokens": tokens, "output_tokens": 3, "cache_read_input_tokens": 0}
        assert usages[1] == {"input_tokens": 1, "output_tokens": 3, "cache_read_input_tokens": tokens - 1}

    run(talk, FAST)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": []}, "Messages cannot be empty."),
        ("/v1/completions", {"prompt": ""}, "the prompt is empty"),
        ("/v1/completions", {"prompt": {"a": 1}}, "a prompt is text or token ids"),
        ("/generate", {"text": "x" * 4000}, "1000 tokens do not fit a pool of 1000"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_400(path: str, body: dict[str, Any], message: str) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        assert message in answer.json()["message"]
        assert replica.seen.generations_started == 0

    run(talk, ModelSettings(max_total_tokens=1000))
