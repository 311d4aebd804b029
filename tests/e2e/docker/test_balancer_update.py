"""What clients see while Docker Compose replaces the balancer: Docker's port closes with the container."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from balancer.operate.engines.ports import free_ports
from tests.e2e.docker.conftest import LAB_FILES, LAB_FLAGS
from tests.e2e.docker.project import Project
from tests.e2e.docker.traffic import Outcome, ask
from tests.operate.newcomers import Newcomers, newcomers

pytestmark = pytest.mark.docker

# As docs/operations.md has it, except that nothing has changed here, so Compose has to be told.
REPLACE = ("up", "-d", "--no-deps", "--force-recreate", "balancer")
# Seconds for which nobody is let in, beyond streams that are finished first. Measured: 3 to 11, on two busy cores.
LONGEST_GAP = 30.0
STREAM = 10.0  # seconds
TOKENS = 20  # a second of stream


@pytest.fixture(scope="module")
def fixed(lab_images: Project) -> Iterator[Project]:
    """A service at a port that stays the same when its balancer is replaced."""
    assert lab_images.files == LAB_FILES
    environ = {"PORT": str(free_ports(1)[0]), "LAB_FLAGS": LAB_FLAGS, "REPLICAS": "2"}
    environ["BALANCER_SET"] = "max_connections_per_client=10000"
    project = Project("groundserve-test-replace", LAB_FILES, environ)
    project.up()
    yield project
    project.down()


def gap(seen: Newcomers) -> float:
    """Seconds from the first client that was turned away to the first one after the last such."""
    failed = [one.began for one in seen.all if one.outcome != "200"]
    assert failed, "Docker closes the port"
    return min(one.began for one in seen.all if one.began > max(failed)) - min(failed)


def test_replacing_an_idle_balancer(fixed: Project) -> None:
    """Clients are turned away for as long as a container takes to go and another one to come."""
    with newcomers(fixed.url()) as seen:
        fixed.compose(*REPLACE)
        seen.until_more_are_answered()
    took = gap(seen)
    print(f"turned away for {took:.1f} s: {seen.outcomes()}")
    assert took < LONGEST_GAP
    assert {outcome for outcome in seen.outcomes() if outcome.isdigit()} == {"200"}


def test_replacing_a_balancer_amid_a_stream(fixed: Project) -> None:
    """The stream is finished first, and clients are turned away meanwhile."""

    async def replace() -> tuple[Outcome, Newcomers]:
        async with httpx.AsyncClient(base_url=fixed.url(), timeout=60) as client:
            outcome = Outcome()
            stream = asyncio.create_task(ask(client, outcome, tokens=int(STREAM * TOKENS)))
            async with asyncio.timeout(10):
                while not outcome.tokens:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            with newcomers(fixed.url()) as seen:
                await asyncio.to_thread(fixed.compose, *REPLACE)
                await asyncio.to_thread(seen.until_more_are_answered)
            return await stream, seen

    outcome, seen = asyncio.run(replace())
    took = gap(seen)
    print(f"turned away for {took:.1f} s: {seen.outcomes()}")
    assert outcome.is_whole(tokens=int(STREAM * TOKENS)), outcome
    assert took < STREAM + LONGEST_GAP
