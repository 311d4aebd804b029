"""What each engine promises, held against all of them; and one that nobody knew of works without another edit."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from balancer.contract.listing import Listing
from balancer.errors import ConfigError
from balancer.operate.engines import choose
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.compose import project
from balancer.operate.engines.engine import CannotStart, Engine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.service_file import parse
from tests.operate import docker_stub
from tests.operate.command_line import PATIENCE, ROOT, Groundserve
from tests.support.until import wait_until

ANY_PORTS = AddressFlags("127.0.0.1:0", "127.0.0.1:0")


@dataclass(frozen=True, slots=True)
class Case:
    """An engine before `prepare`, a service that it can run, one that it cannot start, and the death of a replica."""

    engine: Engine
    folder: ServiceFolder
    service: Recipe
    broken: Recipe
    kill: Callable[[int], None]

    async def until_changed(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.engine.changed.wait()
        self.engine.changed.clear()


def service(run: str, more: str = "") -> Recipe:
    return recipe(parse(f"service: {{}}\n{more}\nrun: {run}\n", source="x.yaml"))


def local(folder: ServiceFolder) -> Case:
    def kill(id: int) -> None:
        os.kill(int((folder.path / f"pid-{id}").read_text()), signal.SIGKILL)

    run = f"echo $$ > {folder.path}/pid-$SKYPILOT_SERVE_REPLICA_ID; exec sleep 600 $GROUNDSERVE_PORT"
    broken = service(run, "workdir: /nowhere")
    return Case(choose.ENGINES["local"](folder), folder, service(run), broken, kill)


def compose(folder: ServiceFolder) -> Case:
    stub = folder.path / "stub"
    (stub / "containers").mkdir(parents=True)
    (stub / "docker").symlink_to(docker_stub.__file__)
    os.environ["PATH"] = f"{stub}:{os.environ['PATH']}"
    os.environ["DOCKER_STUB"] = str(stub / "containers")

    def kill(id: int) -> None:
        for path in (stub / "containers").iterdir():
            container = json.loads(path.read_text())
            if container["labels"].get("groundserve.id") == str(id):
                os.kill(container["pid"], signal.SIGKILL)

    run = "sglang serve --model-path a/b"
    return Case(choose.ENGINES["compose"](folder), folder, service(run), service(f"{run} --BROKEN yes"), kill)


CASES = {"local": local, "compose": compose}
# Those that need a cluster are held to the same on one.
ON_CLUSTERS = {"slurm": "tests/e2e/slurm/test_service.py", "kubernetes": "tests/e2e/kubernetes/test_kubernetes.py"}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    for name in ("PATH", "DOCKER_STUB"):  # put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    folder = ServiceFolder(tmp_path, "x")
    with folder.claim():
        case = CASES[request.param](folder)
        yield case
        case.engine.take_down()


def test_every_engine_has_a_case() -> None:
    assert CASES.keys() | ON_CLUSTERS.keys() == choose.ENGINES.keys()
    assert all("def test_" in (ROOT / tests).read_text() for tests in ON_CLUSTERS.values())


def with_engine(case: Case, work: Callable[[Addresses], Awaitable[None]]) -> None:
    """The engine prepared, in an event loop; whatever it still runs is ended in the end."""

    async def run() -> None:
        addresses = case.engine.prepare(case.service, ANY_PORTS, None)
        assert await case.engine.found() == ()
        try:
            await work(addresses)
        finally:
            await asyncio.gather(*(case.engine.stop(id, 0) for id in case.engine.running()))
            await case.engine.close()

    asyncio.run(run())


def test_it_fits_a_service_and_says_what_it_is_called(case: Case) -> None:
    assert choose.ENGINES[case.engine.name](case.folder).name == case.engine.name
    fitted, _ = case.engine.fit(case.service) if case.engine.name == "local" else (case.service, [])
    assert fitted.spec == case.service.spec
    assert case.engine.placement(fitted) == []


def test_it_prepares_addresses_of_two_free_ports(case: Case) -> None:
    async def work(addresses: Addresses) -> None:
        ports = {int(address.rpartition(":")[2]) for address in (addresses.listen, addresses.admin)}
        assert len(ports) == 2
        assert 0 not in ports

    with_engine(case, work)


def test_replicas_start_run_and_stop(case: Case) -> None:
    engine = case.engine

    async def work(_: Addresses) -> None:
        for id in (1, 2):
            await engine.start(id, case.service)
        assert engine.running().keys() == {1, 2}
        one, two = (engine.running()[id] for id in (1, 2))
        assert (one.id, two.id) == (1, 2)
        assert one.infra == engine.name
        assert one.name != two.name
        assert one.endpoint.startswith("http://")
        assert one.endpoint != two.endpoint
        assert one.launched_seconds is not None
        assert 0 <= one.launched_seconds < PATIENCE
        await engine.stop(1, 5)
        assert list(engine.running()) == [2]
        assert engine.ended() == (), "it was asked to"
        await engine.stop(1, 5)  # there is none any more
        await engine.start(1, case.service)
        assert engine.running().keys() == {1, 2}

    with_engine(case, work)


def test_a_death_is_told_once_with_its_reason(case: Case) -> None:
    engine = case.engine

    async def work(_: Addresses) -> None:
        await engine.start(1, case.service)
        await asyncio.to_thread(wait_until, lambda: is_there(case, 1))
        case.kill(1)
        await case.until_changed()
        (over,) = engine.ended()
        assert over.id == 1
        assert "killed by signal 9" in over.reason
        assert engine.ended() == ()
        assert engine.running() == {}

    with_engine(case, work)


def is_there(case: Case, id: int) -> bool:
    """Has the process come so far that it can be killed by its number?"""
    if case.engine.name == "local":
        path = case.folder.path / f"pid-{id}"
        return path.exists() and path.read_text().strip() != ""
    return True


def test_what_cannot_be_started_says_why_in_one_line(case: Case) -> None:
    async def work(_: Addresses) -> None:
        with pytest.raises(CannotStart) as raised:
            await case.engine.start(1, case.broken)
        assert str(raised.value).count("\n") == 0
        assert str(raised.value)
        assert case.engine.running() == {}

    with_engine(case, work)


def test_balancer_of_an_engine(case: Case) -> None:
    """An engine's balancer is at the prepared addresses and goes when told."""

    async def work(addresses: Addresses) -> None:
        balancer = case.engine.balancer(case.service)
        assert balancer.endpoint == f"http://{addresses.listen}"
        assert balancer.key_file.read_text()
        assert not balancer.has_answered
        assert await balancer.tell(Listing(())) is None
        await balancer.keep_up()
        first = balancers(case)
        await balancer.replace()
        await balancer.keep_up()
        await asyncio.to_thread(wait_until, lambda: balancers(case) - first)
        await balancer.stop(asyncio.Event())
        assert not balancers(case)

    with_engine(case, work)


def balancers(case: Case) -> set[str]:
    """Who is the balancer now, and before: its processes, or its containers that run."""
    if case.engine.name == "compose":
        name = project.name_of(case.folder)
        found = docker_stub.containers(name, "balancer", Path(os.environ["DOCKER_STUB"]))
        return {one["id"] for one in found if docker_stub.is_alive(one)}
    mark = f"--service\0{case.folder.path}/".encode()
    found = (path for path in Path("/proc").glob("[0-9]*/cmdline"))
    return {path.parent.name for path in found if mark in read(path) and b"leash" not in read(path)}


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # the process ended


def test_next_controller_finds_what_is_left(case: Case) -> None:
    """The next controller finds what outlives one, and nothing else."""
    engine, service = case.engine, case.service
    following = choose.ENGINES[engine.name](case.folder)

    async def work(_: Addresses) -> None:
        await engine.start(3, service)
        following.prepare(service, ANY_PORTS, None)
        found = [(one.id, one.listing.version, one.digest) for one in await following.found()]
        assert found == ([(3, 1, service.digest)] if engine.outlives_controller else [])
        assert list(following.running()) == [id for id, _, _ in found]
        await asyncio.gather(*(following.stop(id, 0) for id in following.running()))
        await following.close()

    with_engine(case, work)


def test_no_file_but_one_knows_the_engines_by_name() -> None:
    """Else an engine could not be added in its own folder. (One command writes the files of a certain one.)"""
    engines = ROOT / "balancer/operate/engines"
    known = (engines / "choose.py", ROOT / "balancer/operate/commands/manifests.py")
    for path in (ROOT / "balancer/cli.py", *(ROOT / "balancer/operate").rglob("*.py")):
        if path.parent.parent == engines or path in known:
            continue
        text = path.read_text()
        for name in choose.ENGINES:
            assert f"engines.{name}" not in text, path
            assert f'{name}"' not in text.replace(f'"--{name}"', ""), path


# One that nobody knew of


class WithMadeUp(Groundserve):
    module = "tests.operate.made_up_engine"


@pytest.fixture
def made_up(tmp_path: Path) -> Iterator[WithMadeUp]:
    command = WithMadeUp(tmp_path)
    yield command
    command.stop_all()


def test_engine_of_somebody_else(made_up: WithMadeUp) -> None:
    """A service on an engine that somebody else wrote comes up, is shown and goes down."""
    file = made_up.service("lab", replicas=2)
    said = made_up("up", "-d", "--on", "made-up", file, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    assert "warning: it is made up" in said
    assert "lab is up after" in said
    rows = made_up.status("lab")["replicas"]
    assert [(row["name"], row["infra"], row["status"]) for row in rows] == [
        ("made-up-1", "made-up", "READY"),
        ("made-up-2", "made-up", "READY"),
    ]
    assert "made-up" in made_up("status")
    assert made_up("down", "lab") == "lab is down\n"
    assert made_up("status") == "No existing services.\n"
    made_up.until_nothing_runs()


def test_what_the_next_controller_would_undo_is_refused(made_up: WithMadeUp) -> None:
    """Whoever keeps this one up has the file, and begins with it again. How many there are to be is written down."""
    made_up.environ["MADE_UP_IS_KEPT_UP"] = "yes"
    file = made_up.service("lab", replicas=1)
    made_up("up", "-d", "--on", "made-up", file, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    for words in (["update", "lab", file], ["rollback", "lab"], ["down", "lab"]):
        assert "lab is what its cluster was given" in made_up(*words, code=1)
    assert made_up.status("lab")["service"]["status"] == "READY"
    made_up("scale", "lab", "2")
    made_up.until("lab", lambda status: status["service"]["ready"] == 2)
    lock = json.loads((made_up.folder / "state/groundserve/lab/lock").read_text())
    os.kill(lock["pid"], signal.SIGTERM)
    folder = ServiceFolder(made_up.folder / "state/groundserve", "lab")
    wait_until(lambda: folder.is_detached)
    assert folder.desired is not None
    assert folder.desired.target == 2
    made_up("down", "lab")


def test_what_it_left_is_taken_down_through_its_own_door(made_up: WithMadeUp) -> None:
    file = made_up.service("lab", replicas=1)
    made_up("up", "-d", "--on", "made-up", file, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    lock = json.loads((made_up.folder / "state/groundserve/lab/lock").read_text())
    os.kill(lock["pid"], signal.SIGKILL)
    folder = ServiceFolder(made_up.folder / "state/groundserve", "lab")
    wait_until(lambda: folder.is_detached)
    assert folder.desired is not None
    assert folder.desired.engine == "made-up"
    with pytest.raises(ConfigError, match="lab: there is no engine made-up, only local and compose"):
        choose.take_down_detached(folder)
    assert made_up("down", "lab") == "lab is down\n"
    made_up.until_nothing_runs()
