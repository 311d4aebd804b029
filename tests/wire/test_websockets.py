"""/v1/realtime: a WebSocket is relayed to a replica, under the same keys and limits, and closed as WebSockets are."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from balancer.relay.frames import BadFrame, FrameReader, close_frame
from tests.lab.replica import LabReplica
from tests.support.client import request
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving
from tests.wire.test_accounts import office

SOUND = base64.b64encode(b"\0" * 640).decode()
OPENING = (
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "WebSocket"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
)


@contextlib.asynccontextmanager
async def session(house: House, path: str = "/v1/realtime", **more: Any) -> AsyncIterator[ClientConnection]:
    """A session, after the replica's first event."""
    async with connect(house.url.replace("http", "ws") + path, proxy=None, **more) as client:
        assert (await said(client))["type"] == "session.created"
        yield client


async def said(client: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), 20))
    return event


async def say(client: ClientConnection, kind: str, **more: Any) -> dict[str, Any]:
    """Sends an event, and returns what comes for it."""
    await client.send(json.dumps({"type": kind, **more}))
    return await said(client)


async def closed(client: ClientConnection) -> ConnectionClosed:
    """How it ended, once what came before is read."""
    while True:
        try:
            await asyncio.wait_for(client.recv(), 30)
        except ConnectionClosed as end:
            return end


@on_uvloop
async def test_a_session_is_relayed_both_ways_and_ends_well() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        async with session(house) as client:
            assert client.response is not None
            assert client.response.headers["X-Replica-Id"] == "a"
            assert (await say(client, "input_audio_buffer.append", audio=SOUND))["error"]["code"] == "invalid_state"
            assert (await say(client, "session.update"))["type"] == "session.updated"
            for _ in range(3):
                assert "delta" in await say(client, "input_audio_buffer.append", audio=SOUND)
            assert (await say(client, "input_audio_buffer.commit"))["type"] == "input_audio_buffer.committed"
            assert (await said(client))["usage"] == {"type": "duration", "seconds": 0.06}
            await (await client.ping())
            assert house.member("a").generating == 1
        (line,) = await house.logged()
        assert (line["status"], line["path"], line["member"]) == (101, "/v1/realtime", "a")
        assert line["bytes_in"] > 3 * len(SOUND)
        await lab.seen.until(lambda seen: seen.last.outcome == "answered")
        await house.at_rest()


@on_uvloop
async def test_the_slow_are_waited_for_and_nothing_is_lost() -> None:
    """A client that reads nothing holds its replica back, and is then held back itself; memory stays as it is."""
    async with LabReplica() as lab, serving(lab) as house:
        client = await house.client(receive_buffer=65536)
        await client.send(request("GET", "/v1/realtime", headers=OPENING))
        await client.until(b"session.created")
        count, text = 12_000, b'{"type": "%b"}' % (b"x" * 2000)
        frames = (b"\x81\xfe" + len(text).to_bytes(2, "big") + b"\0\0\0\0" + text) * count
        sending = asyncio.ensure_future(client.send(frames))
        (carried,) = house.balancer.doors.connections
        transport = carried._transport  # type: ignore[attr-defined]
        await until(lambda: not transport.is_reading(), "it is held back", 20)
        assert transport.get_write_buffer_size() < 300_000
        assert not sending.done()
        for _ in range(count):
            await client.until(b'"code": "unknown_event"')
        await sending


@on_uvloop
async def test_frames_that_came_too_early_are_not_lost() -> None:
    async with LabReplica(head_delay=0.0) as lab, serving(lab) as house:
        client = await house.client()
        text = b'{"type": "session.update"}'
        frame = bytes((0x81, 0x80 | len(text))) + b"\0\0\0\0" + text
        await client.send(request("GET", "/v1/realtime", headers=OPENING) + frame[:9])
        await client.until(b"\r\n\r\n")
        await client.send(frame[9:])
        assert b"session.created" in await client.until(b"}}")
        assert b"session.updated" in await client.until(b"}}")
        await client.send(close_frame(1000, "", is_masked=True))
        assert (await client.rest()).endswith(close_frame(1000, ""))


@on_uvloop
async def test_a_key_is_wanted_and_its_limits_hold(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        key = await at.add(max_in_flight=1, requests_per_minute=3, models=["lab"])
        bearer = {"Authorization": f"Bearer {key}"}
        with pytest.raises(InvalidStatus) as refused:
            async with session(at.house):
                pass
        assert refused.value.response.status_code == 401
        async with session(at.house, additional_headers=bearer):
            with pytest.raises(InvalidStatus) as refused:
                async with session(at.house, additional_headers=bearer):
                    pass
            assert refused.value.response.status_code == 429
        await at.house.at_rest()
        with pytest.raises(InvalidStatus) as refused:
            async with session(at.house, "/v1/realtime?model=other", additional_headers=bearer):
                pass
        assert refused.value.response.status_code == 403
        page: list[Any] = ["realtime", f"openai-insecure-api-key.{key}"]
        async with connect(
            at.house.url.replace("http", "ws") + "/v1/realtime", subprotocols=page, proxy=None
        ) as client:
            assert (await said(client))["type"] == "session.created"
            assert lab.seen.last.header("sec-websocket-protocol") == "realtime"
            assert lab.seen.last.header("authorization") is None
        (used,) = await at.usage()
        assert (used["requests"], used["failed"]) == (3, 1), "the model that it may not use counts as failed"


@on_uvloop
async def test_a_page_of_another_site_opens_none() -> None:
    """A page needs no preflight for a WebSocket, reads its answers, and may put a key of its own into it."""
    async with LabReplica() as lab, serving(lab) as house:
        key: list[Any] = ["openai-insecure-api-key.x", "realtime"]
        for more in ({}, {"subprotocols": key}):
            with pytest.raises(InvalidStatus) as refused:
                async with session(house, origin="https://evil.example", **more):
                    pass
            assert refused.value.response.status_code == 403
        assert lab.seen.requests == []


@on_uvloop
async def test_an_answer_that_is_no_switch_is_passed_on() -> None:
    async with LabReplica(status=404) as lab, serving(lab) as house:
        with pytest.raises(InvalidStatus) as refused:
            async with session(house):
                pass
        assert refused.value.response.status_code == 404
        assert b"what the test asked for" in (refused.value.response.body or b"")


@on_uvloop
async def test_a_replica_that_refuses_leaves_it_to_the_other() -> None:
    async with LabReplica() as one, LabReplica() as other, serving(one, other) as house:
        one.refuse()
        for _ in range(2):
            async with session(house):
                pass
        assert one.seen.requests == []
        assert len(other.seen.requests) == 2


@on_uvloop
async def test_a_switch_that_nobody_asked_for_is_no_answer() -> None:
    raw = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    async with LabReplica(raw=raw, raw_then="hang") as lab, serving(lab) as house:
        answer = await house.ask(request("GET", "/v1/models/x", headers=OPENING), "GET")
        assert answer.status == 502
        assert lab.seen.last.header("upgrade") is None


@on_uvloop
async def test_a_replica_that_dies_is_told_with_a_close() -> None:
    async with LabReplica(cut="after_tokens", cut_after=2) as lab, serving(lab) as house:
        async with session(house) as client:
            await client.send('{"type": "session.update"}')
            end = await closed(client)
            assert end.rcvd is not None
            assert (end.rcvd.code, end.rcvd.reason) == (1011, "the replica went away")
        (line,) = await house.logged()
        assert line["status"] == 101
        assert line["error"]


@on_uvloop
async def test_a_client_that_leaves_ends_it_at_the_replica() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        async with session(house) as client:
            client.transport.abort()
        await lab.seen.until(lambda seen: seen.last.outcome == "client_left")
        await house.at_rest()
        assert (await house.logged())[0]["status"] == 499


@on_uvloop
async def test_sound_is_no_text_to_pay_for(tmp_path: Path) -> None:
    async with LabReplica() as lab, office(tmp_path, lab) as at:
        bearer = {"Authorization": f"Bearer {await at.add(tokens_per_day=100_000)}"}
        async with session(at.house, additional_headers=bearer) as client:
            await say(client, "session.update")
            await say(client, "input_audio_buffer.append", audio=SOUND)
            client.transport.abort()
        await at.house.at_rest()
        (used,) = await at.usage()
        assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (1, 0, 0)


@on_uvloop
async def test_silence_in_both_directions_has_an_end() -> None:
    async with LabReplica() as lab, serving(lab, websocket_idle_timeout=1.5) as house:
        async with session(house, ping_interval=None) as client:
            end = await closed(client)
            assert end.rcvd is not None
            assert end.rcvd.code == 1001
        await lab.seen.until(lambda seen: seen.last.outcome == "answered")


@on_uvloop
async def test_a_drained_replica_closes_it_when_it_is_quiet() -> None:
    async with LabReplica() as lab, LabReplica() as other, serving(lab, other) as house:
        fleet = house.balancer.service.fleet
        async with session(house) as client:
            name = client.response.headers["X-Replica-Id"] if client.response else ""
            fleet.drain(house.member(name))
            await say(client, "session.update")
            end = await closed(client)
            assert end.rcvd is not None
            assert end.rcvd.code == 1012
        await until(lambda: house.member(name).in_flight == 0, "drained")
        async with session(house) as client:
            assert client.response is not None
            assert client.response.headers["X-Replica-Id"] != name


@on_uvloop
async def test_a_balancer_that_stops_says_so() -> None:
    async with LabReplica() as lab, serving(lab) as house, session(house) as client:
        hurry = asyncio.Event()
        hurry.set()
        await house.balancer.leave(hurry)
        end = await closed(client)
        assert end.rcvd is not None
        assert end.rcvd.code == 1001


BAD = {
    "without a mask": b"\x81\x02{}",
    "a ping in pieces": b"\x09\x80\0\0\0\0",
    "a ping too long": b"\x89\xfe\0\x80\0\0\0\0",
    "a length that cannot be": b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",
    "after the close": close_frame(1000, "", is_masked=True) + b"\x81\x82\0\0\0\0{}",
}


@pytest.mark.parametrize("data", **each(BAD))
@on_uvloop
async def test_hostile_frames_reach_no_replica(data: bytes) -> None:
    async with LabReplica() as lab, serving(lab) as house:
        client = await house.client()
        await client.send(request("GET", "/v1/realtime", headers=OPENING))
        await client.until(b"session.created")
        await client.send(data)
        rest = await client.rest()
        assert b"\x03\xea" in rest or b"\x03\xe8" in rest, rest  # 1002, or 1000
        await house.at_rest()
        assert lab.seen.crashes == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_frames_are_followed_however_they_are_cut(size: int) -> None:
    frames = (
        b"\x81\x85\1\2\3\4hello"
        + b"\x02\xfe\x01\x00\0\0\0\0"
        + bytes(256)
        + b"\x80\xff"
        + (70000).to_bytes(8)
        + bytes(70004)
    )
    reader = FrameReader(is_masked=True)
    betweens = 0
    for at in range(0, len(frames), size):
        reader.pass_by(frames[at : at + size])
        betweens += reader.is_between
    assert reader.is_between
    assert betweens >= (3 if size == 1 else 1)
    assert not reader.is_closed
    reader.pass_by(close_frame(1000, "bye", is_masked=True))
    assert reader.is_closed
    with pytest.raises(BadFrame):
        reader.pass_by(frames)
