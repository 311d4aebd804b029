import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from replica.tenant import Limits, State, Tenant
from replica.turn import Turn
from tests.lab.card import Held, OutOfMemory
from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.lab.spawn import spawn_replica
from tests.lab.tenant import Seat
from tests.support.until import until

ORDERS = {"X-Balancer": "a test"}


def run(talk: Any) -> None:
    asyncio.run(asyncio.wait_for(talk(), 60))


async def lease(client: httpx.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get("/lease", headers=ORDERS)).raise_for_status().json()
    return answer


async def order(client: httpx.AsyncClient, what: str) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.post(f"/lease/{what}", headers=ORDERS)).raise_for_status().json()
    return answer


def of(replica: Any, **more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=replica.url, timeout=30, **more)


def asking(tokens: int, **more: Any) -> dict[str, Any]:
    return {"text": "x", "sampling_params": {"max_new_tokens": tokens}, **more}


async def streamed(client: httpx.AsyncClient, tokens: int) -> str:
    """The text of a whole stream of /generate, whose events each have all of it."""
    text = ""
    async with client.stream("POST", "/generate", json=asking(tokens, stream=True)) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text = json.loads(line[6:])["text"]
    return text


def test_doze_keeps_requests_until_it_wakes(tmp_path: Path) -> None:
    async def talk() -> None:
        async with LabReplica(seat=Seat(tmp_path)) as replica, of(replica) as client:
            await until_state(client, "AWAKE")
            assert (await client.get("/ready")).status_code == 200
            dozing = await order(client, "doze")
            assert (dozing["state"], dozing["ordered_by"]) == ("DOZING", "a test")
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()) == (503, {"state": "DOZING"})
            for path in ("/health", "/alive"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()) == (200, {"state": "DOZING"})
            assert (await client.post("/flush_cache")).status_code == 503
            assert (await client.post("/pause_generation")).status_code == 403
            waits = asyncio.create_task(client.post("/generate", json=asking(3)))
            await replica.seen.until(lambda seen: seen.generations_started == 1)
            assert (await lease(client))["requests"] == 1
            assert not waits.done()
            assert (await order(client, "wake"))["swaps"]["wakes"] == 1
            assert (await waits).status_code == 200

    run(talk)


async def until_state(client: httpx.AsyncClient, state: str) -> None:
    async with asyncio.timeout(20):
        while (await lease(client))["state"] != state:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("model", [None, ModelSettings(itl_base=0.01)], ids=["plain", "faithful"])
def test_preempted_stream_ends_with_the_same_text(tmp_path: Path, model: ModelSettings | None) -> None:
    async def talk() -> None:
        seat = Seat(tmp_path)
        async with LabReplica(seat=seat, model=model, token_interval=0.01) as replica, of(replica) as client:
            await until_state(client, "AWAKE")
            undisturbed = await streamed(client, 150)
            stream = asyncio.create_task(streamed(client, 150))
            await until(lambda: len(replica.seen.requests) == 2 and replica.seen.last.tokens_sent > 10, "it runs", 20)
            await order(client, "doze")
            sent = replica.seen.last.tokens_sent
            await asyncio.sleep(0.2)
            assert replica.seen.last.tokens_sent == sent < 150
            await order(client, "sleep")
            await order(client, "wake")
            assert await stream == undisturbed
            assert replica.live is None or replica.live.model.retracted_total == 1

    run(talk)


def test_two_take_turns_by_themselves(tmp_path: Path) -> None:
    async def talk() -> None:
        one, two = (LabReplica(seat=Seat(tmp_path, gpu_slice=0.2), token_interval=0.01) for _ in range(2))
        async with one, two, of(one) as its, of(two) as others:
            texts = await asyncio.gather(*(streamed(client, 50) for client in (its, others) * 2))
            assert len(set(texts)) == 1
            assert (await lease(its))["swaps"]["wakes"] >= 1
            assert {one.sharing.tenant.state, two.sharing.tenant.state} == {State.AWAKE, State.DOZING}  # type: ignore[union-attr]
            assert [other["gpu"] for other in (await lease(its))["others"]] == ["GPU-a"]

    run(talk)


def test_the_answers_of_lease_have_the_real_shape(tmp_path: Path) -> None:
    class Nothing:
        def __getattr__(self, _: str) -> Any:
            return lambda *_: 0

    real = Tenant(Turn.join(tmp_path, ["GPU-b"], "real", time.time()), Nothing(), Limits())  # type: ignore[arg-type]

    async def talk() -> None:
        async with LabReplica(seat=Seat(tmp_path)) as replica, of(replica) as client:
            assert (await lease(client)).keys() == real.to_json().keys()

    run(talk)


def test_the_key_guards_all_but_alive(tmp_path: Path) -> None:
    async def talk() -> None:
        async with LabReplica(seat=Seat(tmp_path), api_key="k") as replica, of(replica) as client:
            assert (await client.get("/lease")).status_code == 401
            assert (await client.post("/lease/doze")).status_code == 401
            assert (await client.get("/alive")).status_code == 200
            assert (await client.get("/lease", headers={"Authorization": "Bearer k"})).status_code == 200

    run(talk)


async def dies(replica: LabReplica) -> str:
    assert replica.sharing is not None
    engine = replica.sharing.engine
    await until(lambda: not replica.is_listening, "it died", 10)
    return engine.died_of


def test_it_dies_of_what_sglang_dies_of(tmp_path: Path) -> None:
    async def request_after_release(replica: LabReplica, client: httpx.AsyncClient) -> str:
        await replica.sharing.engine.release(["kv_cache"])  # type: ignore[union-attr]
        asked = asyncio.create_task(client.post("/generate", json=asking(1)))
        why = await dies(replica)
        with pytest.raises(httpx.TransportError):
            await asked
        return why

    async def release_amid_a_request(replica: LabReplica, client: httpx.AsyncClient) -> str:
        asked = asyncio.create_task(client.post("/generate", json=asking(1000)))
        await replica.seen.until(lambda seen: seen.generations_started == 1)
        asyncio.get_running_loop().call_soon(
            asyncio.create_task,
            replica.sharing.engine.release(["kv_cache"]),  # type: ignore[union-attr]
        )
        why = await dies(replica)
        with pytest.raises(httpx.TransportError):
            await asked
        return why

    async def resume_without_memory(replica: LabReplica, client: httpx.AsyncClient) -> str:
        await order(client, "doze")
        thief = Held(tmp_path, "GPU-a", 80 << 30)
        thief.take(60 << 30)
        asyncio.get_running_loop().call_soon(
            asyncio.create_task,
            replica.sharing.engine.resume(["kv_cache"]),  # type: ignore[union-attr]
        )
        why = await dies(replica)
        thief.close()
        return why

    async def talk() -> None:
        for kills, word in (
            (request_after_release, "illegal memory access"),
            (release_amid_a_request, "idle"),
            (resume_without_memory, "out of memory"),
        ):
            async with LabReplica(seat=Seat(tmp_path), token_interval=0.01) as replica, of(replica) as client:
                await until_state(client, "AWAKE")
                assert word in await kills(replica, client)

    run(talk)


def test_a_card_is_shared_by_the_memory_that_each_takes(tmp_path: Path) -> None:
    one, two = Held(tmp_path, "GPU-a", 100), Held(tmp_path, "GPU-a", 100)
    one.take(70)
    assert two.free() == 30
    with pytest.raises(OutOfMemory):
        two.take(40)
    one.close()
    two.take(40)
    assert two.free() == 60
    two.close()


def test_processes_share_a_seat_and_a_kill_frees_it(tmp_path: Path) -> None:
    async def talk() -> None:
        seat = ("--seat", str(tmp_path), "--seat-gpu-slice", "60", "--seat-start", "0.1")
        first, second = spawn_replica(*seat, token_interval=0.01), spawn_replica(*seat, wait=False)
        async with first as one, of(one) as its, second as two:
            stream = asyncio.create_task(streamed(its, 10_000))
            await one.until(lambda seen: seen["generations_started"] == 1)
            assert not two.url
            one.send_signal(signal.SIGKILL)
            await two.ready()
            with pytest.raises(httpx.TransportError):
                await stream
            async with of(two) as others:
                await until_state(others, "AWAKE")
                assert (await lease(others))["others"] == []

    run(talk)


def test_sigterm_of_a_dozing_one_with_requests_waits_for_a_turn(tmp_path: Path) -> None:
    async def talk() -> None:
        seat = ("--seat", str(tmp_path), "--drain-plugin", "--drain-grace", "0.1", "--seat-gpu-slice", "60")
        async with spawn_replica(*seat) as one, of(one) as its, spawn_replica(*seat) as two, of(two) as others:
            await until_state(others, "AWAKE")
            await until_state(its, "DOZING")
            waits = asyncio.create_task(its.post("/generate", json=asking(1)))
            await one.until(lambda seen: seen["generations_started"] == 1)
            one.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert not waits.done()  # the other, which a balancer orders, has the turn
            await order(others, "doze")
            assert (await waits).status_code == 200
            assert await one.wait() == 0

    run(talk)
