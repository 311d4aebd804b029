from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kubernetes.served import Served
from tests.lab.hosts import Hosts, root_with
from tests.lab.kubernetes.control_plane import NODES, PACKAGES, ControlPlane, binaries


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(root_with(PACKAGES), NODES, tmp_path_factory.mktemp("kubernetes")) as made:
        yield made


@pytest.fixture(scope="session")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane and two nodes with two GPUs each."""
    programs = binaries()
    assert programs is not None, "make kubernetes-test builds Kubernetes first"
    with ControlPlane(programs, hosts, tmp_path_factory.mktemp("control-plane")) as made:
        for name in NODES:
            made.join(name)
        made.wait_for(*NODES)
        yield made


@pytest.fixture
def served(cluster: ControlPlane, tmp_path: Path) -> Iterator[Served]:
    service = Served(cluster, tmp_path)
    yield service
    service.close()
