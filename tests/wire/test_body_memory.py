"""max_buffered_bytes is shared: one client may use all of it, but keeps no other client out."""

import asyncio
import time
from pathlib import Path

import pytest

from balancer.relay import downstream
from tests.lab.replica import LabReplica
from tests.support.client import Client, Ended, chat, request
from tests.support.until import until
from tests.wire.running import House, on_uvloop, serving

MIB = 1 << 20
ONE = "127.0.0.2"
POST = request(body=chat())


def unfinished(sent: int = MIB - 1, size: int = MIB, key: str = "") -> bytes:
    """An upload of `size` bytes of which only `sent` are sent."""
    headers = (("Content-Length", str(size)), *((("Authorization", f"Bearer {key}"),) if key else ()))
    return request("POST", "/v1/images/edits", headers=headers) + b"x" * sent


async def uploading(house: House, count: int, source: str = "", key: str = "") -> list[Client]:
    """That many uploads of a MiB, each a byte short of its end."""
    doors = house.balancer.doors
    before = doors.buffered
    clients = [await house.client(source=source) for _ in range(count)]
    for client in clients:
        await client.send(unfinished(key=key))
    await until(lambda: doors.buffered == before + count * (MIB - 1))
    return clients


async def refused(clients: list[Client]) -> list[Client]:
    """Those of the clients that have already been refused for lack of room."""
    told = []
    for client in clients:
        try:
            async with asyncio.timeout(0.2):
                answer = await client.answer()
        except TimeoutError:
            continue
        assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "buffers_full", "1")
        told.append(client)
    return told


@on_uvloop
async def test_slow_uploads_harm_no_other() -> None:
    """Slow uploads of one client that fill the memory refuse no request of another."""
    async with LabReplica() as a, serving(a, max_body_bytes=MIB, max_buffered_bytes=16 * MIB) as house:
        hogs = await uploading(house, 16)
        hogs.append(await house.client())
        await hogs[-1].send(unfinished())
        for _ in range(20):
            client = await house.client(source=ONE)
            await client.send(POST)
            assert (await client.answer()).status == 200
            client.leave()
        large = await house.client(source=ONE)
        await large.send(request("POST", "/v1/images/edits", b"x" * MIB))
        assert (await large.answer()).status == 200
        told = await refused(hogs)
        assert 1 <= len(told) <= 3, "no more give way than there has to be room for"
        for hog in hogs:
            if hog not in told:
                await hog.send(b"x")
                assert (await hog.answer()).status == 200


@on_uvloop
async def test_one_client_alone() -> None:
    """One client may use all of the memory; its next request is refused."""
    async with LabReplica() as a, serving(a, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as house:
        hogs = await uploading(house, 8)
        client = await house.client()
        await client.send(unfinished())
        assert (await client.answer()).error["code"] == "buffers_full"
        assert await refused(hogs) == []
        for hog in hogs:
            await hog.send(b"x")
            assert (await hog.answer()).status == 200


@on_uvloop
async def test_waiting_bodies_give_way() -> None:
    """Whole bodies that wait for a turn make room, too: they get a 503, and their connection is closed."""
    async with (
        LabReplica(token_interval=0.01) as a,
        serving(a, max_in_flight=1, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as house,
    ):
        holder = await house.client()
        await holder.send(request(body=chat(tokens=100_000)))  # not a stream: of that, parts are kept
        await until(lambda: house.balancer.service.fleet.generating == 1)
        body = chat(images="x" * (MIB - 1000))
        hogs = [await house.client() for _ in range(8)]
        for hog in hogs:
            await hog.send(request(body=body))
        await until(lambda: house.balancer.service.admission.queue_depth == 8)
        one = await house.client(source=ONE)
        await one.send(request(body=body))
        await until(lambda: house.balancer.service.admission.queued_of(b"\x7f\x00\x00\x02") == 1)
        holder.leave()
        assert (await one.answer()).status == 200
        answers = [await hog.answer() for hog in hogs]
        assert sorted({answer.status for answer in answers}) == [200, 503]
        assert [answer.is_last for answer in answers] == [answer.status == 503 for answer in answers]
        assert sum(answer.status == 503 for answer in answers) <= 2


@on_uvloop
async def test_two_halves() -> None:
    """Two clients that both want all of the memory get half each."""
    async with LabReplica() as a, serving(a, max_body_bytes=MIB, max_buffered_bytes=12 * MIB) as house:
        first = await uploading(house, 12)
        second = []
        for _ in range(10):
            client = await house.client(source=ONE)
            second.append(client)
            await client.send(unfinished())
            await asyncio.sleep(0.05)
        held = 12 - len(await refused(first))
        others = 10 - len(await refused(second))
        assert 5 <= held <= 7
        assert 5 <= others <= 7


@on_uvloop
async def test_shares_of_keys(tmp_path: Path) -> None:
    """With API keys each key has its share, whatever addresses it is used from."""
    keys = tmp_path / "keys"
    keys.write_text("secret-hog\nsecret-one\n")
    limits = {"max_body_bytes": MIB, "max_buffered_bytes": 8 * MIB}
    async with LabReplica() as a, serving(a, config={"api_keys": keys}, **limits) as house:
        hogs = await uploading(house, 4, "127.0.0.3", "secret-hog") + await uploading(house, 4, "", "secret-hog")
        client = await house.client(source="127.0.0.4")
        await client.send(unfinished(key="secret-hog"))
        assert (await client.answer()).error["code"] == "buffers_full"
        one = await house.client()
        body = b"x" * MIB
        await one.send(request("POST", "/v1/images/edits", body, headers=(("Authorization", "Bearer secret-one"),)))
        assert (await one.answer()).status == 200
        assert 1 <= len(await refused(hogs)) <= 2


@on_uvloop
async def test_refusals_are_cheap() -> None:
    """Refusing the largest holder repeatedly does not scan all connections each time."""
    async with LabReplica() as a, serving(a, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as house:
        await uploading(house, 8)
        idle = [await house.client() for _ in range(300)]
        await until(lambda: len(house.balancer.doors.connections) == 308)
        doors = house.balancer.doors
        assert not doors.make_room(b"\x7f\x00\x00\x01")
        began = time.perf_counter()
        for _ in range(10_000):
            assert not doors.make_room(b"\x7f\x00\x00\x01")
        assert time.perf_counter() - began < 0.5
        assert len(idle) == 300


@pytest.mark.parametrize(("every", "piece", "status"), [(0.05, 1, 408), (0.05, 2000, 200)], ids=["slow", "steady"])
@on_uvloop
async def test_slow_bodies(every: float, piece: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that never falls silent but is far too slow is refused with 408."""
    monkeypatch.setattr(downstream, "SLOW_START", 0.5)
    async with LabReplica() as a, serving(a, body_timeout=2) as house:
        client = await house.client()
        await client.send(request("POST", "/v1/images/edits", headers=(("Content-Length", str(40 * piece)),)))
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def drip() -> None:
            for _ in range(40):
                await client.send(b"x" * piece)
                await asyncio.sleep(every)

        dripping = asyncio.ensure_future(drip())
        answer = await client.answer()
        assert answer.status == status
        if status == 408:
            assert answer.error["code"] == "request_timeout"
            assert loop.time() - began < 1.9, "before it was ever silent for long"
        dripping.cancel()


@on_uvloop
async def test_only_reading_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that waits behind a long answer for 100 Continue is not timed during that wait."""
    monkeypatch.setattr(downstream, "SLOW_START", 0.3)
    async with LabReplica(head_delay=1.5) as a, serving(a) as house:
        a.next(1, head_delay=1.5)
        client = await house.client()
        fields = (("Content-Length", "5"), ("Expect", "100-continue"))
        await client.send(POST + request("POST", "/v1/images/edits", headers=fields))
        assert (await client.answer()).status == 200
        await client.until(b"100 Continue\r\n\r\n")
        await client.send(b"hello")
        assert (await client.answer()).body == b"hello"


def partial(size: int) -> str:
    """The beginning of a short answer that is no stream, of which that many bytes come."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{'x' * size}"


@on_uvloop
async def test_answers_that_are_held_back_count() -> None:
    """Short answers are held back until they are whole, but no more of them than half of the memory."""
    size = 50_000
    async with LabReplica(raw=partial(size), raw_then="hang") as a, serving(a, max_buffered_bytes=MIB) as house:
        doors = house.balancer.doors
        clients = [await house.client() for _ in range(15)]
        for client in clients:
            await client.send(POST)
        told = [asyncio.ensure_future(client.head()) for client in clients]
        await until(lambda: sum(one.done() for one in told) == 5, "those beyond are passed on as they come")
        assert 10 * size < doors.buffered <= MIB / 2 + size
        for one in told:
            one.cancel()
        for client in clients:
            client.leave()
        await until(lambda: doors.buffered == 0, "nothing stays counted")


@on_uvloop
async def test_a_held_answer_that_breaks_counts_no_longer() -> None:
    async with (
        LabReplica(raw=partial(50_000), raw_then="reset") as a,
        LabReplica(head_delay=0.5) as b,
        serving(a, b) as house,
    ):
        house.member("a").turn = -1
        client = await house.client()
        await client.send(POST)
        await until(lambda: b.generating == 1, "it goes on elsewhere")
        assert house.balancer.doors.buffered < 10_000
        assert (await client.answer()).status == 200


@on_uvloop
async def test_a_stream_with_an_early_head_gives_way_whole() -> None:
    """A request that no replica has had yet is refused, and not sent without its body, though a head has gone out."""
    async with (
        LabReplica(token_interval=0.02) as a,
        serving(a, max_in_flight=1, max_body_bytes=MIB, max_buffered_bytes=4 * MIB, keep_alive_comments=0.1) as house,
    ):
        holder = await house.client()
        await holder.send(request(body=chat(tokens=100_000)))
        await until(lambda: house.balancer.service.fleet.generating == 1)
        body = chat(stream=True, images="x" * (MIB - 1000))
        hogs = [await house.client() for _ in range(4)]
        for hog in hogs:
            await hog.send(request(body=body))
        for hog in hogs:
            await hog.until(b": waiting\n\n")
        one = await house.client(source=ONE)
        await one.send(request("POST", "/v1/images/edits", b"y" * (MIB - 100)))
        assert [line["error"] for line in await house.logged()] == ["buffers_full"]
        holder.leave()
        assert (await one.answer()).status == 200
        ends = await asyncio.gather(*map(end_of, hogs))
        assert sum(end.endswith(b"[DONE]") for end in ends) == 3
        assert sum(b'"buffers_full"' in end for end in ends) == 1


async def end_of(client: Client) -> bytes:
    """A stream up to its [DONE], or to where its connection ended."""
    try:
        return await client.until(b"[DONE]")
    except Ended as end:
        return end.rest


@on_uvloop
async def test_bodies_behind_a_stream_give_way() -> None:
    """Bodies that wait behind a stream in progress keep no other client out; the stream goes on, they get a 503."""
    async with (
        LabReplica(token_interval=0.01) as a,
        serving(a, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as house,
    ):
        hogs = [await house.client() for _ in range(8)]
        for hog in hogs:
            await hog.send(request(body=chat(stream=True, tokens=300)))
            await hog.until(b"data:")
            await hog.send(request("POST", "/v1/images/edits", b"x" * (MIB - 20_000)))
        await until(lambda: house.balancer.doors.buffered > 7 * MIB)
        for _ in range(3):
            one = await house.client(source=ONE)
            await one.send(request("POST", "/v1/images/edits", b"y" * (MIB - 100)))
            assert (await one.answer()).status == 200
        for hog in hogs:
            assert b"[DONE]" in await hog.until(b"0\r\n\r\n")
        answers = [await hog.answer() for hog in hogs]
        refusals = [answer.error["code"] for answer in answers if answer.status != 200]
        assert set(refusals) == {"buffers_full"}
        assert 1 <= len(refusals) <= 4
        assert sum(line.get("error") == "buffers_full" for line in house.log()) == len(refusals)


@on_uvloop
async def test_a_request_whose_turn_has_not_come_gives_way() -> None:
    """Where no answer is in progress because the client takes none, a waiting body is refused, and not sent empty."""
    async with LabReplica() as a, serving(a) as house:
        client = await house.client(receive_buffer=4096)
        sending = asyncio.ensure_future(client.send(request("POST", "/v1/images/edits", b"x" * 60_000) * 150))
        await until(lambda: len(house.balancer.doors.connections) == 1)
        (connection,) = house.balancer.doors.connections
        await until(lambda: "full, blocked" in repr(connection) and not connection._reply)  # type: ignore[attr-defined]
        for _ in range(2):
            assert connection.give_way()
        while (answer := await client.answer()).status == 200:
            assert len(answer.body) == 60_000
        assert answer.error["code"] == "buffers_full"
        assert {seen.body_length for seen in a.seen.requests} == {60_000}
        sending.cancel()
