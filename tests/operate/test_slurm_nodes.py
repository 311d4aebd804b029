"""Which nodes count as lost: those that are silent while others answer, and those of which Slurm says so."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping

import pytest

from balancer.operate.engines.slurm import nodes
from balancer.operate.engines.slurm.batch import Place
from balancer.operate.engines.slurm.cluster import Cluster, Silent
from balancer.operate.engines.slurm.nodes import HostWatch, Nodes
from tests.support.until import until

# Nobody listens there, so it refuses: a host that is there. To connect to the other fails at once, on this side.
THERE, NO_WAY = "127.0.0.2", "255.255.255.255"
TRIES = nodes._TRIES + 1
_is_here = nodes._is_here


class SomeCluster(Cluster):
    """A Slurm that says this of its nodes, and counts how often it is asked."""

    def __init__(self, there: Mapping[str, str] | None, state: str = "MIXED") -> None:
        super().__init__("groundserve-x")
        self.state, self.asked = state, 0
        self._there = there

    async def addresses(self) -> dict[str, str]:
        self.asked += 1
        if self._there is None:
            raise Silent("nobody answers")
        return dict(self._there)

    async def state_of(self, node: str) -> str:
        return self.state


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """localhost is this host; every other address of the loopback is another."""
    monkeypatch.setattr(nodes, "_CONNECT", 0.2)
    monkeypatch.setattr(nodes, "_BETWEEN", 0.0)
    monkeypatch.setattr(nodes, "_is_here", lambda address: address in ("127.0.0.1", "::1"))


@contextlib.asynccontextmanager
async def silent_place(node: str) -> AsyncIterator[Place]:
    """Where nobody answers: its one place in the queue of connections is taken."""
    with socket.socket() as listening, socket.socket() as first:
        listening.bind(("127.0.0.3", 0))
        listening.listen(0)
        address, port = listening.getsockname()
        first.connect((address, port))
        yield Place(node, address, port)


async def looked(watch: HostWatch, place: Place, times: int = TRIES) -> str:
    """What is lost after so many looks."""
    for _ in range(times):
        if watch.may_look:
            watch.look([place], is_serving=False)
            await until(lambda: watch.may_look or watch.lost)
    watch.close()
    return watch.lost


async def answered_once(cluster: Cluster) -> HostWatch:
    watch = HostWatch(Nodes(cluster), asyncio.Event())
    assert await looked(watch, Place("h1", THERE, free_port()), times=1) == ""
    assert watch._has_answered
    return watch


def free_port() -> int:
    with socket.socket() as once:
        once.bind((THERE, 0))
        return int(once.getsockname()[1])


def test_a_network_of_our_own_that_is_away_loses_no_node() -> None:
    async def work() -> None:
        watch = await answered_once(SomeCluster({"h2": THERE}))
        assert await looked(watch, Place("h1", NO_WAY, 20000)) == ""

    asyncio.run(work())


@pytest.mark.parametrize(
    ("others", "state", "lost"),
    [
        ({"h2": THERE}, "MIXED", "h1 does not answer"),
        ({"h2": "localhost", "h1": THERE}, "MIXED", ""),
        ({"h2": "127.0.0.3"}, "MIXED", ""),
        ({"h2": NO_WAY}, "MIXED", ""),
        (None, "", ""),
        ({}, "DOWN+NOT_RESPONDING", "Slurm says that h1 is DOWN+NOT_RESPONDING"),
    ],
    ids=["another answers", "only ourselves", "all are silent", "none can be asked", "Slurm is silent", "Slurm knows"],
)
def test_a_silent_node_is_lost_if_another_answers(others: Mapping[str, str] | None, state: str, lost: str) -> None:
    """Else it may be us who are cut off, and what runs there is not ended unless Slurm says that it is gone."""

    async def work() -> None:
        watch = await answered_once(SomeCluster(others, state))
        async with silent_place("h1") as place:
            assert await looked(watch, place) == lost

    asyncio.run(work())


def test_one_try_tells_for_all_replicas() -> None:
    """A thousand that fall silent at once must not ask Slurm a thousand times."""

    async def work() -> None:
        cluster = SomeCluster({"h2": THERE})
        ours = Nodes(cluster)
        assert all(await asyncio.gather(*(ours.hear(["h1"], 20000) for _ in range(20))))
        assert cluster.asked == 1
        assert not await ours.hear(["h2"], 20000), "it cannot speak for itself"

    asyncio.run(work())


class _Lenient(socket.socket):
    """One that may bind any address, as all may where keepalived's host sets net.ipv4.ip_nonlocal_bind."""

    def __init__(self, family: int, kind: int) -> None:
        super().__init__(family, kind)
        if family == socket.AF_INET:
            self.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND of linux/in.h


@pytest.mark.parametrize("kind", [socket.socket, _Lenient])
@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("198.51.100.1", False), ("2001:db8::1", False)],
)
def test_which_addresses_are_here(
    address: str, expected: bool, kind: type[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", kind)
    assert _is_here(address) is expected
