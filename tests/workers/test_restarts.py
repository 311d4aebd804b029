"""One of the processes dies: what the others know is not lost, and what a new one lacks costs no request."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import orjson
import pytest

from balancer.accounts.store import FILE
from balancer.relay.deaths import FEW
from tests.lab.replica import LabReplica
from tests.relay.continuation.answering import request_for
from tests.support.client import CHAT, chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop
from tests.workers.running import Workers, listed, relay_of, workers

LONG = request(body=chat(stream=True, tokens=200))


@on_uvloop
async def test_requests_wait_for_a_new_coordinators_list() -> None:
    """Those that waited in the queue and those that come meanwhile: none is refused while nobody has told it."""
    async with LabReplica(token_interval=0.01) as a, listed(a.url, max_in_flight=1) as at:
        first, second = await at.one_each()
        await first.send(LONG)
        await first.until(b"t00")
        await second.send(request(body=chat()))
        await at.shows(queue_depth=1)
        await at.kill(at.coordinator)
        third = await at.balancer.client()
        await third.send(request(body=chat()))
        await asyncio.sleep(0.7)  # the controller looks once a second
        await at.put(a.url)
        await first.until(b"data: [DONE]\n\n")
        assert [(await client.answer()).status for client in (second, third)] == [200, 200]


@on_uvloop
async def test_who_leaves_before_the_list_comes_takes_no_place() -> None:
    async with LabReplica(token_interval=0.01) as a, listed(a.url, max_in_flight=1) as at:
        await at.kill(at.coordinator)
        client = await at.balancer.client()
        await client.send(LONG)
        await asyncio.sleep(0.3)
        client.leave()
        await asyncio.sleep(0.3)
        await at.put(a.url)
        await at.shows(in_flight=0, queue_depth=0, ready=1)
        assert (await at.ask()).status == 200
        assert len(a.seen.requests) == 1


@on_uvloop
async def test_a_service_without_replicas_is_soon_refused() -> None:
    """A new coordinator that was told of none does not let requests wait for them."""
    async with LabReplica() as a, listed(a.url) as at:
        await at.kill(at.coordinator)
        await at.put()
        asked_at = time.monotonic()
        answer = await at.ask()
        assert (answer.status, answer.error["code"]) == (503, "no_replica_ready")
        assert time.monotonic() - asked_at < 2


@on_uvloop
async def test_requests_wait_in_vain_for_a_few_seconds_only() -> None:
    """Nobody tells the new coordinator of any replica."""
    async with LabReplica() as a, listed(a.url) as at:
        await at.kill(at.coordinator)
        asked_at = time.monotonic()
        assert (await at.ask()).status == 503
        assert 2 < time.monotonic() - asked_at < 8


@on_uvloop
async def test_a_stream_goes_on_elsewhere_before_the_list_comes() -> None:
    """Whether a broken stream may go on is not decided by a coordinator that knows of no replica yet."""
    async with LabReplica(token_interval=0.05) as a, LabReplica() as b, listed(a.url) as at:
        a.set(cut="after_tokens", cut_after=12)
        client = await at.balancer.client()
        await client.send(request(body=orjson.dumps(request_for(CHAT, 20))))
        await client.until(b"t00")
        await at.kill(at.coordinator)
        await asyncio.sleep(0.8)
        await at.put(a.url, b.url)
        assert b": continued on " in await client.until(b"data: [DONE]\n\n")


@on_uvloop
async def test_models_stay_known_while_a_coordinator_learns_them() -> None:
    """Which of several services a request is for does not depend on what a new coordinator was told by then."""
    replica_a, replica_b = LabReplica(), LabReplica(served_model="org/eyes")
    async with replica_a as a, replica_b as b, workers(f"lab={a.url}", f"eyes={b.url}") as at:
        asked = request(body=orjson.dumps(orjson.loads(chat()) | {"model": "org/eyes"}))

        async def is_known() -> bool:
            return {answer.status for answer in await at.ask_each(asked)} == {200}

        await at.until(is_known)
        os.kill(at.coordinator, signal.SIGKILL)
        statuses = []
        ends_at = time.monotonic() + 2
        while time.monotonic() < ends_at:
            statuses.append((await at.ask(asked)).status)
        assert set(statuses) == {200}


@on_uvloop
async def test_times_between_tokens_count_after_a_restart() -> None:
    """A stream that was under way when the coordinator died is counted to its end."""
    async with LabReplica(token_interval=0.02) as a, workers(a.url) as at:

        async def gaps() -> float:
            lines = (await at.admin.get("/metrics")).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if "inter_token_latency_seconds_count" in line)

        clients = await at.one_each()
        for client in clients:
            await client.send(LONG)
            await client.until(b"t00")
        await at.kill(at.coordinator)
        for client in clients:
            await client.until(b"data: [DONE]\n\n")

        async def are_counted() -> bool:
            return await gaps() > 200  # of 400; the first half may be lost with the coordinator

        await at.until(are_counted, 3.0)


@pytest.mark.parametrize("is_told", [False, True])
@on_uvloop
async def test_a_death_without_coordinator_is_told_later(is_told: bool) -> None:
    """The other relay refuses what killed two, the first of them while there was no coordinator to pass that on."""
    async with LabReplica() as a, LabReplica() as b, LabReplica() as c, AsyncExitStack() as stack:
        replicas = [a, b, c]
        at = await stack.enter_async_context((listed if is_told else workers)(a.url, b.url, c.url))
        for replica in replicas:
            replica.set(head_delay=30)
        bad = request(body=chat(padding="bad"))
        first, second = await at.one_each()
        await first.send(bad)
        victim = await until(
            lambda: next((replica for replica in replicas if replica.seen.requests), None), "it is asked"
        )
        os.kill(at.coordinator, signal.SIGKILL)
        await asyncio.sleep(0.1)  # until the relays have seen it
        victim.fall()
        replicas.remove(victim)
        for replica in replicas:
            replica.set(head_delay=0, poison="bad")
        if is_told:  # its controller has seen that the victim is dead
            await at.put(*(replica.url for replica in replicas))
        assert (await first.answer()).status in (502, 503)
        assert sum(replica.is_listening for replica in replicas) == 1
        await second.send(bad)
        refused = await second.answer()
        assert (refused.status, refused.error["code"]) == (422, "kills_replicas")


@pytest.mark.parametrize("lost", [0, 1])
@on_uvloop
async def test_new_processes_in_turn_know_of_deaths(lost: int) -> None:
    """The coordinator is started anew, several times, then a relay: both still refuse what killed two replicas."""
    async with LabReplica() as a, LabReplica() as b, LabReplica() as c, workers(a.url, b.url, c.url) as at:
        replicas = [a, b, c]
        for replica in replicas:
            replica.set(poison="bad")
        bad = request(body=chat(padding="bad"))
        first, _ = await at.one_each()
        await first.send(bad)
        assert (await first.answer()).status == 502
        for _ in range(FEW):  # what each hears again does not count again
            (coordinator,) = set(at.children()) - set(at.relays)
            await at.kill(coordinator)
            await at.shows(ready=1)  # the new coordinator has heard the relays
        await at.kill(at.relays[lost])
        for client in await at.one_each():
            await client.send(bad)
            refused = await client.answer()
            assert (refused.status, refused.error["code"]) == (422, "kills_replicas")
        assert sum(replica.is_listening for replica in replicas) == 1


@asynccontextmanager
async def keeping(is_told: bool) -> AsyncIterator[tuple[Workers, LabReplica, LabReplica]]:
    """Two replicas, each of which keeps one answer; both relays know where."""
    made_a, made_b = LabReplica(body='{"id": "resp_a"}'), LabReplica(body='{"id": "resp_b"}')
    async with made_a as a, made_b as b, (listed if is_told else workers)(a.url, b.url) as at:
        made = {(await at.ask(request(path="/v1/responses", body=b"{}"))).header("x-replica-id") for _ in range(2)}
        assert made == {"replica-1", "replica-2"}

        async def is_known() -> bool:
            return await kept(at) == {("resp_a", "replica-1"), ("resp_b", "replica-2")}

        await at.until(is_known)
        yield at, a, b


async def kept(at: Workers) -> set[tuple[str, str | None]]:
    """Which replica is said to keep each answer, asked at both relays; None where one does not know."""
    found = set()
    for id_ in ("resp_a", "resp_b"):
        asked = request(path="/v1/responses", body=b'{"previous_response_id": "%b"}' % id_.encode())
        for answer in await at.ask_each(asked):
            found.add((id_, answer.header("x-replica-id") if answer.status == 200 else None))
    return found


KEPT = {("resp_a", "replica-1"), ("resp_b", "replica-2")}


@pytest.mark.parametrize("is_told", [False, True])
@on_uvloop
async def test_who_keeps_an_answer_outlives_the_coordinator(is_told: bool) -> None:
    async with keeping(is_told) as (at, a, b):
        await at.kill(at.coordinator)
        if is_told:
            await asyncio.sleep(0.5)
            await at.put(a.url, b.url)
        await at.shows(ready=2)
        assert await kept(at) == KEPT


@on_uvloop
async def test_an_answer_before_the_list_comes_is_written_down(tmp_path: Path) -> None:
    """What a new coordinator cannot place yet, it is told again, so that it is on the disk for all later processes."""
    replica, arguments = LabReplica(body='{"id": "resp_a"}'), ("--state", str(tmp_path / "state"))
    async with replica as a, LabReplica(body="{}") as b, listed(a.url, b.url, arguments=arguments) as at:
        a.set(head_delay=1.5)
        clients = await at.one_each()
        for client in clients:
            await client.send(request(path="/v1/responses", body=b"{}"))
        await until(lambda: bool(a.seen.requests), "it is asked")
        await at.kill(at.coordinator)
        assert {(await client.answer()).header("x-replica-id") for client in clients} == {"replica-1", "replica-2"}
        await at.put(a.url, b.url)
        await at.shows(ready=2)
        a.set(head_delay=0.0)
        await until(lambda: "resp_a" in written(tmp_path / "state" / FILE), "it is on the disk")
        for relay in at.relays:
            await at.kill(relay)
        asked = request(path="/v1/responses", body=b'{"previous_response_id": "resp_a"}')
        assert {answer.header("x-replica-id") for answer in await at.ask_each(asked)} == {"replica-1"}


def written(path: Path) -> set[str]:
    """The answers of which the disk says who keeps them."""
    with contextlib.closing(sqlite3.connect(path)) as disk:
        return {id_ for (id_,) in disk.execute("SELECT id FROM answers")}


@on_uvloop
async def test_a_new_relay_learns_who_keeps_which_answer() -> None:
    async with keeping(is_told=False) as (at, _, _):
        for relay in at.relays:
            await at.kill(relay)
            assert await kept(at) == KEPT
        assert len({relay_of(answer) for answer in await at.ask_each()}) == 2


@on_uvloop
async def test_who_keeps_an_answer_outlives_all_in_turn() -> None:
    """The relays tell the new coordinator, and the new relays ask that."""
    async with keeping(is_told=True) as (at, a, b):
        await at.kill(at.coordinator)
        await at.put(a.url, b.url)
        await at.shows(ready=2)
        assert await kept(at) == KEPT
        for relay in at.relays:
            await at.kill(relay)
        assert await kept(at) == KEPT
