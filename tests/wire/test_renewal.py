"""A changed service file takes effect while requests go on; a mistake in it changes nothing."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.__main__ import config_from, parse
from balancer.relay.sweep import INTERVAL
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import House, on_uvloop, serving

FILE = """
name: {name}
service: {{readiness_probe: {{path: {path}}}, replicas: 1, load_balancing_policy: {policy}}}
x-groundserve:
  {{max_in_flight: {limit}, queue_size: {queue}, trusted_proxies: {trusted}, drain_grace: 0, drain_timeout: 0}}
"""
USUAL = {"name": "first", "path": "/health", "policy": "round_robin", "limit": 1, "queue": 0, "trusted": []}


@asynccontextmanager
async def described(folder: Path, *replicas: LabReplica) -> AsyncIterator[tuple[House, Path]]:
    """A balancer with a service file, and that file."""
    file = folder / "service.yaml"
    file.write_text(FILE.format(**USUAL))
    options = parse(["--service", str(file)])
    config = config_from(options)
    told = {"settings": config.settings, "policy": config.policy, "name": config.name, "service_file": file}
    async with serving(*replicas, config=told, reread=lambda: config_from(options, patience=0)) as house:
        yield house, file


def write(file: Path, **changes: object) -> None:
    """Replaces the file by a new one, as an editor or a controller does."""
    fresh = file.with_suffix(".new")
    fresh.write_text(FILE.format(**(USUAL | changes)))
    fresh.replace(file)


@on_uvloop
async def test_changes_apply_at_once(tmp_path: Path) -> None:
    """Another policy and other limits apply at once, and streams go on."""
    async with LabReplica(token_interval=0.05) as a, described(tmp_path, a) as (house, file):
        stream = await house.client()
        await stream.send(request(body=chat(tokens=20, stream=True)))
        await a.seen.until(lambda seen: seen.generations_started == 1)
        refused = await house.ask(request(body=chat()))
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        write(file, policy="prefix_aware", limit=2, name="second")
        await until(lambda: house.balancer.service.admission.policy.name == "prefix_aware")
        assert (await house.ask(request(body=chat(tokens=2)))).status == 200
        answer = await stream.answer()
        assert answer.status == 200
        assert b"[DONE]" in answer.body
        assert house.balancer.service.facts.name == "second"


@on_uvloop
async def test_what_stays_the_same_keeps_what_it_knows(tmp_path: Path) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        write(file, policy="prefix_aware")
        await until(lambda: house.balancer.service.admission.policy.name == "prefix_aware")
        policy = house.balancer.service.admission.policy
        write(file, policy="prefix_aware", limit=7)
        await until(lambda: house.member("a").limit == 7)
        assert house.balancer.service.admission.policy is policy, "with its index of prefixes"


@on_uvloop
async def test_another_readiness_probe_is_asked_from_now_on(tmp_path: Path) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        write(file, path="/v1/models")
        await until(lambda: house.balancer.service.fleet.readiness.path == "/v1/models")
        assert house.member("a").readiness.path == "/v1/models"
        assert (await house.ask(request(body=chat()))).status == 200


@on_uvloop
async def test_who_is_trusted_changes_on_open_connections_too(tmp_path: Path) -> None:
    """A proxy keeps its connections open for long."""
    asked = request("GET", "/v1/models/lab", headers=(("X-Forwarded-For", "203.0.113.9"),))
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        proxy = await house.client()
        for trusted, told in (["127.0.0.1"], "203.0.113.9, 127.0.0.1"), ([], "127.0.0.1"):
            write(file, trusted=trusted)
            await until(lambda trusted=trusted: len(house.balancer.doors.trusted) == len(trusted))  # type: ignore[misc]
            await proxy.send(asked)
            assert (await proxy.answer("GET")).status == 200
            assert a.seen.last.header("x-forwarded-for") == told


@on_uvloop
async def test_a_mistake_in_the_file_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        write(file, limit="many", policy="least_load")
        await until(lambda: house.complaints)
        (complaint,) = house.complaints
        assert "max_in_flight" in complaint
        assert "all stays as it was" in complaint
        house.complaints.clear()
        assert house.balancer.service.admission.policy.name == "round_robin"
        assert house.member("a").limit == 1
        file.unlink()
        await until(lambda: house.complaints)
        assert "give the path of a service YAML" in house.complaints[0]
        house.complaints.clear()
        write(file, limit=3)
        await until(lambda: house.member("a").limit == 3)


@on_uvloop
async def test_what_a_process_is_started_with_stays(tmp_path: Path) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, _file):
        endpoint = house.balancer.endpoint
        house.balancer.renew(replace(house.balancer.config, listen=("127.0.0.1", 1), replicas=()))
        assert (await house.ask(request(body=chat()))).status == 200
        assert house.balancer.endpoint == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "service: {replicas: {{ replicas }}}",
        "service: {}\nenvs: {A: &x [*x]}",
        "service: {}\n? [a, b]\n: 1",
        "service: {}\nname: a\nname: b",
        "service: {}\nx: &a [1, 1, 1, 1]\ny: &b [" + "*a, " * 4000 + "]",
        "[" * 100_000,
        "service: {replicas: 1" + "0" * 5000 + "}",
        "#" * 300_000,
        'service: {}\nname: "\\UFFFFFFFF"',
        "",
    ],
    ids=lambda text: text[:20],
)
@on_uvloop
async def test_an_odd_file_is_logged_once_and_changes_nothing(tmp_path: Path, text: str) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)
        await until(lambda: house.complaints)
        assert (await house.ask(request(body=chat()))).status == 200
        await asyncio.sleep(3 * INTERVAL)
        (complaint,) = house.complaints
        assert str(file) in complaint
        assert complaint.rstrip().endswith("; all stays as it was")
        house.complaints.clear()
        write(file, limit=3)
        await until(lambda: house.member("a").limit == 3)


@on_uvloop
async def test_a_pipe_in_the_files_place_holds_nobody_up(tmp_path: Path) -> None:
    async with LabReplica() as a, described(tmp_path, a) as (house, file):
        file.unlink()
        os.mkfifo(file)
        writer = os.open(file, os.O_RDWR)
        await until(lambda: house.complaints)
        assert "nothing comes out of this pipe" in house.complaints[-1]
        assert (await house.ask(request(body=chat()))).status == 200
        os.close(writer)
        house.complaints.clear()
