"""Containers come, go, die and hang under streams; nothing is lost that need not be."""

import asyncio
import time

import httpx
import pytest

from tests.e2e.docker.conftest import build_lab
from tests.e2e.docker.project import Project, docker
from tests.e2e.docker.traffic import Outcome, Traffic, ask, traffic
from tests.support.until import wait_until

pytestmark = pytest.mark.docker

CLIENTS = 16
TOKENS = 20  # a second of stream


async def ready(project: Project, count: int) -> set[str]:
    """Waits until the balancer calls that many replicas READY, no more and no fewer."""

    def look() -> set[str]:
        found = project.ready()
        return found if len(found) == count == project.status()["service"]["total"] else set()

    return await asyncio.to_thread(wait_until, look, f"{count} ready replicas")


def test_scaling_2_6_2_4_under_streams_loses_nothing(lab: Project) -> None:
    async def scale() -> tuple[Traffic, set[str]]:
        members = set()
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            for count in (6, 2, 4):
                await asyncio.to_thread(lab.scale, count)
                members |= await ready(lab, count)
                await seen.more(2 * CLIENTS)
        return seen, members

    seen, members = asyncio.run(scale())
    assert seen.lost == []
    assert {one.member for one in seen.outcomes} == members, "each replica that was ever ready had its share"


def test_replacing_with_spare_gpus(lab: Project, lab_images: Project) -> None:
    """Starting new replicas beside the old and then scaling down replaces all and loses nothing."""
    before = {one.image for one in lab.containers()}
    build_lab(lab_images, version=2)

    async def replace() -> Traffic:
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            await asyncio.to_thread(lab.scale, 4)
            # Without --no-recreate the containers of an old image are those that go.
            fewer = ("up", "-d", "--no-deps", "--scale", "replica=2", "--wait", "replica")
            await asyncio.to_thread(lab.compose, *fewer)
            await ready(lab, 2)
            await seen.more(2 * CLIENTS)
        return seen

    seen = asyncio.run(replace())
    after = {one.image for one in lab.containers()}
    assert seen.lost == []
    assert len(before) == len(after) == 1
    assert before != after


def test_replacing_one_at_a_time(lab: Project, lab_images: Project) -> None:
    """Replacing one at a time replaces all without a spare GPU and loses nothing."""
    before = lab.containers()
    build_lab(lab_images, version=3)

    async def replace() -> Traffic:
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            for old in before:
                await asyncio.to_thread(docker, "stop", old.id)
                await asyncio.to_thread(docker, "rm", old.id)
                await asyncio.to_thread(lab.scale, 2)
            await ready(lab, 2)
            await seen.more(2 * CLIENTS)
        return seen

    seen = asyncio.run(replace())
    after = lab.containers()
    assert seen.lost == []
    assert len(after) == 2
    assert not {one.image for one in before} & {one.image for one in after}


def test_plain_up_with_another_image(lab: Project, lab_images: Project) -> None:
    """A plain up with another image, which replaces all replicas at once, cuts nothing: new requests wait meanwhile."""
    before = {one.image for one in lab.containers()}
    build_lab(lab_images, version=4)

    async def replace() -> Traffic:
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            await asyncio.to_thread(lab.compose, "up", "-d")
            await ready(lab, 2)
            await seen.more(2 * CLIENTS)
        return seen

    seen = asyncio.run(replace())
    assert seen.lost == []
    assert all(one.is_whole(TOKENS) for one in seen.ended[-CLIENTS:])
    assert not before & {one.image for one in lab.containers()}


def test_a_stopped_replica_ends_its_ten_second_stream_first(lab: Project) -> None:
    async def stop() -> tuple[Outcome, float, int]:
        async with httpx.AsyncClient(base_url=lab.url(), timeout=60) as client:
            outcome = Outcome()
            stream = asyncio.create_task(ask(client, outcome, tokens=200))
            async with asyncio.timeout(10):
                while not outcome.tokens:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            (holder,) = [one for one in lab.containers() if one.member == outcome.member]
            await asyncio.to_thread(docker, "stop", holder.id)
            return await stream, time.monotonic(), holder.again().exit_code

    outcome, stopped, exit_code = asyncio.run(stop())
    assert outcome.is_whole(tokens=200), outcome
    assert outcome.ended - outcome.asked > 9, "it was a ten second stream"
    assert stopped >= outcome.ended, "the container outlived its stream"
    assert exit_code == 0


def test_kill_9_costs_nothing(lab: Project) -> None:
    async def kill() -> tuple[Traffic, str, list[Outcome]]:
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            victim = lab.containers()[0]
            await asyncio.to_thread(docker, "kill", "--signal", "KILL", victim.id)
            killed = time.monotonic()
            await seen.more(3 * CLIENTS)
        return seen, victim.member, [one for one in seen.outcomes if one.asked < killed]

    seen, member, asked_before = asyncio.run(kill())
    assert any(one.member == member for one in asked_before), "the replica had streams on it"
    assert seen.lost == []


def test_paused_replica(lab: Project) -> None:
    """A paused replica is left out, and its streams go on afterwards."""

    async def pause() -> tuple[Traffic, list[Outcome], str, float]:
        async with traffic(lab.url(), CLIENTS, tokens=TOKENS) as seen:
            await seen.more(CLIENTS)
            victim = lab.containers()[0]
            await asyncio.to_thread(docker, "pause", victim.id)
            try:
                await asyncio.to_thread(wait_until, lambda: len(lab.ready()) == 1, "the paused replica is left out")
                # Others than the clients, who by now may all wait for the paused one.
                async with httpx.AsyncClient(base_url=lab.url(), timeout=60) as client:
                    others = await asyncio.gather(*(ask(client, Outcome(), TOKENS) for _ in range(6)))
            finally:
                await asyncio.to_thread(docker, "unpause", victim.id)
            resumed = time.monotonic()
            await ready(lab, 2)
            await seen.more(3 * CLIENTS)
        return seen, others, victim.member, resumed

    seen, others, member, resumed = asyncio.run(pause())
    assert all(one.is_whole(TOKENS) and one.member != member for one in others), "the other replica answers"
    waited = [one for one in seen.outcomes if one.member == member and one.asked < resumed < one.ended]
    assert waited, "streams hung with the paused replica"
    assert seen.lost == [], "and went on with it"
    assert any(one.member == member and one.asked > resumed for one in seen.outcomes), "it is used again"


def test_stop_lets_the_balancer_go_first_and_every_stream_end(lab: Project) -> None:
    async def stop() -> tuple[Traffic, float]:
        async with traffic(lab.url(), CLIENTS, tokens=3 * TOKENS) as seen:
            await seen.more(CLIENTS)
            told = time.monotonic()
            await asyncio.to_thread(lab.compose, "stop")
        return seen, told

    try:
        seen, told = asyncio.run(stop())
        on_their_way = [one for one in seen.outcomes if one.asked < told]
        assert [one for one in on_their_way if not one.is_whole(3 * TOKENS)] == []
        late = [one for one in seen.lost if one.status]
        assert late == [], "who comes too late is refused at the door, not cut"
        assert {one.exit_code for one in lab.containers() + lab.containers("balancer")} == {0}
    finally:
        lab.compose("up", "-d", "--wait")
