"""Keeps a service as it is wanted: looks at it, decides by plan.py, acts through an engine, tells the balancer."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from balancer.errors import ConfigError
from balancer.operate import plan
from balancer.operate.engine import CannotStart, Engine
from balancer.operate.front import Front
from balancer.operate.plan import Action, Drain, Forget, Replace, Replica, Stage, Start, Stop
from balancer.operate.recipe import Recipe
from balancer.views.status import ServiceRow, Snapshot

# Seconds between two looks when nothing happens; whatever ends is looked at at once.
_PERIOD = 0.5

# The balancer's contract for where a replica is. That a running one drains is for the balancer to say.
_STATES = {
    Stage.WAITING: "PROVISIONING",
    Stage.RUNNING: "RUNNING",
    Stage.DRAINING: "RUNNING",
    Stage.STOPPING: "SHUTTING_DOWN",
    Stage.REPLACING: "SHUTTING_DOWN",
    Stage.GIVEN_UP: "FAILED",
}
# A replica that never got a port is listed under one where nothing listens: discard.
_NOWHERE = "http://127.0.0.1:9"


class Controller:
    """One service. `run` works until `close` was called and all is down.

    Other methods may be called at any time from the same event loop; they note what is wanted, and `run` does it.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        engine: Engine,
        front: Front,
        wake: asyncio.Event,
        say: Callable[[str], None],
        show: Callable[[Snapshot], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` is set by engine and front when something ended. `say` gets lines for a person, `show` snapshots."""
        self.name = name
        self.recipe = recipe
        self.target = recipe.spec.min_replicas
        self.replicas: dict[int, Replica] = {}
        self.snapshot = _nothing_yet(name, front.endpoint)
        self._engine = engine
        self._front = front
        self._wake = wake
        self._say = say
        self._show = show
        self._clock = clock
        self._next_id = 1
        self._endpoints: dict[int, str] = {}
        self._condemned: set[int] = set()
        self._is_closing = False
        self._hurry = asyncio.Event()
        self._stopping: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Works until closed; then all is down. Raises CannotStart when there can be no balancer."""
        try:
            while not self._is_closing:
                self._wake.clear()
                await self._step()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _PERIOD)
        finally:
            await self._end()

    def close(self) -> None:
        """Ends the service once the answers in flight are finished; called again, at once."""
        if self._is_closing:
            self._hurry.set()
        self._is_closing = True
        self._wake.set()

    def scale(self, target: int) -> None:
        """Wants that many replicas from now on, and tries again those given up.

        Raises ConfigError where the load decides, or the script can have one replica only.
        """
        policy = self.recipe.spec.service.replica_policy
        if policy is not None and self.recipe.spec.autoscales:
            most = "as many as fit" if policy.max_replicas is None else policy.max_replicas
            raise ConfigError(
                f"{self.name} scales with its load, {policy.min_replicas} to {most}: "
                "change its replica_policy with groundserve update"
            )
        if self.recipe.fixed_port is not None and target > 1:
            raise ConfigError(f"{self.name} listens on port {self.recipe.fixed_port} only: it can have one replica")
        self.target = target
        for replica in self.replicas.values():
            if replica.stage is Stage.GIVEN_UP:
                self._keep(replace(replica, stage=Stage.WAITING, failures=0, start_at=0.0))
        self._wake.set()

    def replace_replica(self, id: int) -> None:
        """Drains a replica and ends it; another takes its place. Raises ConfigError when there is none such."""
        if id not in self.replicas or not self.replicas[id].is_wanted:
            known = ", ".join(str(replica.id) for replica in self.replicas.values() if replica.is_wanted)
            raise ConfigError(f"{self.name} has no replica {id}; it has {known or 'none'}")
        self._condemned.add(id)
        self._wake.set()

    def _wanted(self) -> dict[int, int]:
        return {self.recipe.version: self.target}

    async def _step(self) -> None:
        await self._front.keep_up()
        for over in self._engine.ended():
            self._lost(over.id, over.reason, over.is_hopeless)
        await self._tell()
        now = self._clock()
        timeout = self.recipe.spec.settings.drain_timeout
        actions: list[Action] = [Drain(id) for id in self._condemned if id in self.replicas]
        self._condemned.clear()
        actions += plan.decide(self.replicas.values(), self._wanted(), self._next_id, now, timeout)
        # A drain that a balancer forgot, because it is a new process, is told again.
        for replica in self.replicas.values():
            if replica.stage is Stage.DRAINING and replica.status not in ("DRAINING", "SHUTTING_DOWN", ""):
                await self._front.drain(replica.id)
        if actions:
            await asyncio.gather(*(self._act(action) for action in actions))
            await self._tell()

    async def _act(self, action: Action) -> None:
        match action:
            case Start(id, version):
                await self._start(id, version)
            case Drain(id) if self.replicas[id].stage is Stage.RUNNING:
                self._keep(plan.drained(self.replicas[id], self._clock()))
                await self._front.drain(id)
            case Drain(id) | Forget(id):
                self._forget(id)
            case Stop(id):
                self._keep(replace(self.replicas[id], stage=Stage.STOPPING))
                self._stop(id, None)
            case Replace(id, reason):
                self._keep(replace(self.replicas[id], stage=Stage.REPLACING, reason=reason))
                self._stop(id, reason)

    async def _start(self, id: int, version: int) -> None:
        if id not in self.replicas:
            self._next_id = max(self._next_id, id + 1)
            self._keep(Replica(id, version))
        self._keep(plan.started(self.replicas[id], self._clock()))
        try:
            await self._engine.start(id, self.recipe)
        except CannotStart as failure:
            self._lost(id, str(failure), is_hopeless=False)

    def _stop(self, id: int, reason: str | None) -> None:
        """Ends a replica's process without waiting for it; `reason`: it starts again afterwards."""

        async def stop() -> None:
            await self._engine.stop(id, self.recipe.spec.operation.stop_grace)
            if reason is None:
                self._forget(id)
            else:
                self._lost(id, reason, is_hopeless=False)
            self._wake.set()

        task = asyncio.create_task(stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    def _lost(self, id: int, reason: str, is_hopeless: bool) -> None:
        replica = self.replicas.get(id)
        if replica is None:
            return
        if not replica.is_wanted:
            self._forget(id)
            return
        now = self._clock()
        replica = plan.ended(replica, reason, is_hopeless, now, self.recipe.spec.operation)
        self._keep(replica)
        if replica.stage is Stage.GIVEN_UP:
            self._say(f"{self._name_of(id)} is given up: {reason}")
        else:
            self._say(f"{self._name_of(id)} ended, starts again in {replica.start_at - now:.3g} s: {reason}")

    async def _tell(self) -> None:
        """Gives the balancer the list, and takes what it says of each replica."""
        service: dict[str, Any] = {
            "name": self.name,
            "version": str(self.recipe.version),
            "endpoint": self._front.endpoint,
            "status": "",
            "reason": "",
        }
        if self._is_closing:
            service["status"] = "SHUTTING_DOWN"
        elif plan.is_hopeless(self.replicas.values(), self._wanted()):
            service["status"] = "FAILED"
            service["reason"] = next((r.reason for r in self.replicas.values() if r.reason), "")
        snapshot = await self._front.tell(service, self._listing())
        if snapshot is None:
            return
        now = self._clock()
        for row in snapshot.replicas:
            replica = self.replicas.get(row.id)
            if replica is not None and replica.stage in (Stage.RUNNING, Stage.DRAINING):
                operation = self.recipe.spec.operation
                self._keep(plan.observed(replica, row.status, row.in_flight, now, operation))
        self.snapshot = snapshot
        self._show(snapshot)

    def _listing(self) -> list[dict[str, Any]]:
        self._endpoints |= {running.id: running.endpoint for running in self._engine.running()}
        now = self._clock()
        return [
            {
                "id": replica.id,
                "name": self._name_of(replica.id),
                "endpoint": self._endpoints.get(replica.id, _NOWHERE),
                "version": replica.version,
                "infra": self._engine.infra,
                "resources": self.recipe.resources,
                "launched_seconds": max(0.0, now - replica.launched_at) if replica.launched_at else 0.0,
                "state": _STATES[replica.stage],
                "restarts": replica.restarts,
                "reason": replica.reason,
            }
            for replica in self.replicas.values()
        ]

    async def _end(self) -> None:
        """Balancer first, so that nobody is cut off; then the replicas, which have nothing left to do."""
        self._is_closing = True
        await self._tell()
        await self._front.stop(self._hurry)
        ids = [running.id for running in self._engine.running()]

        async def stop_all(grace: float) -> None:
            await asyncio.gather(*(self._engine.stop(id, grace) for id in ids))

        async def hurry() -> None:
            await self._hurry.wait()
            await stop_all(0.0)

        hurrying = asyncio.create_task(hurry())
        await stop_all(self.recipe.spec.operation.stop_grace)
        hurrying.cancel()
        await asyncio.gather(*self._stopping)

    def _name_of(self, id: int) -> str:
        return f"{self.name}-{id}"

    def _keep(self, replica: Replica) -> None:
        self.replicas[replica.id] = replica

    def _forget(self, id: int) -> None:
        self.replicas.pop(id, None)
        self._endpoints.pop(id, None)


def _nothing_yet(name: str, endpoint: str) -> Snapshot:
    """What there is to say before the balancer answers."""
    service = ServiceRow(
        name=name,
        version="-",
        status="CONTROLLER_INIT",
        uptime_seconds=None,
        endpoint=endpoint,
        policy="-",
        ready=0,
        total=0,
        queue_depth=0,
        in_flight=0,
    )
    return Snapshot(service)
