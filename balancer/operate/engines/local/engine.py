"""The local engine: replicas as child processes of `groundserve up`, each with a port and a log file of its own."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from balancer.contract.listing import ReplicaListing
from balancer.errors import ConfigError
from balancer.operate.engines.child import Child, tail
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.local.ports import REPLICA_PORTS, free_ports, is_free
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder


@dataclass(frozen=True, slots=True)
class _Replica:
    child: Child
    endpoint: str
    started: float


class LocalEngine:
    """An `Engine`. Logs go to `folder`; `on_change` is called when a replica ended.

    `key` is the file with the key that replicas ask for, where they are SGLang's.
    """

    infra = "local"

    def __init__(self, folder: ServiceFolder, key: Path | None, on_change: Callable[[], None]) -> None:
        self.fields: Mapping[str, str] = keys.bearing(keys.given(key, keys.KEY_FILE)) if key is not None else {}
        self._key = key
        self._folder = folder
        self._on_change = on_change
        self._replicas: dict[int, _Replica] = {}
        self._ports: dict[int, int] = {}
        self._stopping: set[int] = set()

    async def found(self) -> tuple[Survivor, ...]:
        """Nothing: children do not outlive their controller."""
        return ()

    async def start(self, id: int, recipe: Recipe) -> None:
        port = self._ports[id] = self._port(id, recipe.fixed_port)
        command = recipe.command(id, port)
        if self._key is not None and recipe.launch is not None:
            command = replace(command, envs={**command.envs, keys.KEY_FILE: str(self._key)})
        self._folder.trim_replica_logs({id, *self._replicas})
        child = await Child.start(command, self._folder.replica_log(id), self._on_change)
        self._replicas[id] = _Replica(child, f"http://127.0.0.1:{port}", time.monotonic())

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
        return ReplicaListing(
            f"{self._folder.name}-{id}",
            replica.endpoint,
            id=id,
            launched_seconds=time.monotonic() - replica.started,
            infra=self.infra,
        )

    def ended(self) -> tuple[Ended, ...]:
        over = [(id, r.child) for id, r in self._replicas.items() if r.child.code is not None]
        found = []
        for id, child in over:
            if id not in self._stopping:
                del self._replicas[id]
                found.append(Ended.by(id, child.code or 0, next(iter(tail(child.log, 1)), "")))
        return tuple(found)

    async def close(self) -> None:
        """Nothing is left."""

    def _port(self, id: int, fixed: int | None) -> int:
        if fixed is not None:
            if not is_free("127.0.0.1", fixed):
                raise CannotStart(f"port {fixed} is in use by another program: stop that, or change resources.ports")
            return fixed
        # Replicas that start side by side do not listen yet.
        taken = {port for other, port in self._ports.items() if other != id}
        try:
            return free_ports(1, [port for port in REPLICA_PORTS if port not in taken])[0]
        except ConfigError as failure:
            raise CannotStart(str(failure)) from None
