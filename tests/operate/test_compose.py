"""What the Compose engine tells Docker, without a Docker engine; tests/e2e/docker/test_engine.py has one."""

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses, AddressFlags, choose_addresses
from balancer.operate.engines.choose import choose_engine
from balancer.operate.engines.compose import engine as compose_engine
from balancer.operate.engines.compose import project
from balancer.operate.engines.compose.balancer_handle import admin_key, environ
from balancer.operate.engines.compose.engine import ComposeEngine, _Replica, project_of, replica_overlay, secrets_of
from balancer.operate.engines.compose.project import Container, name_of
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.service_file import parse
from tests.operate import docker_stub
from tests.operate.command_line import PATIENCE
from tests.operate.meant import desired
from tests.support.until import until

LOOPBACK = Addresses("127.0.0.1:30001", "127.0.0.1:30002")


def made(run: str = "sglang serve --model-path a/b --x y", more: str = "", **changes: object) -> Recipe:
    text = f"service: {{ports: 8000}}\n{more}\nrun: {run}\n"
    return replace(recipe(parse(text, source="x.yaml"), version=4), **changes)


def folder_at(path: Path) -> ServiceFolder:
    path.mkdir(parents=True, exist_ok=True)
    return ServiceFolder(path.parent, path.name)


# A replica's container


def test_overlay_of_a_replica() -> None:
    """A replica's overlay holds its command, its variables and its identity."""
    one = made(more="envs: {HF_TOKEN: s3cr3t, PRICE: 5$}", gpus=2)
    whole = replica_overlay(7, one, secrets_of(7, one))
    overlay = whole["services"]["replica"]
    assert overlay["command"] == ["--model", "a/b", "--port", "8000", "--gpus", "2", "--", "--x", "y"]
    assert overlay["environment"]["SKYPILOT_SERVE_REPLICA_ID"] == "7"
    assert overlay["environment"]["PRICE"] == "5$$", "Compose would fill a single dollar in"
    assert overlay["labels"] == {
        "groundserve.id": "7",
        "groundserve.version": "4",
        "groundserve.digest": one.digest,
    }
    assert "s3cr3t" not in str(whole)
    assert overlay["restart"] == "no", "the controller starts it again, with a pause and a limit"
    assert "volumes" not in overlay


def test_secrets_come_to_a_container_in_a_file() -> None:
    """Compose copies them in; they are in no variable, no label and no command that docker inspect shows."""
    one = made("sglang serve --model-path a/b --api-key $MINE", "secrets: {MINE: hush-1}\nenvs: {OTHER_KEY: hush-2}")
    secrets = secrets_of(1, one)
    assert secrets == {
        "MINE": "hush-1",
        "OTHER_KEY": "hush-2",
        "GROUNDSERVE_SECRET_1": "hush-1",
    }
    overlay = replica_overlay(1, one, secrets)
    assert "hush" not in str(overlay)
    replica = overlay["services"]["replica"]
    assert replica["command"][-2:] == ["--api-key", "@env:GROUNDSERVE_SECRET_1"]
    assert replica["secrets"] == list(overlay["secrets"]) == ["groundserve"]
    assert replica["environment"]["MINE"] == "", "a file of the user's own may fill it in"
    assert one.digest != made("sglang serve --model-path a/b --api-key other").digest


def test_model_folder_is_mounted(tmp_path: Path) -> None:
    """A model's folder is mounted in the container at the path that it has on the host."""
    overlay = replica_overlay(1, made(f"sglang serve --model-path {tmp_path}"), ())["services"]["replica"]
    assert overlay["volumes"] == [f"{tmp_path}:{tmp_path}:ro"]
    assert str(tmp_path) in overlay["command"]


def test_a_digest_tells_recipes_apart_by_what_they_start() -> None:
    assert made().digest == made(version=9).digest, "a version is only a number"
    others = [made("sglang serve --model-path a/b --x z"), made(more="envs: {A: b}"), made(gpus=1)]
    assert len({made().digest, *(other.digest for other in others)}) == 4


def test_a_container_is_read_from_what_docker_says() -> None:
    facts = {
        "Id": "abc",
        "State": {"StartedAt": "2026-01-02T03:04:05.123456789Z", "Running": True, "ExitCode": 0},
        "Config": {"Labels": {"groundserve.id": "1"}, "Image": "groundserve/replica:latest"},
        "Image": "sha256:abc",
        "RestartCount": 2,
        "NetworkSettings": {"Networks": {"a": {"IPAddress": ""}, "b": {"IPAddress": "172.18.0.3"}}},
    }
    container = Container.of(facts)
    assert (container.address, container.restarts, container.is_running) == ("172.18.0.3", 2, True)
    assert container.age > 0
    assert (container.image, container.image_name) == ("sha256:abc", "groundserve/replica:latest")


@pytest.mark.parametrize(
    ("address", "listing"),
    [
        ("172.18.0.3", ReplicaListing("172.18.0.3:8000", "http://172.18.0.3:8000", id=7, version=4, infra="compose")),
        ("", ReplicaListing("x-7", id=7, version=4, infra="compose", state=State.PROVISIONING)),
    ],
    ids=["running", "without an address"],
)
def test_a_container_is_listed_with_its_address_or_without(
    tmp_path: Path, address: str, listing: ReplicaListing
) -> None:
    """One that ended at once has no address when it is looked at; the controller must not end with it."""
    container = Container("abc", {"groundserve.version": "4"}, address, bool(address), 0, 0, 1.0)
    engine = ComposeEngine(folder_at(tmp_path / "x"))

    async def listed() -> ReplicaListing:
        following = asyncio.create_task(asyncio.sleep(0))
        started = asyncio.get_running_loop().time()
        engine._replicas[7] = _Replica(container, following, started, FirstWords(tmp_path / "log"))
        return replace(engine.running()[7], launched_seconds=None)

    assert asyncio.run(listed()) == listing


def test_name_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose takes it, and no two services have the same: by name, folder or user."""
    places = [tmp_path / "a/llama.v1", tmp_path / "a/llama-v1", tmp_path / "a/Llama-v1", tmp_path / "b/llama.v1"]
    names = [name_of(ServiceFolder(place.parent, place.name)) for place in places]
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    names.append(name_of(ServiceFolder(places[0].parent, places[0].name)))
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"groundserve-llama-v1-\d+-[0-9a-f]{8}", name) for name in names)


@pytest.mark.parametrize("is_ours", [True, False])
def test_project_of_an_earlier_version(docker: Path, is_ours: bool) -> None:
    """Its name is kept while its balancer reads our folder; another user's project of that name is left alone."""
    folder = folder_at(docker / "My.Model")
    source = folder.service_file.parent if is_ours else docker / "bobs/My.Model/balancer"
    overlay = docker / "balancer.json"
    overlay.write_text(json.dumps({"services": {"balancer": {"volumes": [f"{source}:/service:ro"]}}}))
    command = ["docker", "compose", "-p", "groundserve-my-model", "-f", str(overlay), "up", "-d", "balancer"]
    subprocess.run(command, check=True)
    assert project.name_in_use(folder) == ("groundserve-my-model" if is_ours else name_of(folder))
    project.take_down(folder)
    left = docker_stub.containers("groundserve-my-model", "balancer", docker / "containers")
    assert bool(left) is not is_ours
    for one in left:
        docker_stub.kill(one)


# The balancer's container


def test_variables_for_compose(tmp_path: Path) -> None:
    """Compose gets addresses, keys and the drain time from the environment."""
    where = Addresses("0.0.0.0:80", "127.0.0.1:81", api_keys="keys.txt")
    told = environ(where, made(more="x-groundserve: {drain_timeout: 90}"), folder_at(tmp_path / "x"))
    assert (told["BIND"], told["PORT"], told["ADMIN_PORT"]) == ("0.0.0.0", "80", "81")
    assert told["API_KEYS_FILE"] == str(Path("keys.txt").absolute())
    assert told["STOP_GRACE_PERIOD"] == "120s"


def test_admin_key_for_the_container(tmp_path: Path) -> None:
    """The admin key is made once, readable for us and for the container."""
    folder = folder_at(tmp_path / "x")
    key = admin_key(folder)
    assert len(key) >= 32
    assert admin_key(folder) == key
    assert stat.S_IMODE(folder.admin_key_file.stat().st_mode) == 0o644


# Which engine


@pytest.fixture
def docker_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A docker command on the path that ends with this exit code, whatever it is asked."""

    def say(code: int) -> None:
        command = tmp_path / "docker"
        command.write_text(f"#!/bin/sh\nexit {code}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return say


def test_auto_is_local_where_sglang_is_installed(docker_says: Callable[[int], None], tmp_path: Path) -> None:
    docker_says(0)
    folder = folder_at(tmp_path / "x")
    assert choose_engine("auto", made(), folder).name == "local"
    assert choose_engine("local", made(), folder).name == "local"
    assert choose_engine("compose", made(), folder).name == "compose"


def test_auto_is_compose_where_docker_is_and_no_sglang(
    docker_says: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(tmp_path / "x")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    docker_says(0)
    assert choose_engine("auto", made(), folder).name == "compose"
    assert choose_engine("auto", made("./serve.sh $GROUNDSERVE_PORT"), folder).name == "local"
    docker_says(1)
    assert choose_engine("auto", made(), folder).name == "local", "which says what is missing"


def test_compose_without_docker_running_says_what_to_do(docker_says: Callable[[int], None], tmp_path: Path) -> None:
    docker_says(1)
    with pytest.raises(ConfigError, match="no Docker engine with Compose v2 answers: start it, or use --on local"):
        ComposeEngine(folder_at(tmp_path / "x")).fit(made())


def test_compose_without_docker_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no Docker engine with Compose v2 answers"):
        ComposeEngine(folder_at(tmp_path / "x")).fit(made())


def test_compose_runs_sglang_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Compose runs the replica's image: use --on local"):
        ComposeEngine(folder_at(tmp_path / "x")).fit(made("./serve.sh $GROUNDSERVE_PORT"))


def test_installation_without_a_checkout(tmp_path: Path) -> None:
    """An installation without the checkout cannot build images.

    As `pip install` leaves it: the package alone, elsewhere.
    """
    shutil.copytree(Path(project.__file__).parents[3], tmp_path / "balancer")
    code = "from balancer.operate.engines.compose.project import check_docker as c; c()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "which this installation has not: run it in a clone of groundserve, or use --on local" in done.stderr


def test_compose_file_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMPOSE_FILE of the environment comes before our own overlay."""
    folder = folder_at(tmp_path / "x")
    monkeypatch.delenv("COMPOSE_FILE", raising=False)
    usual = project_of(made(), folder, LOOPBACK, "groundserve-x").command("ps", overlays=[tmp_path / "ours.json"])
    files = [usual[at + 1] for at, word in enumerate(usual) if word == "-f"]
    assert [Path(file).name for file in files] == ["compose.yaml", "compose.cpu.yaml", "ours.json"]
    on_gpus = project_of(made(gpus=1), folder, LOOPBACK, "groundserve-x").command("ps")
    assert [Path(word).name for word in on_gpus if word.endswith(".yaml")] == ["compose.yaml"]
    monkeypatch.setenv("COMPOSE_FILE", "compose.yaml:mine.yaml")
    mine = project_of(made(), folder, LOOPBACK, "groundserve-x").command("ps")
    assert [Path(word).name for word in mine if word.endswith(".yaml")] == ["compose.yaml", "mine.yaml"]


# What a controller left


def test_a_service_comes_up_again_where_it_was_left() -> None:
    left = desired(engine="compose", is_left=True, listen="127.0.0.1:1234", admin="127.0.0.1:1235")
    same = AddressFlags("127.0.0.1:1234")
    assert choose_addresses(AddressFlags(), left) == Addresses("127.0.0.1:1234", "127.0.0.1:1235")
    assert choose_addresses(same, left).listen == "127.0.0.1:1234", "its own port is not in its way"
    another = choose_addresses(AddressFlags("127.0.0.1:0"), left)
    assert another.listen != "127.0.0.1:1234", "unless another is asked for"


def test_a_service_comes_up_again_on_the_engine_that_runs_it(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    with folder.claim():
        folder.write_desired(desired(engine="compose", is_left=True))
    assert choose_engine("auto", made(), folder).name == "compose"
    with pytest.raises(ConfigError, match="x serves on without its controller, on compose: groundserve down x ends it"):
        choose_engine("local", made(), folder)


# A Docker that is silent, or away for a while


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stub of tests/operate/docker_stub.py; a file `silent` or `away` in this folder makes it so."""
    (tmp_path / "containers").mkdir()
    (tmp_path / "docker").symlink_to(docker_stub.__file__)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_STUB", str(tmp_path / "containers"))
    yield tmp_path
    for name in ("silent", "away"):
        (tmp_path / name).unlink(missing_ok=True)
    for path in (tmp_path / "containers").iterdir():
        docker_stub.kill(json.loads(path.read_text()))


def engine_at(path: Path) -> ComposeEngine:
    engine = ComposeEngine(folder_at(path))
    engine.prepare(made(), AddressFlags("127.0.0.1:0", "127.0.0.1:0"))
    return engine


def forget(engine: ComposeEngine) -> None:
    """Makes it look as if the starts of its replicas had raised."""
    for replica in engine._replicas.values():
        replica.following.cancel()
    engine._replicas.clear()


def containers(docker: Path) -> list[dict[str, Any]]:
    return docker_stub.containers(name_of(ServiceFolder(docker, "x")), "replica", docker / "containers")


def test_a_replica_under_a_docker_that_is_away_is_not_gone(docker: Path) -> None:
    """It runs on under live-restore, so another in its place would want its GPU too."""

    async def work() -> None:
        engine = engine_at(docker / "x")
        await engine.start(1, made())
        (docker / "away").touch()
        listing = await until(lambda: (one := engine.running()[1]).reason and one, within=PATIENCE)
        assert "it is unknown whether it runs: Cannot connect to the Docker daemon" in listing.reason
        assert "since" in listing.reason
        assert engine.ended() == ()
        with pytest.raises(CannotStart, match="Cannot connect"):
            await engine.start(2, made())
        with pytest.raises(CannotStart, match="Cannot connect"):
            await engine.stop(1, 0)
        (docker / "away").unlink()
        await until(lambda: not engine.running()[1].reason, within=PATIENCE)
        await engine.start(2, made())
        assert len(containers(docker)) == 2
        (second,) = (one for one in containers(docker) if one["labels"]["groundserve.id"] == "2")
        docker_stub.kill(second)
        await until(lambda: len(engine.running()) == 1, within=PATIENCE)
        assert len(engine.ended()) == 1
        await asyncio.gather(*(engine.stop(id, 0) for id in engine.running()))

    asyncio.run(work())


def test_a_docker_that_is_silent_is_not_waited_for(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "ANSWER", 0.5)
    monkeypatch.setattr(project, "WORK", 0.5)

    async def work() -> None:
        engine = ComposeEngine(folder_at(docker / "x"))
        engine._prepared = project_of(made(), folder_at(docker / "x"), LOOPBACK, name_of(folder_at(docker / "x")))
        (docker / "silent").touch()
        with pytest.raises(CannotStart, match="Docker does not answer within 0 s"):
            await engine.start(1, made())
        with pytest.raises(CannotStart, match="Docker does not answer"):
            await engine.found()
        assert not project.has_docker()
        with pytest.raises(ConfigError, match="x: Docker does not answer"):
            engine.take_down()

    asyncio.run(work())


def test_a_start_that_seemed_to_fail_leaves_no_second_replica(docker: Path) -> None:
    """Docker fell silent after it had started, or created, the container."""

    async def work() -> None:
        engine = engine_at(docker / "x")
        await engine.start(1, made())
        forget(engine)
        await engine.start(1, made())
        assert len(containers(docker)) == 1
        assert engine.running().keys() == {1}
        docker_stub.kill(containers(docker)[0])
        await until(lambda: not engine.running() and not containers(docker), within=PATIENCE)
        await engine.start(2, made())
        forget(engine)
        docker_stub.kill(containers(docker)[0])
        await engine.start(3, made())
        assert [one["labels"]["groundserve.id"] for one in containers(docker)] == ["3"]
        await engine.stop(3, 0)

    asyncio.run(work())


def test_what_nobody_starts_again_is_removed(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker fell silent after it had started the container, and a replica less is wanted by now."""
    monkeypatch.setattr(compose_engine, "_LOOK", 0.1)

    async def work() -> None:
        engine = engine_at(docker / "x")
        await engine.found()
        await engine.start(1, made())
        await engine.start(2, made())
        engine._replicas.pop(2).following.cancel()
        (docker / "away").touch()
        with pytest.raises(CannotStart):
            await engine.start(2, made())
        (docker / "away").unlink()
        await until(lambda: [one["labels"]["groundserve.id"] for one in containers(docker)] == ["1"], within=PATIENCE)
        await engine.stop(1, 0)
        await engine.close()

    asyncio.run(work())


def test_finding_out_again_follows_each_replica_once(docker: Path) -> None:
    """Where Docker did not remove what had ended, the controller asks again what there is."""

    async def work() -> None:
        first = engine_at(docker / "x")
        for id in (1, 2, 3):
            await first.start(id, made())
        forget(first)
        docker_stub.kill(containers(docker)[1])
        (docker / "busy").touch()
        engine = engine_at(docker / "x")
        with pytest.raises(CannotStart, match="already in progress"):
            await engine.found()
        following = {id: replica.following for id, replica in engine._replicas.items()}
        assert len(following) == 1
        (docker / "busy").unlink()
        found = await engine.found()
        assert len(found) == len(containers(docker)) == 2
        assert {survivor.id for survivor in found} == engine.running().keys() > following.keys()
        assert all(engine._replicas[id].following is task for id, task in following.items())
        await asyncio.gather(*(engine.stop(id, 0) for id in engine.running()))
        await engine.close()
        assert (engine.ended(), containers(docker)) == ((), [])

    asyncio.run(work())


def test_the_next_controller_knows_that_a_replica_fetches(docker: Path) -> None:
    """Docker tells all that a container has printed, and the log begins anew with each controller."""
    said = "fetching a/b: 12 GB of 140 GB"
    (docker / "said").write_text(f"replica: {said}\n")

    async def work() -> None:
        first = engine_at(docker / "x")
        await first.start(1, made())
        await until(lambda: first.running()[1].state is State.FETCHING, within=PATIENCE)
        forget(first)
        folder_at(docker / "x").claim().close()
        engine = engine_at(docker / "x")
        await engine.found()
        listing = await until(lambda: (one := engine.running()[1]).reason and one, within=PATIENCE)
        assert (listing.state, listing.reason) == (State.FETCHING, said)
        await engine.stop(1, 0)
        await engine.close()

    asyncio.run(work())


def test_a_replica_of_an_earlier_image_is_said(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of an image says little: it stands for another one after each build."""
    monkeypatch.setattr(compose_engine, "_LOOK", 0.1)

    async def work() -> None:
        engine = engine_at(docker / "x")
        await engine.found()
        await engine.start(1, made())
        await until(lambda: engine._images, within=PATIENCE)
        assert engine.running()[1].reason == ""
        (docker / "built").write_text("sha256:second")
        listing = await until(lambda: (one := engine.running()[1]).reason and one, within=PATIENCE)
        assert listing.reason == (
            "it runs image first, and groundserve/replica:latest is second by now: groundserve restart x replaces it"
        )
        await engine.start(2, made())
        assert engine.running()[2].reason == "", "each start takes the one of the moment"
        await asyncio.gather(*(engine.stop(id, 0) for id in (1, 2)))
        await engine.close()

    asyncio.run(work())


def test_no_file_keeps_a_secret(docker: Path) -> None:
    """Whether a replica could be started or not: its overlay with its envs goes when Compose has read it."""

    async def work() -> None:
        engine = engine_at(docker / "x")
        await engine.start(1, made(more="envs: {HF_TOKEN: s3cr3t}"))
        with pytest.raises(CannotStart):
            await engine.start(2, made("sglang serve --model-path a/BROKEN", more="envs: {HF_TOKEN: s3cr3t}"))
        files = [path for path in (docker / "x").rglob("*") if path.is_file()]
        assert not [path for path in files if b"s3cr3t" in path.read_bytes()]
        await engine.stop(1, 0)

    asyncio.run(work())


def test_replicas_come_back_after_a_reboot(docker: Path) -> None:
    """The balancer's container returns by itself, the replicas with the controller, which alone starts them."""

    async def work() -> None:
        before = engine_at(docker / "x")
        await before.start(1, made())
        assert replica_overlay(1, made(), ())["services"]["replica"]["restart"] == "no"
        forget(before)
        for one in containers(docker):
            docker_stub.kill(one)
        after = engine_at(docker / "x")
        assert await after.found() == ()
        assert containers(docker) == [], "what ended with the machine is in nobody's way"
        await after.start(1, made())
        assert len(containers(docker)) == 1
        await after.stop(1, 0)

    asyncio.run(work())
