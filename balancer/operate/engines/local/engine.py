"""The local engine: replicas and balancer as child processes of `groundserve up`, which end when it does."""

import asyncio
import contextlib
import importlib.util
import random
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from balancer.contract.listing import ReplicaListing
from balancer.errors import ConfigError
from balancer.operate.engines import capacity
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.child import Child, tail
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.engines.local.front import Front
from balancer.operate.engines.ports import REPLICA_PORTS, claim, is_below, is_free, user_of
from balancer.operate.recipe.recipe import Recipe, with_fraction
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder

# Seconds between two looks at who listens on a port.
_LOOK_AT_PORT = 0.5


@dataclass(slots=True)
class _Replica:
    child: Child
    port: int
    # Keeps other services from choosing the port in the minutes before the replica listens there.
    claim: socket.socket
    started: float
    words: FirstWords
    guard: asyncio.Task[None] | None = None
    # Who listens on its port in its place; empty as long as nobody does.
    robbed: str = ""

    def let_go(self) -> None:
        self.claim.close()
        if self.guard is not None:
            self.guard.cancel()


class LocalEngine:
    """An `Engine` that keeps logs and keys in `folder`. Each replica has its own port and log file."""

    name = "local"
    most_replicas = len(REPLICA_PORTS)
    outlives_controller = False
    is_kept_up = False

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        self._front = Front(folder, self.changed.set)
        self._folder = folder
        self._replicas: dict[int, _Replica] = {}
        self._stopping: set[int] = set()

    def suits(self, recipe: Recipe) -> bool:
        """SGLang has to be installed if `run:` starts it."""
        return recipe.launch is None or importlib.util.find_spec("sglang") is not None

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        self._front.check_keys(recipe)
        if recipe.spec.min_replicas > self.most_replicas:
            raise ConfigError(f"{recipe.spec.name}: a machine has ports for {self.most_replicas} replicas at most")
        made, warnings = capacity.fit(recipe, running)
        return with_fraction(made, self._folder.planned_fraction), warnings

    def placement(self, recipe: Recipe) -> list[str]:
        return capacity.placement(recipe)

    def take_down(self) -> None:
        """Nothing is left: children do not outlive their controller."""

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None = None) -> Addresses:
        return self._front.prepare(recipe, flags)

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        return self._front.balancer(recipe)

    @property
    def fields(self) -> Mapping[str, str]:
        return self._front.fields

    async def found(self) -> tuple[Survivor, ...]:
        """Nothing: children do not outlive their controller."""
        return ()

    async def start(self, id: int, recipe: Recipe) -> None:
        with contextlib.ExitStack() as undone:
            port, kept = _claimed(recipe.fixed_port)
            undone.callback(kept.close)
            invocation = recipe.invocation(id, port)
            invocation = replace(invocation, envs={**invocation.envs, **self._front.key_variable(recipe)})
            self._folder.trim_replica_logs({id, *self._replicas})
            words = FirstWords(self._folder.replica_log(id))
            child = await Child.start(invocation, self._folder.replica_log(id), self.changed.set)
            undone.pop_all()
        replica = self._replicas[id] = _Replica(child, port, kept, time.monotonic(), words)
        # What another script starts may listen in a process that is not below it, as with docker run.
        if recipe.launch is not None:
            replica.guard = asyncio.create_task(self._guard(replica))

    async def _guard(self, replica: _Replica) -> None:
        """Ends a replica on whose port another program listens: the balancer would take that for the replica."""
        while True:
            match is_below(replica.child.pid, replica.port):
                case True:
                    return
                case False:
                    replica.robbed = f"while it started, port {replica.port} was taken{user_of(replica.port)}"
                    await replica.child.kill()
                    return
            await asyncio.sleep(_LOOK_AT_PORT)

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        self._stopping.add(id)
        await replica.child.stop(grace)
        replica.let_go()
        self._replicas.pop(id, None)
        self._stopping.discard(id)

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id, replica) for id, replica in self._replicas.items() if replica.child.code is None}

    def _listing(self, id: int, replica: _Replica) -> ReplicaListing:
        state, reason = replica.words.state()
        return ReplicaListing(
            f"{self._folder.name}-{id}",
            f"http://127.0.0.1:{replica.port}",
            id=id,
            launched_seconds=time.monotonic() - replica.started,
            infra=self.name,
            resources=replica.words.resources or "-",
            leased=replica.words.leased,
            state=state,
            reason=reason,
        )

    def ended(self) -> tuple[Ended, ...]:
        over = [(id, r.child) for id, r in self._replicas.items() if r.child.code is not None]
        unasked = []
        for id, child in over:
            if id not in self._stopping:
                replica = self._replicas.pop(id)
                replica.let_go()
                by_itself = Ended.by(id, child.code or 0, next(iter(tail(child.log, 1)), ""))
                unasked.append(Ended(id, replica.robbed) if replica.robbed else by_itself)
        return tuple(unasked)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        """None: they are on this host."""
        return {}

    async def close(self) -> None:
        """Closes the ports if the balancer has not done so."""
        self._front.close()


def _claimed(fixed: int | None) -> tuple[int, socket.socket]:
    """A free port, or this one, and the claim to it. Raises CannotStart."""
    if fixed is not None and not is_free("127.0.0.1", fixed):
        raise CannotStart(f"port {fixed} is in use by another program: stop that, or change resources.ports")
    candidates = list(REPLICA_PORTS) if fixed is None else [fixed]
    random.shuffle(candidates)
    for port in candidates:
        if is_free("127.0.0.1", port) and (kept := claim(port)) is not None:
            return port, kept
    if fixed is not None:
        raise CannotStart(
            f"port {fixed} is kept for a replica of another service here: stop that, or change resources.ports"
        )
    low, high = min(candidates), max(candidates)
    raise CannotStart(f"no port from {low} to {high} is free: stop what listens there, or ask for fewer replicas")
