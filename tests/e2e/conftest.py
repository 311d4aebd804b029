"""Two real SGLang replicas on the CPU and the balancer in front, started once; one more that sees, when asked for."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer.operate.engines.ports import free_ports
from replica.options import models_dir
from tests.e2e.running import Balancer, Replica
from tests.support.program import ROOT, Program

# Variables that are meant for others, in which a replica has to come up all the same: a proxy that nobody answers at; a
# home and a temporary folder that take no files, a language of one byte a letter, warnings that are errors.
NO_PROXY_THERE = "http://127.0.0.1:9"
SURROUNDINGS = (
    dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"), NO_PROXY_THERE),
    {"HOME": "/proc", "TMPDIR": "/no/such", "LC_ALL": "en_US.ISO-8859-1", "PYTHONWARNINGS": "error"},
)
STORE = "--enable-response-store"  # for what builds on earlier answers of /v1/responses

_started: list[Program] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.timeout(600))  # the first to ask starts replicas, and may make their models
    # Sorting is stable: only tests that end replicas move, to the end.
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and Path(__file__).parent in item.path.parents:
        for program in _started:
            report.sections.append((f"end of the log of {program.name}", program.tail()))
    return report


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def models() -> str:
    """The folder of the embedded models; made here, for the surroundings of some replicas let nothing be downloaded."""
    subprocess.run([sys.executable, "-m", "replica.models", "smollm2-135m", "tiny-llava"], cwd=ROOT, check=True)
    return str(models_dir(os.environ))


@pytest.fixture(scope="session")
def pair(models: str, logs: Path) -> Iterator[list[Replica]]:
    replicas = [
        Replica("smollm2-135m", port, logs / f"smollm2-{n}.log", MODELS_DIR=models, SGLANG_ARGS=STORE, **around)
        for n, (port, around) in enumerate(zip(free_ports(2), SURROUNDINGS, strict=True), 1)
    ]
    _started.extend(replicas)
    try:
        for replica in replicas:
            replica.wait_ready()
        yield replicas
    finally:
        for replica in replicas:
            replica.close()


@pytest.fixture
def replicas(pair: list[Replica]) -> list[Replica]:
    """Two replicas of smollm2-135m, both ready whatever the test before did to them."""
    for replica in pair:
        if replica.process.poll() is not None:
            replica.restart()
    for replica in pair:
        replica.wait_ready()
    return pair


@pytest.fixture(scope="session")
def in_front(pair: list[Replica], logs: Path) -> Iterator[Balancer]:
    balancer = Balancer(logs / "balancer.log", pair)
    _started.append(balancer)
    yield balancer
    balancer.close()


@pytest.fixture
def balancer(in_front: Balancer, replicas: list[Replica]) -> Balancer:
    """The balancer in front of both replicas, which it has found ready."""
    assert replicas
    in_front.wait_all_ready()
    return in_front


@pytest.fixture
def endpoint(balancer: Balancer) -> str:
    return balancer.url


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key of the replica that sees."""
    file = tmp_path_factory.mktemp("key") / "replica.key"
    file.write_text(f"sk-{secrets.token_hex(16)}\n")
    return file


@pytest.fixture(scope="session")
def tiny_llava(models: str, logs: Path, key_file: Path) -> Iterator[Replica]:
    """One replica that sees, that wants a key of its clients, and that may fetch images from 127.0.0.1."""
    allowed = {"ALLOW_PRIVATE_MEDIA": "1", "ALLOWED_MEDIA_DOMAINS": "127.0.0.1"}
    log = logs / "tiny-llava.log"
    replica = Replica(
        "tiny-llava", *free_ports(1), log, SGLANG_API_KEY_FILE=str(key_file), MODELS_DIR=models, **allowed
    )
    _started.append(replica)
    try:
        replica.wait_ready()
        yield replica
    finally:
        replica.close()


@pytest.fixture(scope="session")
def in_front_of_eyes(tiny_llava: Replica, key_file: Path, logs: Path) -> Iterator[Balancer]:
    """A balancer in front of it, which holds the key."""
    balancer = Balancer(logs / "balancer-eyes.log", [tiny_llava], "--replica-key", str(key_file))
    _started.append(balancer)
    balancer.wait_all_ready()
    yield balancer
    balancer.close()


@pytest.fixture
def eyes(in_front_of_eyes: Balancer) -> str:
    """Its endpoint."""
    return in_front_of_eyes.url
