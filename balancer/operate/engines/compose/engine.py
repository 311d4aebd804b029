"""The Compose engine: replicas as containers of the service `replica` in compose.yaml, which outlive their controller.

`docker compose up --scale` starts each one, with an overlay that says which command it runs and, in labels, which
replica it is. Compose cannot stop a certain one of them: that is `docker stop`.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.operate.engines.child import tail
from balancer.operate.engines.compose.project import Container, Project
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import write_whole

# Where a replica listens in its container, as docker/*.Dockerfile and the balancer's DNS name have it.
PORT = 8000
_ID, _VERSION, _DIGEST = "groundserve.id", "groundserve.version", "groundserve.digest"


@dataclass(slots=True)
class _Replica:
    container: Container
    following: asyncio.Task[None]
    started: float  # loop time, in seconds
    is_stopping: bool = False


class ComposeEngine:
    """An `Engine`. Overlays and logs go to `folder`; `on_change` is called when a replica ended."""

    infra = "compose"

    def __init__(self, project: Project, folder: ServiceFolder, on_change: Callable[[], None]) -> None:
        self.fields: Mapping[str, str] = {}
        self._project = project
        self._folder = folder
        self._on_change = on_change
        self._replicas: dict[int, _Replica] = {}
        self._ended: list[Ended] = []
        # Compose is told how many there should be, so two cannot be started at a time.
        self._one_at_a_time = asyncio.Lock()

    async def found(self) -> tuple[Survivor, ...]:
        survivors: list[Survivor] = []
        for container in await self._project.containers("replica"):
            id = container.labels.get(_ID)
            if id is None or not container.is_running:
                await self._project.docker("rm", "--force", container.id)
                continue
            self._take(int(id), container)
            survivors.append(Survivor(int(id), self._listing(int(id)), container.labels[_DIGEST]))
        return tuple(survivors)

    async def start(self, id: int, recipe: Recipe) -> None:
        overlay = self._folder.path / "replica.json"
        async with self._one_at_a_time:
            # Envs may be secrets: it is for our eyes only.
            write_whole(overlay, json.dumps({"services": {"replica": replica_overlay(id, recipe)}}))
            count = len(await self._project.containers("replica")) + 1
            scale = ("up", "-d", "--no-recreate", "--no-deps", "--scale", f"replica={count}", "replica")
            await self._project.compose(*scale, overlays=[overlay])
            containers = await self._project.containers("replica")
        for container in containers:
            if container.labels.get(_ID) == str(id):
                self._take(id, container)
                return
        raise CannotStart("docker compose started no container")

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        replica.is_stopping = True
        with contextlib.suppress(CannotStart):  # it ended by itself, or is being stopped by an earlier call
            await self._project.docker("stop", "--time", str(math.ceil(grace)), replica.container.id)
        await replica.following

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id) for id in self._replicas}

    def _listing(self, id: int) -> ReplicaListing:
        container = self._replicas[id].container
        return ReplicaListing(
            # As the balancer names those that it knows from DNS alone, so that it knows them by one name only.
            f"{container.address}:{PORT}",
            f"http://{container.address}:{PORT}",
            id=id,
            version=int(container.labels[_VERSION]),
            launched_seconds=asyncio.get_running_loop().time() - self._replicas[id].started,
            infra=self.infra,
        )

    def ended(self) -> tuple[Ended, ...]:
        ended, self._ended = self._ended, []
        return tuple(ended)

    async def close(self) -> None:
        """The network and the balancer's container; volumes stay: models, kernels, leases."""
        await self._project.compose("down", "--remove-orphans")

    def _take(self, id: int, container: Container) -> None:
        self._folder.trim_replica_logs({id, *self._replicas})
        started = asyncio.get_running_loop().time() - container.age
        following = asyncio.create_task(self._follow(id, container))
        self._replicas[id] = _Replica(container, following, started)

    async def _follow(self, id: int, container: Container) -> None:
        """Until the container ended; then nothing is left of it but its log."""
        log = self._folder.replica_log(id)
        over = await self._project.follow(container.id, log)
        replica = self._replicas.pop(id)
        if not replica.is_stopping:
            code = over.exit_code if over is not None else 137  # somebody removed it
            self._ended.append(Ended.by(id, code, next(iter(tail(log, 1)), "")))
        with contextlib.suppress(CannotStart):
            await self._project.docker("rm", "--force", container.id)
        self._on_change()


def replica_overlay(id: int, recipe: Recipe) -> dict[str, Any]:
    """What compose.yaml's service `replica` is to be for this one replica."""
    arguments = recipe.arguments(PORT)
    model = Path(arguments[arguments.index("--model") + 1])
    labels = {_ID: str(id), _VERSION: str(recipe.version), _DIGEST: recipe.digest}
    overlay: dict[str, Any] = {
        "command": [_literal(part) for part in arguments],
        "environment": {name: _literal(value) for name, value in recipe.envs(id, PORT).items()},
        "labels": labels,
        # The controller starts it again, with a pause and a limit; and nobody may start what an update took out.
        "restart": "no",
    }
    if model.is_absolute():
        overlay["volumes"] = [_literal(f"{model}:{model}:ro")]
    return overlay


def _literal(text: str) -> str:
    """Compose fills variables in wherever there is a single dollar."""
    return text.replace("$", "$$")
