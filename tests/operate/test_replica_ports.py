"""A replica's port is its own from its choice until its end: no other service's replica answers for it."""

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.local import engine as local_engine
from balancer.operate.engines.local.engine import LocalEngine
from balancer.operate.engines.ports import claim, is_below
from balancer.operate.recipe.recipe import Invocation, Recipe, recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.service_file import parse
from tests.operate.command_line import LAB, PATIENCE, Groundserve
from tests.support.until import until, wait_until

LISTENS = "import socket, time; s = socket.create_server(('127.0.0.1', int(input()))); time.sleep(600)"


# A shell whose child listens there.
LISTENING = f'echo PORT | {sys.executable} -c "{LISTENS}"; true'


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Loading(Recipe):
    """SGLang as far as the engine can tell; in truth a script."""

    script: ClassVar[str]

    def invocation(self, id: int, port: int | str) -> Invocation:
        return Invocation(("bash", "-c", self.script.replace("PORT", str(port))), {}, Path("/"))


def loading(script: str) -> Recipe:
    made = recipe(parse("service: {}\nrun: sglang serve --model-path a/b\n", source="x.yaml"))
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return type("Scripted", (Loading,), {"script": script})(**fields)


def test_more_replicas_than_ports_are_refused(tmp_path: Path) -> None:
    made = recipe(parse("service: {replicas: 1901}\nrun: serve $GROUNDSERVE_PORT\n", source="x.yaml"))
    with pytest.raises(ConfigError, match="x: a machine has ports for 1900 replicas at most"):
        LocalEngine(ServiceFolder(tmp_path, "x")).fit(made)


LOADS = "exec sleep 600"


def local(path: Path) -> LocalEngine:
    path.mkdir()
    engine = LocalEngine(ServiceFolder(path.parent, path.name))
    engine.prepare(loading(LOADS), AddressFlags("127.0.0.1:0", "127.0.0.1:0"))
    return engine


@asynccontextmanager
async def engine_at(path: Path) -> AsyncIterator[LocalEngine]:
    engine = local(path)
    try:
        yield engine
    finally:
        await asyncio.gather(*(engine.stop(id, 0) for id in engine.running()))
        await engine.close()


def test_a_port_is_claimed_once_and_again_when_let_go() -> None:
    port = unused()
    kept = claim(port)
    assert kept is not None
    assert claim(port) is None
    other = f"from balancer.operate.engines.ports import claim; print(claim({port}))"
    assert subprocess.check_output([sys.executable, "-c", other], text=True, timeout=60) == "None\n"
    kept.close()
    again = claim(port)
    assert again is not None
    again.close()


def test_whose_a_port_is() -> None:
    port = unused()
    assert is_below(os.getpid(), port) is None
    with subprocess.Popen(["bash", "-c", LISTENING.replace("PORT", str(port))], start_new_session=True) as ours:
        try:
            wait_until(lambda: is_below(ours.pid, port))
            assert is_below(os.getpid(), port)
            with subprocess.Popen(["sleep", "600"]) as other:
                assert is_below(other.pid, port) is False
                other.kill()
        finally:
            os.killpg(ours.pid, 9)


def test_a_port_between_choice_and_listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second service chooses another one, or none, while the first one's replica loads; then it is free again."""

    async def work() -> None:
        async with engine_at(tmp_path / "a") as first, engine_at(tmp_path / "b") as second:
            port = unused()
            monkeypatch.setattr(local_engine, "REPLICA_PORTS", [port])
            await first.start(1, loading(LOADS))
            with pytest.raises(CannotStart, match=f"no port from {port} to {port} is free"):
                await second.start(1, loading(LOADS))
            await first.stop(1, 5)
            await second.start(1, loading("exit 7"))
            await until(lambda: [one.reason for one in second.ended()] == ["exited with code 7"], within=PATIENCE)
            await first.start(1, loading(LOADS))

    asyncio.run(work())


def test_another_program_on_a_replicas_port(tmp_path: Path) -> None:
    """It took the port while SGLang loaded, and would get the service's requests."""

    async def work() -> None:
        async with engine_at(tmp_path / "x") as engine:
            await engine.start(1, loading(LISTENING))
            await until(lambda: engine._replicas[1].guard.done(), within=PATIENCE)
            assert engine.running().keys() == {1}, "its own grandchild is no other program"
            await engine.start(2, loading(LOADS))
            port = int(engine.running()[2].endpoint.rpartition(":")[2])
            with socket.create_server(("127.0.0.1", port)):
                (over,) = await until(engine.ended, within=PATIENCE)
            assert over.id == 2
            assert over.reason.startswith(f"while it started, port {port} was taken by process {os.getpid()} (")
            assert engine.running().keys() == {1}

    asyncio.run(work())


def test_two_services_with_one_port_of_their_own(groundserve: Groundserve) -> None:
    """As two ordinary SkyServe files with `ports: 8000`: the second never answers for the first, which loads."""
    port = unused()
    more = f"resources: {{ports: {port}}}"
    script = LAB.replace("$GROUNDSERVE_PORT", str(port))
    slow = groundserve.up(groundserve.service("slow", f"{script} --start-delay 600", replicas=1, more=more))
    slow.until("slow-1  STARTING")
    quick = groundserve.up(groundserve.service("quick", script, replicas=1, more=more))
    assert quick.wait() == 1
    assert f"quick failed: port {port} is kept for a replica of another service here" in quick.text
    assert groundserve.status("slow")["service"]["ready"] == 0
