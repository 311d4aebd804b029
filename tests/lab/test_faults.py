import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from tests.lab.replica import LabReplica
from tests.lab.test_replica import CHAT, STREAM, exchange, with_replica

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def request(body: dict[str, Any], *lines: bytes) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"Content-Length: %d\r\n\r\n%b" % (len(data), data)


async def received(replica: LabReplica, data: bytes) -> tuple[bytes, str]:
    """What comes back for `data`, and how the connection ends: closed or reset."""
    loop = asyncio.get_running_loop()
    with socket.create_connection((replica.host, replica.port)) as sock:
        sock.setblocking(False)
        await loop.sock_sendall(sock, data)
        came = b""
        try:
            async with asyncio.timeout(10.0):
                while piece := await loop.sock_recv(sock, 65536):
                    came += piece
        except ConnectionResetError:
            return came, "reset"
        return came, "closed"


@pytest.mark.parametrize("by", ["reset", "close"])
@pytest.mark.parametrize(
    ("cut", "after", "heads", "tokens", "events"),
    [
        ("before_head", 1, 0, 0, 0),
        ("mid_head", 1, 0, 0, 0),
        ("after_head", 1, 1, 0, 0),
        ("after_tokens", 1, 1, 1, 1),
        ("after_tokens", 3, 1, 3, 3),
        ("mid_event", 2, 1, 2, 2),
        ("mid_chunk", 2, 1, 2, 2),
    ],
)
def test_a_stream_is_cut_where_the_knob_says(
    cut: str, after: int, heads: int, tokens: int, events: int, by: str
) -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came, end = await received(replica, request(STREAM))
        assert end == {"reset": "reset", "close": "closed"}[by]
        assert came.count(b"\r\n\r\n") >= heads
        assert (came == b"") == (cut == "before_head")
        assert (b"\r\n\r\n" in came) == bool(heads)
        assert came.count(b"}\n\n") - came.count(b'"role"') == events
        assert came.endswith(b"\r\n") == (cut not in ("before_head", "mid_head", "mid_chunk"))
        assert b"[DONE]" not in came
        seen = replica.seen.last
        assert (seen.outcome, seen.tokens_sent, seen.client_left_after) == ("cut", tokens, None)
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)

    with_replica(talk, cut=cut, cut_after=after, cut_by=by)


def test_a_body_is_cut_after_so_many_bytes() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came, end = await received(replica, request(CHAT))
        head, body = came.split(b"\r\n\r\n")
        assert (len(body), end) == (10, "closed")
        assert int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) > 10

    with_replica(talk, cut="after_bytes", cut_after=10, cut_by="close")


@pytest.mark.parametrize(("hang", "tokens"), [("before_head", 0), ("after_head", 0), ("after_tokens", 2)])
def test_stream_falls_silent(hang: str, tokens: int) -> None:
    """A stream falls silent at the point that the knob names, until its client leaves."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        came = ""

        async def read() -> None:
            nonlocal came
            async with client.stream(
                "POST", "/v1/chat/completions", json=STREAM, timeout=httpx.Timeout(10.0, read=0.5)
            ) as answer:
                async for text in answer.aiter_text():
                    came += text

        with pytest.raises(httpx.ReadTimeout):
            await read()
        assert came.count('"content":" t') == tokens
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        assert replica.seen.last.outcome == "client_left"

    with_replica(talk, hang=hang, hang_after=2)


def test_keep_alive_race() -> None:
    """A reused connection is reset just as its next request arrives."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came, end = await received(replica, request(CHAT) + request(CHAT))
        assert came.count(b"HTTP/1.1 200 OK") == 1
        assert end == "reset"
        assert [seen.outcome for seen in replica.seen.requests] == ["answered", "raced"]
        assert replica.seen.generations_started == 1

    with_replica(talk, race=True)


@pytest.mark.parametrize("retry_after", ["", "7"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_status_in_sglangs_error_body(status: int, retry_after: str) -> None:
    """A status comes with SGLang's error body, with or without Retry-After."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == answer.json()["code"] == status
        assert answer.headers.get("retry-after", "") == retry_after
        assert replica.seen.generations_started == 0

    with_replica(talk, status=status, retry_after=retry_after)


def test_a_black_hole_accepts_and_never_reads() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json=CHAT, timeout=httpx.Timeout(10.0, read=0.2))
        assert replica.seen.connections_accepted == 1
        assert replica.seen.requests == []

    with_replica(talk, black_hole=True)


def test_refusing_keeps_port_and_connections() -> None:
    """A replica that refuses new connections keeps its port and its open connections."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        replica.refuse()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(replica.host, replica.port)
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind((replica.host, replica.port))
        await replica.accept()
        assert b" 200 OK" in await exchange(replica, request(CHAT, b"Connection: close"))

    with_replica(talk)


def test_dropped_connections_are_reset() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await replica.seen.until(lambda seen: seen.generations_started == 1)
        replica.drop_connections()
        with pytest.raises(httpx.ReadError):
            await asking
        await replica.seen.until(lambda seen: seen.connections_open == 0)

    with_replica(talk, first_token_delay=60.0)


def test_huge_body_waits_for_its_reader() -> None:
    """A huge body waits for its reader, and bytes_sent counts what the kernel took."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(replica.host, replica.port)
        writer.write(b"GET /v1/huge HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await replica.seen.until(lambda seen: seen.requests)
        stalled = -1
        while stalled != replica.seen.last.bytes_sent:  # wait until the socket's buffers are full
            stalled = replica.seen.last.bytes_sent
            await asyncio.sleep(0.1)
        assert stalled < 16 << 20
        read = 0
        while piece := await reader.read(1 << 20):
            read += len(piece)
        writer.close()
        assert read == replica.seen.last.bytes_sent
        assert read > 32 << 20

    with_replica(talk, body_mib=32)


FRAMINGS = {
    "auto": (b"HTTP/1.1", b"transfer-encoding: chunked"),
    "chunked": (b"HTTP/1.1", b"transfer-encoding: chunked"),
    "content-length": (b"HTTP/1.1", b"content-length: "),
    "close": (b"HTTP/1.1", b"connection: close"),
    "http/1.0": (b"HTTP/1.0", None),
    "http/1.0+length": (b"HTTP/1.0", b"content-length: "),
}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_stream_is_framed_as_asked(framing: str) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        version, line = FRAMINGS[framing]
        came = await exchange(replica, request(STREAM, b"Connection: close"))
        head = came.partition(b"\r\n\r\n")[0]
        assert head.startswith(version)
        assert line is None or line in head
        assert (b"chunked" in head) == (framing in ("auto", "chunked"))
        assert (b"content-length" in head) == ("length" in framing)
        assert (await client.post("/v1/chat/completions", json=STREAM)).text.endswith("data: [DONE]\n\n")

    with_replica(talk, framing=framing)


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body_have_none(status: int) -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came = await exchange(replica, b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert came.startswith(b"HTTP/1.1 %d " % status)
        assert came.endswith(b"\r\n\r\n")
        assert b"content-length" not in came
        assert b"chunked" not in came

    with_replica(talk, status=status, body="never sent")


def test_head_has_the_length_and_no_body() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came = await exchange(replica, b"HEAD /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"\r\ncontent-length: 5\r\n" in came
        assert came.endswith(b"\r\n\r\n")

    with_replica(talk, body="12345")


def test_extra_headers_stay_apart_and_in_order() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/x")
        assert [pair for pair in answer.headers.multi_items() if pair[0].startswith(("set-", "x-"))] == [
            ("set-cookie", "a=1"),
            ("x-b", "2"),
            ("set-cookie", "c=3"),
        ]

    with_replica(talk, headers=[["Set-Cookie", "a=1"], ["X-B", "2"], ["Set-Cookie", "c=3"]])


def test_answer_before_the_body() -> None:
    """An answer can come before the request's body, which is then read and dropped."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(replica.host, replica.port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        writer.write(b"cdGET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in await reader.read()
        writer.close()
        assert replica.seen.last.body == b"abcd"

    with_replica(talk, early="read", status=429)


def test_an_answer_can_come_before_the_body_and_close_on_it() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came = await exchange(replica, b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert came.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in came
        assert not replica.seen.last.body_whole

    with_replica(talk, early="close", status=413)


def test_interim_responses_come_before_the_head() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        came = await exchange(replica, b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert [line[:12] for line in came.split(b"\r\n\r\n")[:3]] == [
            b"HTTP/1.1 100",
            b"HTTP/1.1 103",
            b"HTTP/1.1 200",
        ]

    with_replica(talk, interim=[100, 103])


def test_a_body_that_waits_to_be_asked_for_is_asked_for() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(replica.host, replica.port)
        head = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        writer.write(head + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ab")
        assert (await reader.read()).endswith(b"\r\n\r\nab")
        writer.close()

    with_replica(talk)


@pytest.mark.parametrize("then", ["close", "keep", "reset", "hang"])
def test_raw_bytes_stand_for_any_response(then: str) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError, match="illegal status line"):
            await client.post("/v1/chat/completions", json=CHAT)
        assert replica.seen.generations_started == 0

    with_replica(talk, raw="HTTP/9.9 what\r\nno colon\r\n\r\n", raw_then=then)


def test_writes_can_be_split_inside_events() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        pieces = []
        async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
            pieces = [piece async for piece in answer.aiter_raw()]
        assert max(map(len, pieces)) <= 7 * len(pieces)
        assert b"".join(pieces).endswith(b"data: [DONE]\r\n\r\n")

    with_replica(talk, split=7, event_end="\r\n\r\n")


def test_every_line_of_a_stream_can_end_in_crlf() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        text = (await client.post("/v1/messages", json=STREAM)).content
        assert text.startswith(b"event: message_start\r\ndata: ")
        assert text.endswith(b"\r\n\r\n")
        assert text.count(b"\n") == text.count(b"\r\n")

    with_replica(talk, event_end="\r\n\r\n")


def test_next_applies_to_serving_paths_only_and_queues_up() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        replica.next(1, status=500)
        replica.next(1, status=429)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        statuses = [(await client.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(3)]
        assert statuses == [500, 429, 200]

    with_replica(talk)


def test_a_client_that_has_left_is_known_before_it_is_read() -> None:
    """A replica that was stopped can tell, once it goes on, that nobody waits for its answer any more."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        with socket.create_connection((replica.host, replica.port)):
            await replica.seen.until(lambda seen: seen.connections_open)
            number = replica.seen.connections_accepted
            assert replica.is_open(number)
            assert not replica.is_open(number + 1)
        assert not replica.is_open(number)

    with_replica(talk)
