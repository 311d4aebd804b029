"""The local engine: replicas and balancer as child processes of `groundserve up`, which end when it does."""

import asyncio
import importlib.util
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
from balancer.operate.engines.ports import REPLICA_PORTS, free_ports, is_free
from balancer.operate.recipe.recipe import Recipe, with_fraction
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder


@dataclass(frozen=True, slots=True)
class _Replica:
    child: Child
    endpoint: str
    started: float
    words: FirstWords


class LocalEngine:
    """An `Engine` that keeps logs and keys in `folder`. Each replica has its own port and log file."""

    name = "local"
    outlives_controller = False
    is_kept_up = False

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        self._front = Front(folder, self.changed.set)
        self._folder = folder
        self._replicas: dict[int, _Replica] = {}
        self._ports: dict[int, int] = {}
        self._stopping: set[int] = set()

    def suits(self, recipe: Recipe) -> bool:
        """SGLang has to be installed if `run:` starts it."""
        return recipe.launch is None or importlib.util.find_spec("sglang") is not None

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        self._front.check_keys(recipe)
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
        port = self._ports[id] = self._port(id, recipe.fixed_port)
        invocation = recipe.invocation(id, port)
        invocation = replace(invocation, envs={**invocation.envs, **self._front.key_variable(recipe)})
        self._folder.trim_replica_logs({id, *self._replicas})
        words = FirstWords(self._folder.replica_log(id))
        child = await Child.start(invocation, self._folder.replica_log(id), self.changed.set)
        self._replicas[id] = _Replica(child, f"http://127.0.0.1:{port}", time.monotonic(), words)

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        self._stopping.add(id)
        await replica.child.stop(grace)
        self._replicas.pop(id, None)
        self._ports.pop(id, None)
        self._stopping.discard(id)

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id, replica) for id, replica in self._replicas.items() if replica.child.code is None}

    def _listing(self, id: int, replica: _Replica) -> ReplicaListing:
        state, reason = replica.words.state()
        return ReplicaListing(
            f"{self._folder.name}-{id}",
            replica.endpoint,
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
                del self._replicas[id]
                unasked.append(Ended.by(id, child.code or 0, next(iter(tail(child.log, 1)), "")))
        return tuple(unasked)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        """None: they are on this host."""
        return {}

    async def close(self) -> None:
        """Closes the ports if the balancer has not done so."""
        self._front.close()

    def _port(self, id: int, fixed: int | None) -> int:
        if fixed is not None:
            if not is_free("127.0.0.1", fixed):
                raise CannotStart(f"port {fixed} is in use by another program: stop that, or change resources.ports")
            return fixed
        # Replicas that are starting do not listen yet, so their ports only look free.
        taken = {port for other, port in self._ports.items() if other != id}
        try:
            return free_ports(1, [port for port in REPLICA_PORTS if port not in taken])[0]
        except ConfigError as failure:
            raise CannotStart(str(failure)) from None
