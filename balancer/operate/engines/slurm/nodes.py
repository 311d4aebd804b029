"""What is known of nodes beside the queue: which do not answer, which were lost, and which are to be emptied."""

import asyncio
import contextlib
import errno
import math
import random
import socket
from collections.abc import Collection, Mapping, Sequence

from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.slurm.batch import Place
from balancer.operate.engines.slurm.cluster import Cluster, is_gone

# Seconds between two looks at which nodes are to be emptied.
_LOOK = 10.0
# A host that does not answer a replica's port: seconds that it has to, tries in a row, and between them.
_CONNECT = 2.0
_TRIES = 2
_BETWEEN = 1.0
# So many other nodes are tried, one of which has to answer: else it may be our own host that is cut off. What came of
# that holds for so many seconds, for all replicas.
_OTHERS = 8
_FRESH = 3.0
# What connecting fails with where the other host is silent; all else is some trouble of our own.
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN)
# The first of several nodes may answer the balancer when another is gone. As long as it does, the host that we are on
# may be the only one that does not reach the other: so many tries.
_TRIES_WHILE_SERVING = 5
# To ask which address of ours would be the source of what is sent; nothing is.
_ANY_PORT = 9
# Seconds for which a host that was lost gets no replica. By then Slurm knows by itself, or it is back.
_SHUNNED = 900.0


class Nodes:
    """The nodes of the cluster, as far as they are special. Times are in seconds of the event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._shunned: dict[str, float] = {}  # until when
        self._to_empty: Mapping[str, str] = {}  # why
        self._looked_at = -math.inf
        self._heard: set[str] = set()  # the other nodes that answered when they were last tried
        self._tried_at = -math.inf
        self._one_at_a_time = asyncio.Lock()

    def shun(self, names: Collection[str]) -> None:
        """No replica is to be started there for a while."""
        self._shunned |= dict.fromkeys(names, _now() + _SHUNNED)

    def shunned(self) -> list[str]:
        """What was lost first comes first."""
        return sorted((node for node, until in self._shunned.items() if until > _now()), key=self._shunned.__getitem__)

    async def look(self) -> None:
        """Asks Slurm now and then which nodes are to be emptied. Raises Silent."""
        if _now() - self._looked_at >= _LOOK:
            self._to_empty = await self._cluster.nodes_to_empty()
            self._looked_at = _now()

    def why_to_move(self, there: Collection[Place]) -> str:
        """Slurm lets a job on a drained node run on, for ever where it has no time limit. Empty if none is drained."""
        return next((self._to_empty[place.node] for place in there if place.node in self._to_empty), "")

    async def state_of(self, node: str) -> str:
        async with self._one_at_a_time:
            return await self._cluster.state_of(node)

    async def hear(self, silent: Collection[str], port: int) -> bool:
        """Does any node but these answer us? It need not listen on the port, which is one that we may reach."""
        async with self._one_at_a_time:
            if _now() - self._tried_at >= _FRESH:
                self._heard = await self._answering(silent, port)
                self._tried_at = _now()
            return not self._heard <= set(silent)

    async def _answering(self, silent: Collection[str], port: int) -> set[str]:
        there: dict[str, str] = {}
        with contextlib.suppress(CannotStart):  # if Slurm is silent, too, we may well be cut off
            there = await self._cluster.addresses()
        others = [(node, address) for node, address in there.items() if node not in silent]
        others = random.sample(others, min(_OTHERS, len(others)))
        answers = await asyncio.gather(*(_answers_from_elsewhere(node, address, port) for node, address in others))
        return {node for (node, _), answer in zip(others, answers, strict=True) if answer}


class HostWatch:
    """Whether all hosts of one replica are there. `lost` says which is not; `changed` is set once that is certain."""

    def __init__(self, nodes: Nodes, changed: asyncio.Event) -> None:
        self.lost = ""
        self._nodes = nodes
        self._changed = changed
        self._has_answered = False
        self._misses = 0
        self._looking: asyncio.Task[None] | None = None

    @property
    def may_look(self) -> bool:
        """Not while a look is under way, nor once it is lost."""
        return not self.lost and (self._looking is None or self._looking.done())

    def look(self, there: Sequence[Place], is_serving: bool) -> None:
        """Looks at them, without being waited for."""
        self._looking = asyncio.create_task(self._look(there, _TRIES_WHILE_SERVING if is_serving else _TRIES))

    def is_fine(self) -> None:
        """The balancer reaches it."""
        self._misses = 0

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self, there: Sequence[Place], tries: int) -> None:
        """Whoever refuses a connection is there. A host that never answered may be behind a firewall: Slurm decides."""
        answers = await asyncio.gather(*(_answers(place) for place in there))
        silent = [place for place, answer in zip(there, answers, strict=True) if answer is False]
        if silent:
            self._misses += 1
            if self._misses >= tries and (why := await self._why_lost([place.node for place in silent], silent[0])):
                self.lost = why
                self._nodes.shun([place.node for place in silent])
                self._changed.set()
        elif all(answers):
            self._has_answered, self._misses = True, 0
        await asyncio.sleep(_BETWEEN)

    async def _why_lost(self, silent: Collection[str], first: Place) -> str:
        if self._has_answered and await self._nodes.hear(silent, first.port):
            return f"{first.node} does not answer"
        state = await self._nodes.state_of(first.node)
        return f"Slurm says that {first.node} is {state}" if is_gone(state) else ""


async def _answers(place: Place) -> bool | None:
    """Is a host there? None if it could not be asked, for a trouble of our own."""
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(place.address, place.port)
        writer.close()
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    except OSError as failure:
        return False if failure.errno in _SILENT else None
    return True


async def _answers_from_elsewhere(node: str, address: str, port: int) -> bool:
    """Does a node answer that is not this host itself? `address` may be a name."""
    try:
        async with asyncio.timeout(_CONNECT):
            found = await asyncio.get_running_loop().getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        return False
    numeric = str(found[0][4][0])
    return not _is_here(numeric) and await _answers(Place(node, numeric, port)) is True


def _is_here(address: str) -> bool:
    """Is it an address of this host? Sends nothing."""
    is_four = ":" not in address
    with socket.socket(socket.AF_INET if is_four else socket.AF_INET6, socket.SOCK_DGRAM) as ours:
        # Where net.ipv4.ip_nonlocal_bind is set, as beside keepalived, any address can be bound, but only our own is
        # taken for the source of what is sent. Unbound, IPv4 may choose another one of ours.
        try:
            if is_four:
                ours.bind((address, 0))
            ours.connect((address, _ANY_PORT))
        except OSError:
            return False
        return str(ours.getsockname()[0]) == address


def _now() -> float:
    return asyncio.get_running_loop().time()
