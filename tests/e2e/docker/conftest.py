"""Builds the images once, and starts the projects that several tests share."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.docker.project import Project, docker

# Twenty tokens a second, and what DNS shows a while before it can answer.
LAB_FLAGS = "--start-delay 1 --warm-up 1 --token-interval 0.05"
LAB_FILES = ("compose.yaml", "tests/e2e/docker/compose.lab.yaml")
CPU_FILES = ("compose.yaml", "docker/compose.cpu.yaml")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # The first to ask for an image builds it; first in the list is the one that counts.
            item.add_marker(pytest.mark.timeout(1500), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what the containers said, which are gone when a person comes to look."""
    report = yield
    if report.failed and Path(__file__).parent in item.path.parents:
        ids = docker("ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project").split()
        for id in ids:
            name = docker("inspect", "--format", "{{.Name}}: {{.State.Status}}, {{.RestartCount}} restarts", id).strip()
            report.sections.append((f"docker logs {name}", docker("logs", "--timestamps", "--tail", "40", id)))
    return report


def build_lab(project: Project, version: int = 1) -> None:
    """Builds the balancer, and docker/replica.Dockerfile upon the lab's replica; another version is another image.

    Compose labels an image with the project that built it, so the same project must build what is to stay the same.
    """
    project.compose("build", "balancer")
    project.compose("--profile", "build", "build", "lab", LAB_VERSION=str(version))
    project.compose("build", "replica")


@pytest.fixture(scope="session")
def lab_images() -> Iterator[Project]:
    """The project that builds the images of the lab; it starts nothing."""
    project = Project("groundserve-test-build", LAB_FILES)
    build_lab(project)
    yield project
    project.down()


@pytest.fixture(scope="session")
def cpu_images() -> Iterator[Project]:
    """The project that builds the images of real SGLang on a CPU; it starts nothing."""
    project = Project("groundserve-test-build", CPU_FILES)
    project.compose("build", "balancer")
    project.compose("build", "replica", timeout=1400)
    yield project
    project.down()


@pytest.fixture(scope="session")
def running_lab(lab_images: Project) -> Iterator[Project]:
    assert lab_images.files == LAB_FILES
    project = Project("groundserve-test-lab", LAB_FILES, {"REPLICAS": "2", "LAB_FLAGS": LAB_FLAGS})
    project.up()
    yield project
    project.down()


@pytest.fixture
def lab(running_lab: Project) -> Project:
    """A balancer and two lab replicas, ready, whatever the test before did to them."""
    for one in running_lab.containers():
        if not one.is_healthy:
            docker("rm", "--force", one.id)
    running_lab.scale(2)
    return running_lab
