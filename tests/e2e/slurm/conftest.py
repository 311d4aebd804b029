from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.slurm.served import Served
from tests.lab.slurm import SlurmLab
from tests.support.until import wait_until


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """One controller and two nodes, or as many as the module's NODES, with three GPUs each."""
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)  # for the lab's ordinary user
    with SlurmLab(folder, getattr(request.module, "NODES", 2), {"KillWait": 5}) as lab:
        yield lab


@pytest.fixture
def served(slurm: SlurmLab, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A service with the name of the test; at its end it is down, and no job is left."""
    service = Served(slurm, request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-"))
    yield service
    service("down", service.name, code=None)
    wait_until(service.jobs, service.queue, 90, fits=lambda jobs: not jobs)
