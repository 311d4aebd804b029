"""`groundserve up --on compose`: the same commands, on containers that outlive the command."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from balancer.operate.engines.compose.project import name_of
from balancer.operate.state.service_folder import ServiceFolder
from tests.e2e.docker.conftest import CPU_FILES, LAB_FILES, build_lab
from tests.e2e.docker.project import ROOT, TAG, Project, docker
from tests.operate.command_line import Groundserve
from tests.operate.test_update import CHAT, streaming
from tests.support.until import wait_until

pytestmark = pytest.mark.docker

NAME = "test-engine"
LEASES = {"LEASE_VOLUME": "groundserve-test-engine-leases"}
FLAGS = "--start-delay 0.5 --token-interval 0.03"
RUN = "python -m replica --model lab/lab"


def project_of(command: Groundserve) -> str:
    return name_of(ServiceFolder(command.folder / "state/groundserve", NAME))


class OnCompose(Groundserve):
    """groundserve with the images of the lab, and eight pretended GPUs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environ |= {"COMPOSE_FILE": ":".join(LAB_FILES), "TAG": TAG, "REPLICA_PRETEND_GPUS": "8", **LEASES}

    def file(self, replicas: int = 2, flags: str = FLAGS, more: str = "") -> Path:
        return self.service(NAME, RUN, replicas, f"envs: {{LAB_FLAGS: {json.dumps(flags)}}}\n{more}", stop_grace=10)

    def start(self, file: Path) -> str:
        return self("up", file, "--on", "compose", "-d")

    def containers(self, service: str = "replica") -> list[str]:
        """The ids of the project's containers, ended ones too."""
        labels = (f"com.docker.compose.project={project_of(self)}", f"com.docker.compose.service={service}")
        return docker(
            "ps", "-aq", "--no-trunc", *(part for one in labels for part in ("--filter", f"label={one}"))
        ).split()

    def controller(self) -> int:
        return int(json.loads((self.folder / "state/groundserve" / NAME / "lock").read_text())["pid"])

    def endpoint(self) -> str:
        return self("status", "--endpoint", NAME).strip()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.endpoint()}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.endpoint()}/v1/chat/completions", json=CHAT, timeout=60)


@pytest.fixture
def groundserve(lab_images: Project, tmp_path: Path) -> Iterator[OnCompose]:
    assert lab_images.files == LAB_FILES
    command = OnCompose(tmp_path)
    yield command
    command.stop_all()
    for service in ("replica", "balancer"):
        if left := command.containers(service):
            docker("rm", "--force", *left)
    Project(project_of(command), LAB_FILES, LEASES).down()


def test_up_scale_replace_logs_and_down_are_as_on_the_host(groundserve: OnCompose) -> None:
    said = groundserve.start(groundserve.file())
    assert f"{NAME} is up after" in said
    rows = groundserve.status(NAME)["replicas"]
    assert [(row["id"], row["infra"], row["resources"], row["status"]) for row in rows] == [
        (1, "compose", "1x pretended GPU", "READY"),
        (2, "compose", "1x pretended GPU", "READY"),
    ]
    answer = groundserve.ask()
    assert answer.status_code == 200
    assert answer.headers["x-replica-id"] in {row["name"] for row in rows}
    groundserve("scale", NAME, "3")
    status = groundserve.until(NAME, lambda status: status["service"]["ready"] == 3)
    leased = {groundserve("logs", NAME, str(row["id"])).split("lab: GPUs ")[1][0] for row in status["replicas"]}
    assert len(leased) == 3, "each its own GPU"
    groundserve("down", NAME, "--replica-id", "2", "-y")
    status = groundserve.until(
        NAME, lambda status: [row["id"] for row in status["replicas"] if row["status"] == "READY"] == [1, 3, 4]
    )
    groundserve("scale", NAME, "1")
    groundserve.until(NAME, lambda status: status["service"]["total"] == 1)
    assert len(groundserve.containers()) == 1
    assert groundserve("down", NAME) == f"{NAME} is down\n"
    assert groundserve.containers() == groundserve.containers("balancer") == []
    assert groundserve("status") == "No existing services.\n"
    groundserve.until_nothing_runs()


def test_updates_under_streams(groundserve: OnCompose) -> None:
    """Updates under streams lose nothing, and a broken version is rolled back."""
    file = groundserve.file()
    groundserve.start(file)
    balancer = groundserve.containers("balancer")
    with streaming(groundserve.endpoint()) as seen:
        better = groundserve.file(flags=f"{FLAGS} --max-running-requests 32")
        assert f"{NAME} is at version 2" in groundserve("update", NAME, better)
        broken = groundserve.file(flags="--no-such-flag")
        said = groundserve("update", NAME, broken, code=1)
        assert f"{NAME} stays at version 2: exited with code 2" in said
        assert "--no-such-flag" in said
        policy = groundserve.file(flags=f"{FLAGS} --max-running-requests 32")
        policy.write_text(policy.read_text().replace("service: {", 'service: {"load_balancing_policy": "least_load", '))
        assert f"{NAME} is at version 4" in groundserve("update", NAME, policy)
        status = groundserve.until(NAME, lambda status: status["service"]["policy"] == "least_load")
    assert seen.failed == []
    assert [(row["id"], row["version"], row["status"]) for row in status["replicas"]] == [
        (3, 4, "READY"),
        (4, 4, "READY"),
    ]
    assert groundserve.containers("balancer") == balancer, "one balancer through all of it"


def test_killed_controller(groundserve: OnCompose) -> None:
    """Replicas and balancer outlive a killed controller, and the next up finds them."""
    file = groundserve.file()
    groundserve.start(file)
    replicas, balancer = groundserve.containers(), groundserve.containers("balancer")
    with streaming(groundserve.endpoint()) as seen:
        os.kill(groundserve.controller(), signal.SIGKILL)
        groundserve.until_nothing_runs()
        before = seen.answered
        time.sleep(12)  # past the time for which an engine's list stands; then DNS alone says where they are
        assert seen.answered > before
        assert groundserve.ask().status_code == 200, "status still knows the endpoint"
        assert "its controller is gone" in groundserve("scale", NAME, "3", code=1)
        said = groundserve.start(file)
        assert f"{NAME}: found 2 of its replicas running" in said
        assert [row["id"] for row in groundserve.status(NAME)["replicas"]] == [1, 2]
    assert seen.failed == []
    assert (groundserve.containers(), groundserve.containers("balancer")) == (replicas, balancer)


def test_up_with_another_file(groundserve: OnCompose) -> None:
    """After a killed controller, up with another file is an update."""
    groundserve.start(groundserve.file())
    os.kill(groundserve.controller(), signal.SIGKILL)
    groundserve.until_nothing_runs()
    with streaming(groundserve.endpoint()) as seen:
        groundserve.start(groundserve.file(replicas=1, flags=f"{FLAGS} --max-running-requests 32"))
        status = groundserve.until(NAME, lambda status: status["service"]["total"] == 1)
    assert seen.failed == []
    assert [(row["id"], row["version"], row["status"]) for row in status["replicas"]] == [(3, 2, "READY")]


def test_secrets_and_keys(groundserve: OnCompose) -> None:
    """No secret is shown by docker inspect, though replicas have it; issued keys and usage outlive down and up."""
    run = f"{RUN} -- --api-key $MINE"
    file = groundserve.service(NAME, run, 1, "secrets: {LAB_FLAGS: , MINE: }", stop_grace=10)
    secrets = ("--secret", "LAB_FLAGS=--tokens 7", "--secret", "MINE=hush-1")
    groundserve("up", file, "--on", "compose", "-d", *secrets)
    facts = docker("inspect", *groundserve.containers())
    assert "hush" not in facts
    assert "--tokens 7" not in facts
    assert "@env:GROUNDSERVE_SECRET_1" in facts
    key = groundserve("keys", "add", "alice").splitlines()[0]
    asked = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{groundserve.endpoint()}/v1/chat/completions", json=CHAT, headers=asked, timeout=60)
    assert "t06" in answer.text
    assert "t07" not in answer.text
    wait_until(lambda: json.loads(groundserve("usage", "--by", "key", "--json")))
    groundserve("down", NAME)
    groundserve("up", file, "--on", "compose", "-d", *secrets)
    assert groundserve.ask().status_code == 401
    (used,) = json.loads(groundserve("usage", "--by", "key", "--json"))
    assert (used["key"], used["requests"]) == ("alice", 1)
    groundserve("down", NAME)


def test_an_image_that_is_built_anew(groundserve: OnCompose, lab_images: Project) -> None:
    """A replica of the earlier image is known by it, and a restart replaces it."""
    groundserve.start(groundserve.file(replicas=1))
    (before,) = groundserve.containers()
    build_lab(lab_images, version=5)
    status = groundserve.until(NAME, lambda status: "reason" in status["replicas"][0])
    image = docker("inspect", "-f", "{{.Image}}", before).strip().removeprefix("sha256:")[:12]
    assert status["replicas"][0]["reason"].startswith(f"it runs image {image}, and groundserve-test/replica:test is ")
    assert status["service"]["ready"] == 1
    groundserve("restart", NAME)
    (row,) = groundserve.until(NAME, lambda status: status["service"]["total"] == 1)["replicas"]
    assert (row["status"], row.get("reason")) == ("READY", None)
    groundserve("down", NAME)


def test_what_is_left_can_be_taken_down_without_its_controller(groundserve: OnCompose) -> None:
    groundserve.start(groundserve.file(replicas=1))
    os.kill(groundserve.controller(), signal.SIGKILL)
    groundserve.until_nothing_runs()
    assert NAME in groundserve("status")
    assert groundserve("down", NAME) == f"{NAME} is down\n"
    assert groundserve.containers() == groundserve.containers("balancer") == []
    assert groundserve("status") == "No existing services.\n"


def test_killed_replica_and_balancer(groundserve: OnCompose) -> None:
    """A killed replica is started again, and a killed balancer comes back."""
    groundserve.start(groundserve.file())
    (first, _second) = groundserve.containers()
    docker("kill", "--signal", "KILL", first)
    groundserve.until(NAME, lambda status: status["service"]["ready"] == 1)
    status = groundserve.until(NAME, lambda status: status["service"]["ready"] == 2)
    assert [row["id"] for row in status["replicas"]] == [1, 2]
    assert first not in groundserve.containers()
    (balancer,) = groundserve.containers("balancer")
    os.kill(int(docker("inspect", "-f", "{{.State.Pid}}", balancer)), signal.SIGKILL)
    wait_until(lambda: int(docker("inspect", "-f", "{{.RestartCount}}", balancer)))
    wait_until(groundserve.is_ready)
    assert groundserve.ask().status_code == 200


def test_service_that_cannot_start(groundserve: OnCompose) -> None:
    """A service that cannot start fails with the replica's own message."""
    said = groundserve("up", groundserve.file(flags="--no-such-flag"), "--on", "compose", code=1)
    assert f"{NAME} failed: exited with code 2" in said
    assert "--no-such-flag" in said
    assert groundserve.containers() == groundserve.containers("balancer") == []


@pytest.mark.parametrize(
    ("arguments", "run", "words"),
    [
        (["--admin", "0.0.0.0:0", "--open"], RUN, "published on 127.0.0.1 only"),
        (["--listen", "0.0.0.0:0"], RUN, "give --api-keys FILE, or say --open"),
        ([], "./serve.sh $GROUNDSERVE_PORT", "use --on local"),
    ],
)
def test_what_compose_cannot_do_is_refused_in_one_line(
    groundserve: OnCompose, arguments: list[str], run: str, words: str
) -> None:
    said = groundserve("up", groundserve.service(NAME, run), "--on", "compose", *arguments, code=1)
    assert words in said
    assert len(said.splitlines()) == 1
    assert groundserve.containers("balancer") == []


def test_real_sglang_comes_up_answers_and_goes_down(cpu_images: Project, tmp_path: Path) -> None:
    assert cpu_images.files == CPU_FILES
    command = Groundserve(tmp_path)
    command.environ |= {"COMPOSE_FILE": ":".join(CPU_FILES), "TAG": TAG, **LEASES}
    file = ROOT / "services/smollm2.yaml"
    try:
        up = command.up(file, "-n", NAME, "--env", "REPLICAS=1", "--on", "compose").until_up(patience=300)
        url = command("status", "--endpoint", NAME).strip()
        question = {"role": "user", "content": "Name the capital of France."}
        body = {"model": "smollm2-135m", "messages": [question], "max_tokens": 16, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
        assert up.end(signal.SIGINT) == 0
        assert f"{NAME} is down" in up.text
    finally:
        command.stop_all()
        Project(project_of(command), CPU_FILES, LEASES).down()
