import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.lab.spawn import SpawnedReplica, spawn_replica

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def client_of(replica: SpawnedReplica) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=replica.url, timeout=10.0)


async def refused(replica: SpawnedReplica) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", replica.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


def test_spawned_replica() -> None:
    """A spawned replica answers, takes new knobs and reports what it saw."""

    async def main() -> None:
        async with spawn_replica(tokens=2) as replica, client_of(replica) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).json()["usage"]["completion_tokens"] == 2
            await replica.next(1, status=503)
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
            await replica.set(tokens=5)
            assert (await client.post("/v1/chat/completions", json=CHAT)).json()["usage"]["completion_tokens"] == 5
            seen = await replica.until(lambda seen: seen["requests"][-1]["outcome"] == "answered")
            assert [request["status"] for request in seen["requests"]] == [200, 503, 200]
            with pytest.raises(ValueError, match="did you mean 'tokens'"):
                await replica.set(token=5)
            await replica.refuse()
            assert await refused(replica)
            await replica.accept()
            assert not await refused(replica)

    asyncio.run(main())


def test_a_slow_start_refuses_and_a_warm_up_is_not_ready() -> None:
    async def main() -> None:
        began = time.monotonic()
        async with spawn_replica("--start-delay", "1.0", "--warm-up", "2.0", wait=False) as replica:
            await replica.ready()
            assert time.monotonic() - began >= 1.0
            async with client_of(replica) as client:
                statuses: list[int] = []
                while not statuses or statuses[-1] == 503:
                    statuses.append((await client.get("/ready")).status_code)
                assert statuses[0] == 503
                assert statuses[-1] == 200

    asyncio.run(main())


def test_kill_9_and_restart() -> None:
    """kill -9 resets the connections, and a replica restarted on the same port has another identity."""

    async def main() -> None:
        seeds = []
        async with spawn_replica(first_token_delay=60.0) as replica, client_of(replica) as client:
            port = replica.port
            seeds.append((await client.get("/server_info")).json()["random_seed"])
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await replica.until(lambda seen: seen["generations_started"] == 1)
            replica.send_signal(signal.SIGKILL)
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await asking
            assert await replica.wait() == -signal.SIGKILL
            assert await refused(replica)
        async with spawn_replica(port=port) as replica, client_of(replica) as client:
            seeds.append((await client.get("/server_info")).json()["random_seed"])
        assert seeds[0] != seeds[1]

    asyncio.run(main())


def test_a_stopped_process_answers_again_when_it_goes_on() -> None:
    async def main() -> None:
        async with spawn_replica() as replica, client_of(replica) as client:
            replica.send_signal(signal.SIGSTOP)
            with pytest.raises(httpx.ReadTimeout):
                await client.get("/ready", timeout=httpx.Timeout(10.0, read=0.3))
            replica.send_signal(signal.SIGCONT)
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(main())


def test_a_black_hole_is_turned_on_and_off_past_it() -> None:
    async def main() -> None:
        async with spawn_replica(black_hole=True) as replica, client_of(replica) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=CHAT, timeout=httpx.Timeout(10.0, read=0.3))
            await replica.set(black_hole=False)
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            seen = await replica.seen()
            assert (seen["connections_accepted"], len(seen["requests"])) == (2, 1)

    asyncio.run(main())


def test_sigterm_of_stock_sglang() -> None:
    """Stock SGLang ends an idle replica some time after SIGTERM, and accepts requests until then."""

    async def main() -> None:
        async with spawn_replica("--exit-look", "3.0") as replica, client_of(replica) as client:
            replica.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).status_code != 503:
                pass
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            async with asyncio.timeout(10.0):
                assert await replica.wait() == 0
            assert await refused(replica)

    asyncio.run(main())


def test_stock_sigterm_waits_for_what_is_in_flight() -> None:
    async def main() -> None:
        async with spawn_replica("--exit-look", "0.2", token_interval=0.3) as replica, client_of(replica) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await replica.until(lambda seen: seen["generations_started"] == 1)
            replica.send_signal(signal.SIGTERM)
            assert (await asking).json()["usage"]["completion_tokens"] == 4
            assert await replica.wait() == 0

    asyncio.run(main())


def test_stock_sigterm_of_an_unhealthy_replica_does_not_drain() -> None:
    async def main() -> None:
        flags = ("--faithful", "--exit-look", "0.2")
        async with spawn_replica(*flags, health_timeout=0.1) as replica, client_of(replica) as client:
            await replica.set(stuck=True)
            assert (await client.get("/health")).status_code == 503
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await replica.until(lambda seen: seen["generations_started"] == 1)
            replica.send_signal(signal.SIGTERM)
            assert await replica.wait() == 0
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await asking

    asyncio.run(main())


def test_sigterm_with_the_plugin() -> None:
    """With the plug-in, a replica keeps serving for the grace after SIGTERM, then finishes what is in flight."""

    async def main() -> None:
        flags = ("--drain-plugin", "--drain-grace", "2.0", "--exit-look", "0.1")
        async with spawn_replica(*flags, token_interval=0.5) as replica, client_of(replica) as client:
            replica.send_signal(signal.SIGTERM)
            began = time.monotonic()
            while (await client.get("/ready")).status_code != 503:
                pass
            # Sparse traffic: this request comes well after SIGTERM, and takes longer than the grace.
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["usage"]["completion_tokens"] == 4
            assert await replica.wait() == 0
            assert time.monotonic() - began >= 2.0

    asyncio.run(main())


def test_a_bad_knob_stops_the_start_with_one_line() -> None:
    async def main() -> None:
        with pytest.raises(AssertionError, match="ended with 1:\nlab replica: knob 'cut' cannot be 'sometimes'"):
            async with spawn_replica(cut="sometimes"):
                pass

    asyncio.run(main())


def test_nothing_outlives_the_test() -> None:
    async def main() -> int:
        async with spawn_replica() as replica:
            replica.send_signal(signal.SIGSTOP)
            return replica.pid

    assert not Path(f"/proc/{asyncio.run(main())}").exists()
