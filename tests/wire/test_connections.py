"""Client connections: keep-alive, pipelining, HTTP/1.0, and how they end."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from balancer.relay import downstream
from tests.lab.replica import LabReplica
from tests.support.client import CHAT, chat, request
from tests.support.until import until
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

POST = request(body=chat())
MODELS = request("GET", "/v1/models/lab")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


def get(path: str = "/v1/models/lab", *headers: tuple[str, str], version: str = "1.1") -> bytes:
    return request("GET", path, headers=headers, version=version)


# Keep-alive


@in_house
async def test_one_connection_carries_many_requests(house: House) -> None:
    client = await house.client()
    for _ in range(50):
        await client.send(POST)
        answer = await client.answer()
        assert (answer.status, answer.is_last) == (200, False)
    assert len({request.connection for request in house.replicas[0].seen.requests}) == 1, "upstream connection reused"


@in_house
async def test_connection_close_is_honoured_and_said(house: House) -> None:
    client = await house.client()
    await client.send(get("/v1/models/lab", ("Connection", "close")) + MODELS)
    assert (await client.answer("GET")).is_last
    assert await client.is_ended(), "what follows is not answered"
    assert len(house.replicas[0].seen.requests) == 1


OLD = {
    "without keep-alive": ((), True),
    "with keep-alive": ((("Connection", "keep-alive"),), False),
}


@pytest.mark.parametrize("framing", ["content-length", "chunked", "close"])
@pytest.mark.parametrize("row", **each(OLD))
@in_house
async def test_http_1_0_clients(house: House, row: tuple[tuple[tuple[str, str], ...], bool], framing: str) -> None:
    headers, ends = row
    house.replicas[0].set(framing=framing, body="0123456789" * 100)
    client = await house.client()
    await client.send(get("/v1/models/lab", *headers, version="1.0"))
    answer = await client.answer("GET")
    assert (answer.status, answer.body) == (200, b"0123456789" * 100)
    assert answer.header("transfer-encoding") is None, "HTTP/1.0 knows no chunks"
    if ends or framing != "content-length":
        assert answer.is_last
        assert await client.is_ended()
    else:
        assert answer.header("connection") == "keep-alive"
        await client.send(get("/v1/models/lab", *headers, version="1.0"))
        assert (await client.answer("GET")).status == 200


@in_house
async def test_an_http_1_0_client_needs_no_host_and_gets_errors_too(house: House) -> None:
    client = await house.client()
    await client.send(b"GET /v1/models/lab HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (await client.answer("GET")).status == 200
    await client.send(b"GET /nowhere HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (await client.answer("GET")).error["code"] == "not_found"
    await client.send(b"POST /v1/models/lab HTTP/1.0\r\n\r\n")
    assert (await client.answer()).status == 200
    assert await client.is_ended()


@on_uvloop
async def test_idle_connection() -> None:
    """An idle connection is closed after keep_alive_timeout without an answer."""
    async with LabReplica() as a, serving(a, keep_alive_timeout=0.3) as house:
        fresh, used = await house.client(), await house.client()
        await used.send(POST)
        await used.answer()
        began = asyncio.get_running_loop().time()
        assert await fresh.is_ended()
        assert await used.is_ended()
        assert 0.1 < asyncio.get_running_loop().time() - began < 2


@on_uvloop
async def test_empty_lines_do_not_keep_a_connection() -> None:
    async with LabReplica() as a, serving(a, keep_alive_timeout=0.3, head_timeout=0.3) as house:
        client = await house.client()
        began = asyncio.get_running_loop().time()
        while house.balancer.doors.connections:
            with contextlib.suppress(ConnectionError):
                await client.send(b"\r\n")
            await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - began < 2


# Pipelining


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
@in_house
async def test_pipelined_requests(house: House, size: int) -> None:
    """Pipelined requests are answered in order, however they are split into reads."""
    client = await house.client()
    wanted = [f"/v1/models/{n}" for n in range(10)]
    data = b"".join(get(path, ("X-Request-Id", path[11:])) for path in wanted)
    for start in range(0, len(data), size):
        await client.send(data[start : start + size])
        if size < 100:
            await asyncio.sleep(0)
    for path in wanted:
        assert (await client.answer("GET")).header("x-request-id") == path[11:]
    assert [request.target for request in house.replicas[0].seen.requests] == wanted


MIXED = {
    "refused": get("/nowhere"),
    "own": get("/health"),
    "relayed": MODELS,
    "upgrade": get("/v1/models/lab", ("Connection", "upgrade"), ("Upgrade", "h2c")),
    "refused upgrade": get("/nowhere", ("Connection", "upgrade"), ("Upgrade", "websocket")),
    "TRACE": request("TRACE", "/v1/models"),
    "CONNECT": request("CONNECT", "wire.test:443"),
}


@pytest.mark.parametrize("one", **each(MIXED))
@in_house
async def test_thousands_of_pipelined_requests_are_answered(house: House, one: bytes) -> None:
    """More requests in one read than the recursion limit."""
    count = 1500
    client = await house.client()
    sending = asyncio.ensure_future(client.send(POST + one * count))
    assert (await client.answer()).status == 200
    statuses = [(await client.answer()).status for _ in range(count)]
    await sending
    assert len(set(statuses)) == 1, set(statuses)
    assert len(await house.logged(count + 1)) == count + 1


@in_house
async def test_large_pipelined_head(house: House) -> None:
    """A pipelined head that is larger than one read is not refused as too large.

    What counts is each head's own size, not how much arrived with it.
    """
    client = await house.client()
    count = 2500
    half = get("/nowhere", ("X-Filler", "x" * 100))
    data = half * count
    cut = len(data) - len(half) // 2
    await client.send(POST[:-1])  # so that everything after it is read while this request waits
    await client.send(POST[-1:] + data[:cut])
    assert (await client.answer()).status == 200
    await asyncio.sleep(0.05)
    sending = asyncio.ensure_future(client.send(data[cut:]))
    assert {(await client.answer("GET")).status for _ in range(count)} == {404}
    await sending


@pytest.mark.parametrize("count", [1, 3])
@in_house
async def test_half_closed_client(house: House, count: int) -> None:
    """An answer that was ready reaches a client that has closed its sending side.

    The last request and the client's EOF arrive in one read.
    """
    client = await house.client()
    client.sock.send(get("/flush_cache") * count)
    client.leave("half")
    assert (await client.answer("GET")).status == 404


@in_house
async def test_a_refused_request_leaves_the_connection_to_the_next(house: House) -> None:
    client = await house.client()
    await client.send(request("POST", "/flush_cache", b"x" * 60_000) + request("GET", "/flush_cache") + POST)
    assert (await client.answer()).error["code"] == "not_found"
    assert (await client.answer("GET")).error["code"] == "not_found"
    answer = await client.answer()
    assert (answer.status, answer.is_last) == (200, False)
    assert len(house.replicas[0].seen.requests) == 1


@pytest.mark.parametrize("close", [False, True], ids=["stays", "goes"])
@in_house
async def test_bytes_after_a_final_refusal(house: House, close: bool) -> None:
    """Bytes after a request that was refused for good are neither served nor kept."""
    client = await house.client()
    bad = b"GET / HTTP/1.1\r\n\r\n"  # no Host
    ghost = request(body=b"x" * 50_000)
    await client.send(bad + ghost + ghost + ghost)
    answer = await client.answer("GET")
    assert (answer.status, answer.is_last) == (400, True)
    if close:
        client.leave()
        await until(lambda: not house.balancer.doors.connections)
    assert house.balancer.doors.buffered == 0
    assert house.replicas[0].seen.requests == []
    assert len(await house.logged(1)) == 1


@on_uvloop
async def test_what_is_read_ahead_is_bounded() -> None:
    async with LabReplica(head_delay=0.5) as a, serving(a) as house:
        client = await house.client()
        await client.send(POST)
        await a.seen.until(lambda seen: seen.generations_started == 1)
        sending = asyncio.ensure_future(client.send(request(path="/v1/images/edits", body=b"x" * 500_000) * 100))
        await until(lambda: house.balancer.doors.buffered > 1 << 20)
        await asyncio.sleep(0.1)  # whatever could arrive would have arrived
        assert house.balancer.doors.buffered < 2 << 20
        sending.cancel()


@in_house
async def test_a_connection_says_in_which_state_it_is(house: House) -> None:
    """The state as it appears in a log or a failed test."""
    client = await house.client()
    await until(lambda: house.balancer.doors.connections)
    (connection,) = house.balancer.doors.connections

    async def now(state: str) -> None:
        await until(lambda: repr(connection) == f"<ClientConnection of 127.0.0.1: {state}>", f"{state}: {connection}")

    await now("idle")
    await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: wire.test\r\n")
    await now("reading a head")
    await client.send(b"Content-Length: 2\r\n\r\n{")
    await now("reading a body")
    house.replicas[0].set(head_delay=0.2)
    await client.send(b"}" + request("GET", "/v1/models", headers=(("Connection", "close"),)))
    await now("deaf, 2 to answer")
    await client.answer()
    await client.answer("GET")
    await now("over, deaf")


@in_house
async def test_read_ahead_is_bounded(house: House) -> None:
    """Read-ahead is bounded for requests without bodies as well.

    This holds however many one read brings: a morsel holds some 150 of the smallest.
    """
    client = await house.client()
    count = 50_000
    await client.send(POST[:-1])
    (connection,) = house.balancer.doors.connections
    sending = asyncio.ensure_future(client.send(POST[-1:] + b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * count))
    most = answered = 0
    while answered < count:
        assert await client.more()
        answered += client.received.count(b"HTTP/1.1 404")
        client.received = client.received[-11:]
        most = max(most, len(connection._queue))
    await sending
    assert 32 < most < 32 + 200


@pytest.mark.parametrize(
    "one",
    [get("/nowhere"), get("/v1/models/lab"), get("/v1/models/lab", ("Connection", "upgrade"), ("Upgrade", "h2c"))],
    ids=["refused", "relayed", "upgrade"],
)
@on_uvloop
async def test_what_is_read_behind_a_slow_answer_is_counted_and_little(one: bytes) -> None:
    async with LabReplica(head_delay=1.0) as a, serving(a) as house:
        client = await house.client()
        await client.send(POST)
        await a.seen.until(lambda seen: seen.generations_started == 1)
        (connection,) = house.balancer.doors.connections
        a.set(head_delay=0.0)
        sending = asyncio.ensure_future(client.send(one * 5000))
        await until(lambda: connection._is_full, "enough is read")
        queue, doors = connection._queue, house.balancer.doors
        assert 32 < len(queue) < 32 + 150
        assert len(queue) << 10 < doors.buffered < (len(queue) << 11) + (64 << 10), "each head and what is not parsed"
        for _ in range(5001):
            await client.answer()
        await sending
        assert doors.buffered == 0


@on_uvloop
async def test_waiting_heads_are_counted() -> None:
    """Waiting heads count towards the common limit; a connection's first one always passes."""
    async with LabReplica(hang="before_head") as a, serving(a, max_buffered_bytes=300_000) as house:
        clients = [await house.client() for _ in range(7)]
        for client in clients:
            await client.send(POST + get("/v1/models/lab", ("X-Big", "x" * 50_000)))
        await a.seen.until(lambda seen: len(seen.requests) == 7)
        await until(lambda: sum(c._is_deaf for c in house.balancer.doors.connections) == 2, "refused")
        assert 250_000 < house.balancer.doors.buffered <= 300_000
        assert (await house.ask(get("/health"), "GET")).status == 200


@on_uvloop
async def test_a_body_that_is_not_read_for_our_own_sake_is_not_late() -> None:
    async with LabReplica() as a, serving(a, body_timeout=0.3) as house:
        client = await house.client()
        a.next(1, head_delay=1.0)
        big = request(path="/v1/images/edits", body=b"x" * 900_000)
        sending = asyncio.ensure_future(client.send(POST + big * 4))
        answers = [(await client.answer()).status for _ in range(5)]
        await sending
        assert answers == [200] * 5


# While the previous answer is still on its way


@pytest.mark.parametrize("less", [0, 20, 40, 60, 80, 120, 160], ids=lambda less: f"{less} KiB less")
@in_house
async def test_slow_end_of_an_answer(house: House, less: int) -> None:
    """An answer whose end a slow client does not read holds up no other.

    Neither the next answer on its connection, nor another client's on the same upstream connection.
    """
    a = house.replicas[0]
    a.next(1, body_mib=64.0)
    probing = await house.client(receive_buffer=4096)
    await probing.send(request("GET", "/v1/models/big"))
    await until(lambda: any(upstream.is_paused for upstream in house.balancer.destination.pool.busy), "held back")
    probing.leave("reset")
    size = (await house.logged(1))[0]["bytes_out"] - less * 1024  # so that its last bytes are held back
    a.next(1, body_mib=size / (1 << 20))
    client = await house.client(receive_buffer=4096)
    await client.send(request("GET", "/v1/models/big") + MODELS + POST)
    await a.seen.until(lambda seen: len(seen.requests) > 1 and seen.requests[1].status)
    await asyncio.sleep(0.02)  # paused, or read to the end: no event says which
    assert (await house.ask(MODELS, "GET")).status == 200
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    assert len((await client.answer()).body) == size
    assert (await client.answer()).status == 200
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("how", ["Connection: close", "HTTP/1.0"])
@on_uvloop
async def test_a_last_answer_comes_whole_to_a_client_that_sends_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were closed at once, the kernel would answer new data with a reset, and discard what is not read yet."""
    monkeypatch.setattr(downstream, "LINGER", 60.0)  # a busy machine may take seconds to read it
    async with LabReplica(body_mib=8) as a, serving(a) as house:
        client = await house.client(receive_buffer=65536)
        await client.send(get(version="1.0") if how == "HTTP/1.0" else get("/v1/models/lab", ("Connection", "close")))

        async def sends_on() -> None:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    await client.send(b"x" * 1000)
                    await asyncio.sleep(0.005)

        sending = asyncio.ensure_future(sends_on())
        await house.at_rest()
        await asyncio.sleep(0.1)
        assert len((await client.answer("GET")).body) == 8 << 20
        sending.cancel()


@in_house
async def test_head_requests_get_no_body_and_keep_the_connection(house: House) -> None:
    client = await house.client()
    for framing in ("content-length", "chunked", "close"):
        house.replicas[0].set(framing=framing, body="x" * 1000)
        await client.send(request("HEAD", CHAT))
        answer = await client.answer("HEAD")
        assert (answer.status, answer.is_last) == (200, False)
        assert answer.header("content-length") == ("1000" if framing == "content-length" else None)
    await client.send(request("HEAD", "/nowhere") + request("HEAD", "/health"))
    assert (await client.answer("HEAD")).status == 404
    assert (await client.answer("HEAD")).status == 200
    await client.send(MODELS)
    assert (await client.answer("GET")).status == 200
