"""GPU leases across containers and projects. The GPUs are pretended; the program, the locks and the kernel are not."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from tests.e2e.docker.conftest import LAB_FILES
from tests.e2e.docker.project import Container, Project, docker
from tests.support.until import wait_until

pytestmark = pytest.mark.docker

# Two projects on one machine share its leases.
FOUR_GPUS = {"LEASE_VOLUME": "groundserve-test-lease", "PRETEND_GPUS": "4", "LEASE_WAIT": "3"}
REFUSAL = re.compile(r"^replica: no .+ free among this machine's 4 after 3 s \((.+)\): .+$", re.MULTILINE)


@pytest.fixture
def projects(lab_images: Project) -> Iterator[list[Project]]:
    """Two projects on one machine of four pretended GPUs; nothing runs yet."""
    assert lab_images.files == LAB_FILES
    both = [Project(f"groundserve-test-{name}", LAB_FILES, FOUR_GPUS) for name in ("a", "b")]
    for project in both:
        project.down()
    yield both
    for project in both:
        project.down()


def start(project: Project, replicas: int, **environ: str) -> None:
    project.compose("up", "-d", "--no-recreate", "--no-deps", "--scale", f"replica={replicas}", "replica", **environ)


def held(container: Container) -> list[str]:
    """The GPUs that a container leased when it last started, as its SGLang sees them; none while it waits."""
    state = container.again().facts["State"]
    said = re.search(r"^lab: GPUs ([\d,]+);", docker("logs", "--since", state["StartedAt"], container.id), re.MULTILINE)
    return said[1].split(",") if said and state["Running"] else []


def serving(projects: list[Project], count: int) -> dict[str, list[str]]:
    """Waits until `count` containers hold GPUs: each container's id and its GPUs."""

    def look() -> dict[str, list[str]]:
        found = {one.id: held(one) for project in projects for one in project.containers()}
        holding = {name: gpus for name, gpus in found.items() if gpus}
        return holding if len(holding) == count else {}

    return wait_until(look, f"{count} replicas with a lease")


def test_replicas_of_two_projects_lease_each_a_gpu_of_its_own(projects: list[Project]) -> None:
    for project in projects:
        start(project, 2)
    gpus = serving(projects, 4)
    assert sorted(gpus.values()) == [["0"], ["1"], ["2"], ["3"]]

    listed = projects[0].compose("run", "--rm", "--no-deps", "-T", "replica", "--list-gpus")
    holders = [gpu["held_by"] for gpu in json.loads(listed)]
    assert len(holders) == 4
    for name in gpus:
        assert sum(name[:12] in holder for holder in holders) == 1, "each holder is named by its container"


def test_surplus_replica(projects: list[Project]) -> None:
    """A surplus replica says who holds the GPUs, and takes the first that becomes free."""
    first, second = projects
    start(first, 4)
    gpus = serving(projects, 4)
    start(second, 1)
    (surplus,) = second.containers()
    said = wait_until(lambda: REFUSAL.search(surplus.logs()), "a line that says why", 20)
    assert all(name[:12] in said[1] for name in gpus), "it names every holder"
    assert said[0].count("\n") == 0

    # It comes back after each vain wait, and no faster.
    before, since = surplus.again().restarts, time.monotonic()
    wait_until(lambda: surplus.again().restarts >= before + 2, "it tries again", 30)
    assert time.monotonic() - since > 3, "two more starts are a whole wait apart"

    victim, freed = next(iter(gpus.items()))
    docker("kill", "--signal", "KILL", victim)
    # A restart's pause, which Docker makes longer and longer, and a look at the locks.
    assert wait_until(lambda: held(surplus), "the surplus replica has the freed GPU", 60) == freed


def test_a_crashed_replica_is_started_again_and_leases_again(projects: list[Project]) -> None:
    project = projects[0]
    start(project, 4)
    gpus = serving(projects, 4)
    crashing = project.containers()[1]
    kill = (
        "import os, signal\n"
        "for one in map(int, filter(str.isdigit, os.listdir('/proc'))):\n"
        "    if one != os.getpid() and b'tests.lab.replica' in open(f'/proc/{one}/cmdline', 'rb').read():\n"
        "        os.kill(one, signal.SIGKILL)\n"
    )
    docker("exec", "--detach", crashing.id, "python3", "-c", kill)
    wait_until(lambda: crashing.again().restarts == 1 and crashing.logs().count("lab: GPUs") == 2, "it serves again")
    assert held(crashing) == gpus[crashing.id], "the one GPU that was free"
    assert len({gpu for one in serving(projects, 4).values() for gpu in one}) == 4


def test_two_gpus_a_replica_are_neighbours_and_all_or_nothing(projects: list[Project]) -> None:
    first, second = projects
    start(second, 1)
    assert list(serving(projects, 1).values()) == [["0"]]
    start(first, 2, GPUS_PER_REPLICA="2")
    gpus = serving(projects, 2)
    assert ["2", "3"] in gpus.values(), "not 1 and 2, though both are free"
    (pair,) = [name for name, found in gpus.items() if found == ["2", "3"]]
    assert "lab: GPUs 2,3; tensor parallel size 2" in docker("logs", pair)
    (waiting,) = [one for one in first.containers() if one.id != pair]
    said = wait_until(lambda: REFUSAL.search(waiting.logs()), "a line that says why", 20)
    assert "GPU 1: free" in said[1], "half a pair is not held"
