"""Streams that break and continue at another replica; requests during which replicas die."""

import asyncio
import errno
import signal
from typing import Any

import orjson
import pytest

from balancer.contract.listing import ReplicaListing
from balancer.relay.continuation import going_on
from balancer.relay.continuation.delivered import CONTINUED
from balancer.relay.deaths import digest_of
from balancer.relay.request import Request
from tests.lab.replica import LabReplica
from tests.lab.spawn import spawn_replica
from tests.relay.continuation.answering import plain, request_for
from tests.support.client import Answer, request
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving

PATHS = sorted(CONTINUED)
TOKENS = 6


def asked(path: str, **more: Any) -> bytes:
    return request(path=path, body=orjson.dumps(request_for(path, TOKENS) | more))


async def undisturbed(house: House, path: str) -> list[Any]:
    """What the client gets if nothing breaks."""
    answer = await house.ask(asked(path))
    assert answer.is_whole
    return plain(answer.body)


def prefer(house: House, *names: str) -> None:
    """Makes these members come next, in this order: turns go by when each member was last chosen."""
    for turn, name in enumerate(names):
        house.member(name).turn = turn - 1000


FAULTS: dict[str, dict[str, Any]] = {
    "reset": {"cut": "after_tokens", "cut_after": 3},
    "closed": {"cut": "after_tokens", "cut_after": 3, "cut_by": "close"},
    "amid an event": {"cut": "mid_event", "cut_after": 3},
    "amid a chunk": {"cut": "mid_chunk", "cut_after": 3},
    "in small pieces": {"cut": "after_tokens", "cut_after": 3, "split": 7},
    "before the first event": {"cut": "after_head"},
    "before the head": {"cut": "before_head"},
    "after the last token": {"cut": "after_tokens", "cut_after": TOKENS},
    "stalled before the first event": {"hang": "after_head", "service_status": "hang"},
    "stalled": {"hang": "after_tokens", "hang_after": 3, "service_status": "hang"},
}


@pytest.mark.parametrize("fault", **each(FAULTS))
@pytest.mark.parametrize("path", PATHS)
@on_uvloop
async def test_streams_continue(path: str, fault: dict[str, Any]) -> None:
    """In each format, wherever and however its replica breaks, the client gets the same answer as without a fault."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, idle_timeout=0.4) as house:
        whole = await undisturbed(house, path)
        prefer(house, "a", "b")
        a.set(**fault)
        answer = await house.ask(asked(path))
        assert (answer.status, answer.is_whole) == (200, True)
        assert plain(answer.body) == whole
        assert b": waiting" not in answer.body
        await house.at_rest()
        line = house.log()[-1]
        assert "error" not in line
        assert house.balancer.doors.buffered == 0
        if path == "/generate" and fault == FAULTS["after the last token"]:  # only [DONE] is missing
            assert (line["attempts"], line["member"], line["status"]) == (1, "a", 200)
            return
        assert (line["attempts"], line["member"], line["status"]) == (2, "b", 200)
        if fault != FAULTS["before the head"]:
            assert answer.header("x-replica-id") == "a"
            assert answer.body.count(b": continued on b\n\n") == 1
            await until(lambda: house.balancer.tallies.continued == 1)


@pytest.mark.parametrize("path", PATHS)
@on_uvloop
async def test_streams_that_do_not_begin(path: str) -> None:
    """A stream of which nothing but the head came within first_byte_timeout continues elsewhere."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, idle_timeout=1.5) as house:
        whole = await undisturbed(house, path)
        house.balancer.config.settings.first_byte_timeout = 2.5
        prefer(house, "a", "b")
        a.set(hang="after_head")
        answer = await house.ask(asked(path))
        assert (answer.is_whole, plain(answer.body)) == (True, whole)
        await house.at_rest()
        line = house.log()[-1]
        assert (line["attempts"], line["retries"], line["member"]) == (2, "silent", "b")
        assert any(r.target == "/server_info" for r in a.seen.probes), "it was asked meanwhile"


@on_uvloop
async def test_explained() -> None:
    """X-Route-Explain also explains the choice of the second replica."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        prefer(house, "a", "b")
        a.set(cut="after_tokens")
        path = "/v1/completions"
        data = request(path=path, body=orjson.dumps(request_for(path, 3)), headers=(("X-Route-Explain", "1"),))
        assert b": continued on b (in turn; attempts=2; queued=0.000)\n\n" in (await house.ask(data)).body


async def flowing(house: House, count: int) -> None:
    """Waits until that many answers have begun."""
    await until(lambda: sum(connection.has_begun for connection in house.balancer.destination.pool.busy) == count)


def told_broken(answer: Answer) -> None:
    assert not answer.is_whole
    assert b"[DONE]" not in answer.body
    assert b'"stream_broken"' in answer.body


@on_uvloop
async def test_two_deaths_end_a_stream() -> None:
    """A stream that breaks at the second replica as well ends with an error event, and no third one is asked."""
    cut = {"cut": "after_tokens", "cut_after": 2}
    async with LabReplica(**cut) as a, LabReplica(**cut) as b, LabReplica() as c, serving(a, b, c) as house:
        prefer(house, "a", "b", "c")
        answer = await house.ask(asked("/v1/chat/completions"))
        told_broken(answer)
        assert b"two replicas went away" in answer.body
        assert b"t03" in answer.body, "what came of both is delivered"
        assert len(c.seen.requests) == 0
        await house.at_rest()
        assert house.log()[-1]["not_continued"] == "two deaths"


@on_uvloop
async def test_nobody_else() -> None:
    """A stream that no other replica can continue ends with an error event, at once or after a wait in the queue."""
    cut = {"cut": "after_tokens", "cut_after": 2}
    async with LabReplica(**cut) as a, serving(a, queue_timeout=0.5) as house:
        told_broken(await house.ask(asked("/v1/completions")))
        await house.at_rest()
        assert house.log()[-1]["not_continued"] == "no replica"
        async with LabReplica(status=503, retry_after="1") as b:
            house.balancer.service.fleet.reconcile([house.member("a").listing, ReplicaListing("b", b.url)])
            await house.ready(2)
            prefer(house, "a", "b")
            told_broken(await house.ask(asked("/v1/completions")))
            assert len(b.seen.requests) == 1
            await house.at_rest()
            assert house.log()[-1]["not_continued"] == "no replica"
            house.balancer.service.fleet.reconcile([house.member("a").listing])


@on_uvloop
async def test_resending_counts() -> None:
    """A request that was sent again because its first replica died does not continue when the second one breaks."""
    async with LabReplica(cut="before_head") as a, LabReplica() as b, LabReplica() as c, serving(a, b, c) as house:
        prefer(house, "a", "b", "c")
        b.set(cut="after_tokens", cut_after=2)
        told_broken(await house.ask(asked("/v1/chat/completions")))
        assert len(c.seen.requests) == 0


@on_uvloop
async def test_next_one_asked() -> None:
    """If a replica refuses the connection, or is full, the next one continues the stream."""
    async with LabReplica() as a, LabReplica() as b, LabReplica() as c, LabReplica() as d, serving(a, b, c, d) as house:
        whole = await undisturbed(house, "/generate")
        prefer(house, "a", "b", "c", "d")
        a.set(cut="after_tokens", cut_after=3)
        b.refuse()
        c.set(status=503, retry_after="1")
        answer = await house.ask(asked("/generate"))
        assert answer.is_whole
        assert plain(answer.body) == whole
        assert answer.body.count(b": continued on ") == answer.body.count(b": continued on d\n\n") == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "what it asks for": ({"logprobs": True}, "logprobs"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
}


@pytest.mark.parametrize("case", **each(REFUSED))
@on_uvloop
async def test_not_continued(case: tuple[dict[str, Any], str]) -> None:
    """A stream that depends on more than its text ends with an error event, and log and metrics say why."""
    more, reason = case
    async with LabReplica(cut="after_tokens", cut_after=2) as a, LabReplica() as b, serving(a, b) as house:
        told_broken(await house.ask(asked("/v1/chat/completions", **more)))
        assert len(b.seen.requests) == 0
        await house.at_rest()
        assert house.log()[-1]["not_continued"] == reason
        await until(lambda: house.balancer.tallies.not_continued == {reason: 1})


THINKS = {"thinks": 3, "reasoning_parser": "qwen3"}


@pytest.mark.parametrize("opens", [False, True], ids=["the model opens", "the template opens"])
@pytest.mark.parametrize("cut", range(1, 9))
@on_uvloop
async def test_reasoning(opens: bool, cut: int) -> None:
    """An answer continues once its reasoning is closed; while it is not, the client is told."""
    thinks = THINKS | {"opens_thinking": opens}
    async with LabReplica(**thinks) as a, LabReplica(**thinks) as b, serving(a, b) as house:
        path = "/v1/chat/completions"
        data = request(path=path, body=orjson.dumps(request_for(path, 9)))
        whole = plain((await house.ask(data)).body)
        reasoning = [said["choices"][0]["delta"].get("reasoning_content") for _, said in whole[:-2]]
        assert len(list(filter(None, reasoning))) == 3
        prefer(house, "a", "b")
        a.next(1, cut="after_tokens", cut_after=cut, **thinks)
        answer = await house.ask(data)
        await house.at_rest()
        if (
            (not opens) < cut <= (not opens) + 3 + 1
        ):  # reasoning, up to the closing tag; before it, the request is sent again
            told_broken(answer)
            assert house.log()[-1]["not_continued"] == "reasoning"
        else:
            assert answer.is_whole
            assert spoken(plain(answer.body)) == spoken(whole)
            assert plain(answer.body)[-2:] == whole[-2:], "usage counts the reasoning, its tags too"


def spoken(events: list[Any]) -> list[tuple[str, str]]:
    """What the events say, in order: reasoning and text. (SGLang sends an event without either for a tag.)"""
    deltas = [said["choices"][0]["delta"] for _, said in events if said != "[DONE]" and said["choices"]]
    pairs = [(delta["reasoning_content"] or "", delta.get("content") or "") for delta in deltas]
    return [pair for pair in pairs if any(pair)]


@pytest.mark.parametrize("parser", ["gpt-oss", ""])
@on_uvloop
async def test_reasoning_that_cannot_be_restored(parser: str) -> None:
    """Reasoning whose parser rewrites the text ends a stream that breaks; without a parser it is plain text."""
    path = "/v1/chat/completions"
    async with LabReplica(thinks=2) as a, LabReplica(thinks=2) as b, serving(a, b) as house:
        for replica in (a, b):
            replica.set(reasoning_parser=parser)
            house.member("a" if replica is a else "b").reasoning_parser = parser
        data = request(path=path, body=orjson.dumps(request_for(path, 9)))
        whole = await house.ask(data)
        prefer(house, "a", "b")
        a.next(1, cut="after_tokens", cut_after=6)
        answer = await house.ask(data)
        if parser:
            told_broken(answer)
            await house.at_rest()
            assert house.log()[-1]["not_continued"] == "reasoning"
        else:
            assert answer.is_whole
            assert spoken(plain(answer.body)) == spoken(plain(whole.body))


def trials(replica: LabReplica) -> int:
    return sum(seen.target == "/tokenize" for seen in replica.seen.probes)


@pytest.mark.parametrize("template", ["ends", "404"])
@on_uvloop
async def test_template_that_does_not_continue(template: str) -> None:
    """A replica whose chat template closes a begun answer continues no chat, but does continue a text."""
    async with LabReplica() as a, LabReplica(template=template) as b, serving(a, b, ready_interval=0.05) as house:
        await until(lambda: house.member("b").continues is False and house.member("a").continues)
        for path in ("/v1/chat/completions", "/v1/messages"):
            prefer(house, "a", "b")
            a.next(1, cut="after_tokens", cut_after=2)
            assert not (await house.ask(asked(path))).is_whole
            await house.at_rest()
            assert house.log()[-1]["not_continued"] == "template"
        prefer(house, "a", "b")
        a.next(1, cut="after_tokens", cut_after=2)
        assert (await house.ask(asked("/v1/completions"))).is_whole
        await until(lambda: house.balancer.tallies.not_continued == {"template": 2})
        assert trials(b) <= 3, "tried once"


@on_uvloop
async def test_template_is_tried_beside_readiness() -> None:
    """A replica whose /tokenize hangs is ready all the same; a chat waits for it only for a while."""
    async with LabReplica(template="hang") as a, serving(a, ready_interval=0.05) as house:
        assert (await house.ask(asked("/v1/chat/completions"))).is_whole
        assert house.member("a").continues is None


@on_uvloop
async def test_template_is_tried_once() -> None:
    """A replica is tried once after each start, however often it is probed."""
    async with LabReplica() as a, serving(a, ready_interval=0.02) as house:
        await until(lambda: house.member("a").continues)
        probes = len(a.seen.probes)
        await until(lambda: len(a.seen.probes) > probes + 20)
        assert trials(a) == 3
        before = house.member("a")
        a.random_seed += 1
        a.drop_connections()  # as in a restart
        await until(lambda: house.member("a") is not before and house.member("a").continues)
        assert trials(a) == 6


# At the end of the stream: what it says of its end, how often, and of its tokens.
STOPPED: dict[str, tuple[dict[str, Any], bytes, bytes]] = {
    "/v1/chat/completions": ({"stop": "2 t0"}, b'"finish_reason":"stop"', b'"completion_tokens":4,'),
    "/v1/completions": ({"stop": ["2 t0"]}, b'"finish_reason":"stop"', b'"completion_tokens":4,'),
    "/generate": (
        {"sampling_params": {"max_new_tokens": 100_000, "stop": "2 t0"}},
        b'"type":"stop","matched":"2 t0"',
        b'"completion_tokens":4,',
    ),
    "/v1/messages": ({"stop_sequences": ["2 t0"]}, b'"stop_reason":"end_turn"', b'"output_tokens":4}'),
}


@pytest.mark.parametrize("path", PATHS)
@on_uvloop
async def test_a_stop_string_across_the_seam_ends_it(path: str) -> None:
    """The replica that goes on stops generating there, and the client waits for no more, and is told what was used."""
    wish, end, used = STOPPED[path]
    async with LabReplica() as a, LabReplica(token_interval=0.01) as b, serving(a, b) as house:
        prefer(house, "a", "b")
        a.set(cut="after_tokens", cut_after=3)
        data = request(path=path, body=orjson.dumps(request_for(path, 100_000) | wish))
        client = await house.client()
        await client.send(data + request("GET", "/v1/models"))
        answer = await client.answer()
        assert (answer.is_whole, b"t02" in answer.body, b"t03" in answer.body) == (True, True, False)
        assert answer.body.endswith((b"data: [DONE]\n\n", b'{"type":"message_stop"}\n\n'))
        assert (answer.body.count(end), answer.body.count(used)) == (1, 1)
        assert (await client.answer()).status == 200, "its connection carries on"
        await b.seen.until(lambda seen: seen.generations_aborted == 1)
        line = next(line for line in await house.logged(2) if line["path"] == path)
        assert (line["status"], line["member"], line["completion_tokens"]) == (200, "b", 4)
        assert "error" not in line


@pytest.mark.parametrize("asks", [False, True], ids=["the client does not", "the client asks for usage"])
@on_uvloop
async def test_usage_at_a_stop_string_only_if_asked(asks: bool) -> None:
    """Counts that nobody asked for are not told, neither in each event nor at the end."""
    path = "/v1/chat/completions"
    wish = request_for(path, 12) | {"stop": "2 t0"}
    if not asks:
        del wish["stream_options"]
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        for found, stop in enumerate(("7 t0", "2 t0")):
            prefer(house, "a", "b")
            a.next(1, cut="after_tokens", cut_after=3)
            answer = await house.ask(request(path=path, body=orjson.dumps(wish | {"stop": stop})))
            assert answer.is_whole
            told = [said for _, said in plain(answer.body) if said != "[DONE]"]
            assert [bool(said["choices"]) for said in told if said.get("usage")] == [False] * asks
            assert (told[-1] if not asks else told[-2])["choices"][0]["finish_reason"] == ("length", "stop")[found]


@on_uvloop
async def test_a_body_that_made_room_meanwhile() -> None:
    """A stream that broke behind its head, and waits, is not sent again without the body that made room for others."""
    async with LabReplica() as a, LabReplica(token_interval=0.02) as b, serving(a, b, max_in_flight=1) as house:
        prefer(house, "b", "a")
        holder = await house.client()
        await holder.send(request(body=orjson.dumps(request_for("/v1/completions", 100_000))))
        await until(lambda: b.generating == 1)
        a.set(cut="after_head", ready=503)
        client = await house.client()
        await client.send(asked("/v1/completions"))
        await client.head()
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        assert [connection.give_way() for connection in house.balancer.doors.connections].count(True) == 2
        holder.leave()
        assert b'"stream_broken"' in await client.rest()
        await house.at_rest()
        assert (house.log()[-1]["not_continued"], len(b.seen.requests)) == ("body", 1)


@on_uvloop
async def test_no_copy_of_a_body_outlives_its_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is sent again holds no memory that is not counted."""
    copies: list[Request] = []
    copied = going_on._copied
    monkeypatch.setattr(going_on, "_copied", lambda request: copies.append(copied(request)) or copies[-1])
    async with LabReplica() as a, LabReplica(token_interval=0.02) as b, serving(a, b) as house:
        prefer(house, "a", "b")
        a.set(cut="after_head")
        client = await house.client()
        await client.send(asked("/v1/completions"))
        await client.until(b"t00")
        assert [copy.body for copy in copies] == [[]]
        await client.until(b"data: [DONE]\n\n")


@on_uvloop
async def test_status_refused() -> None:
    """If the second replica answers with an error, the stream ends broken, with an error event."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b) as house:
        prefer(house, "a", "b")
        a.set(cut="after_tokens", cut_after=2)
        b.next(1, status=400)
        answer = await house.ask(asked("/v1/completions"))
        told_broken(answer)
        assert b"status 400" in answer.body


@on_uvloop
async def test_turned_off() -> None:
    """If the service has turned continuation off, a stream that breaks ends with an error event."""
    async with (
        LabReplica(cut="after_tokens", cut_after=2) as a,
        LabReplica() as b,
        serving(a, b, continue_broken=False) as house,
    ):
        prefer(house, "a", "b")
        told_broken(await house.ask(asked("/v1/completions")))
        assert len(b.seen.requests) == 0
        await house.at_rest()
        assert "not_continued" not in house.log()[-1], "nobody tried"


@on_uvloop
async def test_too_long() -> None:
    """For a stream beyond max_continued_bytes, neither its text nor the request's body is kept."""
    async with (
        LabReplica(cut="after_tokens", cut_after=5, token_interval=0.05) as a,
        LabReplica() as b,
        serving(a, b, max_continued_bytes=700) as house,
    ):
        prefer(house, "a", "b")
        client = await house.client()
        await client.send(asked("/v1/completions"))
        await client.until(b"t00")
        assert house.balancer.doors.buffered > 0, "what is kept is counted"
        await client.until(b"t03")
        assert house.balancer.doors.buffered == 0
        assert b'"stream_broken"' in await client.rest()
        await house.at_rest()
        assert house.log()[-1]["not_continued"] == "too long"


@on_uvloop
async def test_killed_process() -> None:
    """kill -9 of one of two replicas during forty streams in all formats: each client gets its whole answer."""
    async with spawn_replica(token_interval=0.4) as a, spawn_replica(token_interval=0.4) as b:
        listed = (ReplicaListing("a", a.url), ReplicaListing("b", b.url))
        async with serving(ready=2, config={"replicas": listed}) as house:
            answers = await asyncio.gather(*(undisturbed(house, path) for path in PATHS))
            whole = dict(zip(PATHS, answers, strict=True))
            asking = [asyncio.ensure_future(house.ask(asked(path))) for path in PATHS * 10]
            await flowing(house, 40)
            a.send_signal(signal.SIGKILL)
            for path, answer in zip(PATHS * 10, await asyncio.gather(*asking), strict=True):
                assert answer.is_whole
                assert plain(answer.body) == whole[path]
            await house.at_rest()
            assert house.balancer.doors.buffered == 0
            await until(lambda: house.balancer.tallies.continued == 20)
            assert not house.balancer.tallies.errors


# Requests that kill replicas


def poison(text: str = "poison") -> bytes:
    return request(path="/generate", body=orjson.dumps({"text": text, "stream": True}))


@on_uvloop
async def test_poison() -> None:
    """A request that kills each replica that gets it kills two of three, and is refused from then on."""
    deadly = {"poison": "poison"}
    async with (
        LabReplica(**deadly) as a,
        LabReplica(**deadly) as b,
        LabReplica(**deadly) as c,
        serving(a, b, c, ready_interval=0.2) as house,
    ):
        answer = await house.ask(poison())
        assert (answer.status, answer.error["code"]) == (502, "replica_lost")
        for _ in range(3):
            answer = await house.ask(poison())
            assert (answer.status, answer.error["code"]) == (422, "kills_replicas")
        assert (await house.ask(poison("harmless"))).is_whole
        assert sum(bool(replica.seen.requests) for replica in (a, b, c)) >= 2
        assert [m.name for m in house.balancer.service.fleet.available()] != []
        assert sum(replica.is_listening for replica in (a, b, c)) == 1


@on_uvloop
async def test_a_host_that_vanishes_was_killed_by_no_request() -> None:
    """Its replicas have the same requests in flight, such as those of a benchmark, and none is refused for that."""
    slow = {"token_interval": 0.05}
    async with LabReplica(**slow) as a, LabReplica(**slow) as b, LabReplica(**slow) as c, serving(a, b, c) as house:
        prefer(house, "a", "b")
        asking = [asyncio.ensure_future(house.ask(poison("the same"))) for _ in range(2)]
        await flowing(house, 2)
        for connection in list(house.balancer.destination.pool.busy):
            connection.connection_lost(TimeoutError(errno.ETIMEDOUT, "as the kernel says it"))
        a.fall()
        b.fall()
        await until(lambda: len(c.seen.requests) >= 2)  # there they go on
        asking.append(asyncio.ensure_future(house.ask(poison("the same"))))
        for answer in await asyncio.gather(*asking):
            assert (answer.status, answer.is_whole) == (200, True)


@on_uvloop
async def test_a_replica_that_does_not_say_so_is_not_alive() -> None:
    """What killed two replicas whose probes are not answered any more is refused before these have timed out."""
    quick = {"ready_interval": 0.05, "ready_timeout": 0.6}
    async with LabReplica() as a, LabReplica() as b, LabReplica() as c, serving(a, b, c, **quick) as house:
        for name, replica in (("a", a), ("b", b)):
            house.member(name).turn = -1
            replica.set(ready="hang")
            replica.next(1, cut="before_head")
        assert (await house.ask(poison())).status == 502
        deaths, since = house.balancer.destination.deaths, now()
        while now() < since + 1:
            assert deaths.kills(digest_of_poison(), now())
            await asyncio.sleep(0.02)
        assert not c.seen.requests


@on_uvloop
async def test_poison_cleared() -> None:
    """A request that broke off at two replicas that are still alive is not taken for one that kills them."""
    quick = {"ready_interval": 0.05, "ready_timeout": 0.4}
    async with LabReplica() as a, LabReplica() as b, serving(a, b, **quick) as house:
        for replica in (a, b):
            replica.next(1, cut="before_head")
        assert (await house.ask(poison())).status == 502
        await until(lambda: not house.balancer.destination.deaths.kills(digest_of_poison(), now()))
        assert (await house.ask(poison())).is_whole


@on_uvloop
async def test_acquitted() -> None:
    """A request that was in flight when two replicas died, but finished each time, is not refused."""
    slow = {"token_interval": 0.02}
    async with (
        LabReplica(**slow) as a,
        LabReplica(**slow) as b,
        LabReplica() as c,
        serving(a, b, c, ready_interval=0.2) as house,
    ):
        for name, replica in (("a", a), ("b", b)):
            prefer(house, name, "c")
            asking = asyncio.ensure_future(house.ask(asked("/generate")))
            await flowing(house, 1)
            replica.fall()
            assert (await asking).is_whole
        assert [line["attempts"] for line in await house.logged(2)] == [2, 2]
        assert (await house.ask(asked("/generate"))).status == 200


@on_uvloop
async def test_innocents() -> None:
    """Streams that lose two replicas, one after the other, are broken, and none of them is refused after that."""
    slow = {"token_interval": 0.02}
    async with (
        LabReplica(**slow) as a,
        LabReplica(**slow) as b,
        LabReplica() as c,
        serving(a, b, c, ready_interval=0.2, start_wait=0) as house,
    ):
        bodies = [asked("/generate", text=f"number {number}") for number in range(8)]
        house.balancer.service.fleet.drain(house.member("c"))
        asking = [asyncio.ensure_future(house.ask(body)) for body in bodies]
        await flowing(house, len(bodies))
        a.fall()
        await until(lambda: house.member("b").in_flight == len(bodies))
        await flowing(house, len(bodies))
        b.fall()
        for answer in await asyncio.gather(*asking):
            told_broken(answer)
        house.balancer.service.fleet.undrain(house.member("c"))
        for body in bodies:
            assert (await house.ask(body)).is_whole


def now() -> float:
    return asyncio.get_running_loop().time()


def digest_of_poison() -> bytes:
    return digest_of("/generate", [poison().partition(b"\r\n\r\n")[2]])
