"""One address in front of two balancers on two hosts: keepalived moves it when a balancer or its host dies."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.lab.hosts import HERE, ROOT, Host, Hosts, root_with
from tests.support.program import Program
from tests.support.until import wait_until

pytestmark = [pytest.mark.failover, pytest.mark.timeout(600)]

ADDRESS = "10.77.0.100"
URL = f"http://{ADDRESS}:30001"
PACKAGES = ("keepalived", "curl")
NAMES = ("b1", "b2")
# Seconds for which clients of the address may be without an answer.
MOST = 3.0
PYTHON = str(ROOT / ".venv/bin/python")


@dataclass
class Client:
    """Asks for /ready again and again: who answered, and the longest time from one answer to the next."""

    gap: float = 0.0
    last: float = field(default_factory=time.monotonic)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.is_over.is_set():
            is_there = is_reached()
            now = time.monotonic()
            if is_there:
                self.gap, self.last = max(self.gap, now - self.last), now
            time.sleep(0.02)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(root_with(PACKAGES), NAMES, tmp_path_factory.mktemp("failover")) as made:
        for name in NAMES:
            write_configuration(made, name)
        yield made


@pytest.fixture(scope="module")
def replica() -> Iterator[Program]:
    program = Program("-m", "tests.lab.replica", "--host", HERE, "--tokens", "100", "--token-interval", "0.05")
    yield program
    program.close()


def told(replica: Program, word: str) -> str:
    """Its address (`ready`), or that of its control port (`control`)."""
    lines = wait_until(replica.lines, fits=lambda lines: any(line.startswith("ready ") for line in lines))
    return next(line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} "))


def write_configuration(hosts: Hosts, name: str) -> None:
    """The project's files, with what they tell people to change."""
    other = hosts[next(one for one in NAMES if one != name)]
    text = (ROOT / "docker/keepalived/keepalived.conf").read_text()
    text = text.replace("192.0.2.12", other.address).replace("192.0.2.100", ADDRESS)
    hosts[name].write("/etc/keepalived/keepalived.conf", text)
    hosts[name].write("/etc/keepalived/ready.sh", (ROOT / "docker/keepalived/ready.sh").read_text(), 0o755)


class Pair:
    """What runs on the two hosts."""

    def __init__(self, hosts: Hosts, replica: str, folder: Path) -> None:
        self._hosts = hosts
        self._replica = replica
        self._folder = folder

    def start(self, host: Host) -> None:
        self.start_balancer(host)
        host.start("keepalived", "--dont-fork", "--log-console", log=self._folder / f"{host.name}-keepalived.log")

    def start_balancer(self, host: Host) -> None:
        flags = ("--open", "--listen", "0.0.0.0:30001", "--admin", "127.0.0.1:30002", "--replica", self._replica)
        command = ("env", "-C", str(ROOT), PYTHON, "-m", "balancer", *flags, "--set", "ready_interval=0.2")
        host.start(*command, log=self._folder / f"{host.name}-balancer.log")

    def kill_balancer(self, host: Host) -> None:
        host.run("pkill", "-KILL", "-f", "balancer --open")

    def holder(self) -> Host | None:
        """Who has the address."""
        for name in NAMES:
            if f"{ADDRESS}/" in self._hosts[name].run("ip", "-4", "addr", "show", "eth0", code=None):
                return self._hosts[name]
        return None

    def other(self, host: Host) -> Host:
        return next(self._hosts[name] for name in NAMES if name != host.name)

    def until_ready(self, host: Host) -> None:
        wait_until(
            lambda: host.run("curl", "-fs", "http://127.0.0.1:30001/ready", code=None), fits=lambda said: "ok" in said
        )


@pytest.fixture(scope="module")
def pair(hosts: Hosts, replica: Program, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = Pair(hosts, told(replica, "ready"), tmp_path_factory.mktemp("logs"))
    for name in NAMES:
        made.start(hosts[name])
    for name in NAMES:
        made.until_ready(hosts[name])
    wait_until(made.holder)
    wait_until(is_reached)
    return made


def is_reached() -> bool:
    return status_of(f"{URL}/ready") == 200


def status_of(url: str, within: float = 0.3) -> int:
    """0 without an answer."""
    try:
        return httpx.get(url, timeout=within).status_code
    except httpx.HTTPError:
        return 0


class Watched:
    """`with Watched() as client:` a client asks all the time."""

    def __enter__(self) -> Client:
        self._client = Client()
        self._thread = threading.Thread(target=self._client.run)
        self._thread.start()
        return self._client

    def __exit__(self, *_: object) -> None:
        began = time.monotonic()
        wait_until(lambda: self._client.last > began)
        self._client.is_over.set()
        self._thread.join()


def test_the_address_moves_when_a_balancer_dies(pair: Pair) -> None:
    """Within three seconds, and it stays where it is when that one is back. A stream through the dead one is lost."""
    before = wait_until(pair.holder)
    assert before is not None
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with Watched() as client, httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        pair.kill_balancer(before)
        with pytest.raises(httpx.HTTPError):
            list(lines)
        wait_until(pair.holder, fits=lambda host: host is pair.other(before))
    assert client.gap <= MOST
    pair.start_balancer(before)
    pair.until_ready(before)
    with Watched() as client:
        time.sleep(2 * MOST)  # nothing is to happen
    assert pair.holder() is pair.other(before)
    assert client.gap <= 1


def test_the_address_stays_where_no_balancer_is_better(pair: Pair, replica: Program) -> None:
    """Without a replica both are not ready, and yet clients reach one."""
    before = pair.holder()
    knobs = f"{told(replica, 'control')}/lab/knobs"
    httpx.post(knobs, json={"refuse": True}).raise_for_status()
    wait_until(lambda: status_of(f"{URL}/ready"), fits=lambda code: code == 503)
    give_up = time.monotonic() + 2 * MOST
    while time.monotonic() < give_up:
        assert (status_of(f"{URL}/ready", 10), pair.holder()) == (503, before)
    httpx.post(knobs, json={"refuse": False}).raise_for_status()
    wait_until(is_reached)
    assert pair.holder() is before


def test_the_address_moves_when_a_host_dies(pair: Pair) -> None:
    before = wait_until(pair.holder)
    assert before is not None
    with Watched() as client:
        before.power_off()
        wait_until(lambda: client.last > time.monotonic() - 0.1 and client.gap > 0.3)
    assert client.gap <= MOST
    before.power_on()
    pair.start(before)
    pair.until_ready(before)
