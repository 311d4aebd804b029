"""How a balancer drains: it loses no request that has begun, and closes no connection unannounced."""

import asyncio
import contextlib
import signal

import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Ended, chat, request
from tests.support.until import until
from tests.wire.process import running
from tests.wire.running import House, on_uvloop, serving

POST = request(body=chat())
LONG = request(body=chat(stream=True, tokens=20))
READY = request("GET", "/ready")


@contextlib.asynccontextmanager
async def leaving(house: House):  # type: ignore[no-untyped-def]
    """The block runs while the balancer drains."""
    hurry = asyncio.Event()
    task = asyncio.ensure_future(house.balancer.leave(hurry))
    await asyncio.sleep(0)
    yield task
    hurry.set()
    await task


# Within drain_grace


@on_uvloop
async def test_drain_begins() -> None:
    """A drain makes /ready 503 at once, while the port stays open and answers say "Connection: close"."""
    async with LabReplica() as a, serving(a, drain_grace=30) as house:
        kept = await house.client()
        await kept.send(POST)
        assert not (await kept.answer()).is_last
        async with leaving(house):
            ready = await house.ask(READY, "GET")
            assert (ready.status, ready.error["code"], ready.is_last) == (503, "shutting_down", True)
            assert ready.header("retry-after") == "1"
            assert (await house.ask(request("GET", "/health"), "GET")).status == 200
            for client in (kept, await house.client()):
                await client.send(POST + POST)
                answer = await client.answer()
                assert answer.status == 200
                if not answer.is_last:
                    answer = await client.answer()
                assert answer.is_last
                client.leave()


@on_uvloop
async def test_a_connection_is_not_closed_before_an_answer_said_so() -> None:
    """An answer that began before the drain promised its client that the connection stays open."""
    async with LabReplica(token_interval=0.01) as a, serving(a, drain_grace=30) as house:
        client = await house.client()
        await client.send(LONG)
        await client.until(b"\r\n\r\n")
        async with leaving(house):
            await client.until(b"0\r\n\r\n")
            await asyncio.sleep(0.05)
            await client.send(POST)
            answer = await client.answer()
            assert (answer.status, answer.is_last) == (200, True)
            assert await client.is_ended()


# After drain_grace


@on_uvloop
async def test_port_closes() -> None:
    """The port closes, idle connections are closed, and requests in progress are finished."""
    async with LabReplica(token_interval=0.02) as a, serving(a, drain_grace=0.1, drain_timeout=30) as house:
        idle, busy, asking = await house.client(), await house.client(), await house.client()
        await idle.send(POST)
        await idle.answer()
        await busy.send(LONG)
        await busy.until(b"t00")
        await asking.send(POST[:-5])
        async with leaving(house) as task:
            assert await idle.is_ended()
            await asking.send(POST[-5:])
            answer = await asking.answer()
            assert (answer.status, answer.is_last) == (200, True)
            assert (await busy.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            for client in (asking, busy):
                client.leave()
            await task
            with pytest.raises(ConnectionRefusedError):
                await house.client()


@on_uvloop
async def test_request_amid_closing() -> None:
    """A request that was arriving when the port closed is answered."""
    async with LabReplica() as a, serving(a, drain_timeout=30) as house:
        fresh = await house.client()
        async with leaving(house) as task:
            await asyncio.sleep(0.02)
            with pytest.raises(ConnectionRefusedError):
                await house.client()
            await fresh.send(POST)
            answer = await fresh.answer()
            assert (answer.status, answer.is_last) == (200, True)
            fresh.leave()
            await task


@on_uvloop
async def test_client_accepted_amid_closing() -> None:
    """A client that is accepted at the moment of closing is disconnected at once."""
    async with LabReplica() as a, serving(a) as house:
        house.balancer.doors.close()
        late = await house.client()
        assert await late.is_ended()


@on_uvloop
async def test_drain_timeout() -> None:
    """What is not finished after drain_timeout ends as a broken stream or a 503."""
    async with LabReplica(token_interval=0.02) as a, serving(a, drain_timeout=0.3, max_in_flight=2) as house:
        streaming, prefilling, queued = await house.client(), await house.client(), await house.client()
        await streaming.send(request(body=chat(stream=True, tokens=100_000)))
        await streaming.until(b"t00")
        a.set(head_delay=60.0)
        await prefilling.send(POST)
        await a.seen.until(lambda seen: seen.generations_started == 2)
        await queued.send(POST)
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        async with leaving(house) as task:
            await task
            rest = await streaming.rest()
            assert b'"stream_broken"' in rest
            assert b"shutting down" in rest
            assert not rest.endswith(b"0\r\n\r\n")
            for client in (prefilling, queued):
                answer = await client.answer()
                assert (answer.status, answer.error["code"], answer.is_last) == (503, "shutting_down", True)
        await a.seen.until(lambda seen: seen.generations_aborted == 2)
        lines = {line["status"]: line for line in await house.logged(3)}
        assert lines[200]["error"] == "stream_broken"
        assert lines[503]["error"] == "shutting_down"


@on_uvloop
async def test_bytes_amid_breaking_off() -> None:
    """Bytes that arrive at the moment in which a stream is broken off are dropped."""
    async with LabReplica(token_interval=0.01) as a, serving(a) as house:
        client = await house.client()
        await client.send(request(body=chat(stream=True, tokens=100_000)))
        await client.until(b"t00")
        (connection,) = house.balancer.doors.connections
        (upstream,) = house.balancer.destination.pool.busy
        connection.break_off("a test ends it.")
        upstream.data_received(b"a\r\ndata: {}\n\n\r\n")
        assert (await client.rest()).endswith(b"\n\n\r\n"), "our own event is the last"
        await a.seen.until(lambda seen: seen.generations_aborted == 1)


# As a process


@on_uvloop
async def test_sigterm_under_dense_traffic_loses_no_request() -> None:
    """Clients in closed loops keep their connections; on "Connection: close" a client opens a new one while it can."""
    async with LabReplica(head_delay=0.005) as a, running(a.url, drain_grace=1, drain_timeout=10) as balancer:
        is_over = asyncio.Event()
        outcomes: list[int] = []

        async def asking() -> None:
            while not is_over.is_set():
                client = await balancer.client()
                is_last = False
                while not is_last and not is_over.is_set():
                    await client.send(POST)
                    answer = await client.answer()
                    outcomes.append(answer.status)
                    is_last = answer.is_last
                client.leave()

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(asking())
            await a.seen.until(lambda seen: len(seen.requests) > 100)
            balancer.signal(signal.SIGTERM)
            seen = len(a.seen.requests)
            await a.seen.until(lambda now: len(now.requests) > seen + 100)
            is_over.set()  # a client that checks /ready goes elsewhere long before the port closes
        assert await balancer.end() == 0
        assert set(outcomes) == {200}
        assert balancer.complained == b""
        assert balancer.printed.count(b'"path":"/v1/chat/completions","status":200') == len(outcomes)


@on_uvloop
async def test_sigterm_finishes_a_stream_then_the_process_ends_with_0() -> None:
    async with LabReplica(token_interval=0.02) as a, running(a.url, drain_grace=0, drain_timeout=30) as balancer:
        client = await balancer.client()
        await client.send(request(body=chat(stream=True, tokens=40)))
        await client.until(b"t00")
        balancer.signal(signal.SIGTERM)
        assert (await client.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        client.leave()
        assert await balancer.end() == 0
        line = orjson.loads(balancer.printed.splitlines()[-1])
        assert (line["status"], line["path"]) == (200, "/v1/chat/completions")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@on_uvloop
async def test_a_second_signal_ends_at_once_and_tells_the_streams(number: signal.Signals) -> None:
    async with LabReplica(token_interval=0.02) as a, running(a.url, drain_grace=60) as balancer:
        client = await balancer.client()
        await client.send(request(body=chat(stream=True, tokens=100_000)))
        await client.until(b"t00")
        balancer.signal(signal.SIGTERM)
        await balancer.says(503)
        loop = asyncio.get_running_loop()
        began = loop.time()
        balancer.signal(number)
        assert b'"stream_broken"' in await client.rest()
        assert await balancer.end() == 0
        assert loop.time() - began < 3
        with pytest.raises(Ended):
            await client.answer()
        await a.seen.until(lambda seen: seen.generations_aborted == 1)
