"""The Compose engine: replicas and balancer as containers of compose.yaml's services, which outlive their controller.

`docker compose up --scale` starts each replica, with an overlay that gives its command and, in labels, its id. Compose
cannot stop one particular replica; `docker stop` does that.
"""

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.engines import capacity
from balancer.operate.engines.addresses import Addresses, AddressFlags, choose_addresses
from balancer.operate.engines.child import tail
from balancer.operate.engines.compose import project
from balancer.operate.engines.compose.balancer_handle import ComposeBalancer, environ
from balancer.operate.engines.compose.project import ROOT, Container, Project, check_docker, has_docker
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.recipe.recipe import Recipe, with_fraction
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import write_whole
from balancer.spec.schema import MOST_REPLICAS

# The port on which a replica listens in its container, as in docker/*.Dockerfile and the balancer's DNS name.
PORT = 8000
_ID, _VERSION, _DIGEST = "groundserve.id", "groundserve.version", "groundserve.digest"
# Secrets come in a file, as a container's variables are shown to all who may use the Docker engine: Compose has them in
# a variable of its own and copies them into the container, and `python -m replica` reads them (replica/options.py).
_SECRETS, _SECRETS_FILE = "GROUNDSERVE_SECRETS", "GROUNDSERVE_SECRETS_FILE"
# Seconds between two looks at the images that names stand for, and at what failed starts left.
_LOOK = 30.0


@dataclass(slots=True)
class _Replica:
    container: Container
    following: asyncio.Task[None]
    started: float  # loop time, in seconds
    words: FirstWords
    is_stopping: bool = False
    # Why it is unknown whether it still runs, and since when; empty while Docker answers.
    silence: str = ""


class ComposeEngine:
    """An `Engine` that keeps overlays, logs and keys in `folder`."""

    name = "compose"
    most_replicas = MOST_REPLICAS
    outlives_controller = True
    is_kept_up = False
    # Its replicas can be reached only from their own network, so they require no key of ours.
    fields: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        self._folder = folder
        self._addresses: Addresses | None = None
        self._prepared: Project | None = None
        self._replicas: dict[int, _Replica] = {}
        self._ended: list[Ended] = []
        # The images that their names stand for now, by which replicas of an earlier build are known.
        self._images: dict[str, str] = {}
        self._watching: asyncio.Task[None] | None = None
        self._may_have_strays = False  # after a start that seemed to fail
        # Compose takes the total number of replicas, so two must not be started at the same time.
        self._one_at_a_time = asyncio.Lock()

    def suits(self, recipe: Recipe) -> bool:
        return recipe.launch is not None and has_docker()

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        if recipe.launch is None:
            raise ConfigError(
                f"{recipe.spec.source}: run: starts no SGLang that is understood, and Compose runs the replica's "
                "image: use --on local"
            )
        check_docker()
        made, warnings = capacity.fit(recipe, running)
        return with_fraction(made, self._folder.planned_fraction), warnings

    def placement(self, recipe: Recipe) -> list[str]:
        return capacity.placement(recipe)

    def take_down(self) -> None:
        project.take_down(self._folder)

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None = None) -> Addresses:
        if flags.join is not None:
            raise ConfigError(
                f"--join {flags.join}: containers of another service's network cannot be reached: use --on local, or "
                "docker/compose.two-models.yaml"
            )
        self._addresses = choose_addresses(flags, left)
        self._prepared = project_of(recipe, self._folder, self._addresses, project.name_in_use(self._folder))
        self._prepared.build_what_is_missing()
        return self._addresses

    def balancer(self, recipe: Recipe) -> ComposeBalancer:
        assert self._addresses is not None, "prepare comes first"
        return ComposeBalancer(self._project, self._folder, self._addresses, recipe)

    @property
    def _project(self) -> Project:
        assert self._prepared is not None, "prepare comes first"
        return self._prepared

    async def found(self) -> tuple[Survivor, ...]:
        for container in await self._project.containers("replica"):
            if container.id in self._known:
                continue  # it is followed, because an earlier attempt broke off
            id = container.labels.get(_ID)
            if id is None or not container.is_running:
                await self._project.docker("rm", "--force", container.id)
                continue
            self._take(int(id), container)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return tuple(
            Survivor(id, self._listing(id), replica.container.labels[_DIGEST]) for id, replica in self._replicas.items()
        )

    async def start(self, id: int, recipe: Recipe) -> None:
        try:
            await self._start(id, recipe)
        except CannotStart:
            self._may_have_strays = True
            raise

    async def _start(self, id: int, recipe: Recipe) -> None:
        overlay = self._folder.path / "replica.json"
        async with self._one_at_a_time:
            if await self._left_by_an_earlier_start(id, recipe):
                return
            count = len(await self._project.containers("replica")) + 1
            scale = ("up", "-d", "--no-recreate", "--no-deps", "--scale", f"replica={count}", "replica")
            try:
                secrets = secrets_of(id, recipe)
                write_whole(overlay, json.dumps(replica_overlay(id, recipe, secrets)))
                await self._project.compose(*scale, overlays=[overlay], environ={_SECRETS: json.dumps(secrets)})
            finally:
                overlay.unlink(missing_ok=True)
            containers = await self._project.containers("replica")
        for container in containers:
            if container.labels.get(_ID) == str(id):
                self._take(id, container)
                return
        raise CannotStart("docker compose started no container")

    async def _left_by_an_earlier_start(self, id: int, recipe: Recipe) -> bool:
        """Takes over what a start of this replica left that seemed to fail; removes what is of no use.

        Docker may have been silent when it ended, and Compose creates a container before it starts it.
        """
        known = self._known
        for container in await self._project.containers("replica"):
            if container.id in known or (container.is_running and container.labels.get(_ID) != str(id)):
                continue
            if container.is_running and container.labels.get(_DIGEST) == recipe.digest:
                self._take(id, container)
                return True
            with contextlib.suppress(CannotStart):  # it is being removed already
                await self._project.docker("rm", "--force", container.id)
        return False

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        replica.is_stopping = True
        try:
            await self._project.docker("stop", "--time", str(math.ceil(grace)), replica.container.id, extra=grace)
        except CannotStart:
            # It may have ended by itself, or an earlier call is stopping it. If Docker is silent, that says so.
            there = await self._project.inspect(replica.container.id)
            if there is not None and there.is_running and not replica.following.done():
                raise
        await replica.following

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id) for id in self._replicas}

    def _listing(self, id: int) -> ReplicaListing:
        container, words = self._replicas[id].container, self._replicas[id].words
        state, reason = words.state()
        if not container.address:  # it ended before we could inspect its address
            name, version = f"{self._folder.name}-{id}", int(container.labels[_VERSION])
            return ReplicaListing(name, id=id, version=version, infra=self.name, state=State.PROVISIONING)
        return ReplicaListing(
            # The name that the balancer gives to replicas it finds through DNS, so that each replica has one name only.
            f"{container.address}:{PORT}",
            f"http://{container.address}:{PORT}",
            id=id,
            version=int(container.labels[_VERSION]),
            launched_seconds=asyncio.get_running_loop().time() - self._replicas[id].started,
            infra=self.name,
            resources=words.resources or "-",
            leased=words.leased,
            state=state,
            reason=reason or self._replicas[id].silence or self._outdated(container),
        )

    def ended(self) -> tuple[Ended, ...]:
        ended, self._ended = self._ended, []
        return tuple(ended)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        """None: they are on this host."""
        return {}

    async def close(self) -> None:
        """Removes the network and the balancer's container; the volumes (models, kernels, leases) stay."""
        if self._watching is not None:
            self._watching.cancel()
        await self._project.compose("down", "--remove-orphans")

    @property
    def _known(self) -> set[str]:
        return {replica.container.id for replica in self._replicas.values()}

    def _take(self, id: int, container: Container) -> None:
        self._folder.trim_replica_logs({id, *self._replicas})
        started = asyncio.get_running_loop().time() - container.age
        words = FirstWords(self._folder.replica_log(id))  # to which all that it has printed is appended now
        following = asyncio.create_task(self._follow(id, container))
        self._replicas[id] = _Replica(container, following, started, words)

    async def _follow(self, id: int, container: Container) -> None:
        """Follows the log until the container ends, then removes the container."""
        log = self._folder.replica_log(id)
        over = await self._project.follow(container.id, log, lambda why: self._silent(id, why))
        replica = self._replicas.pop(id)
        if not replica.is_stopping:
            code = over.exit_code if over is not None else 137  # the container was removed by somebody else
            self._ended.append(Ended.by(id, code, next(iter(tail(log, 1)), "")))
        with contextlib.suppress(CannotStart):
            await self._project.docker("rm", "--force", container.id)
        self.changed.set()

    async def _watch(self) -> None:
        while True:
            for name in {replica.container.image_name for replica in self._replicas.values()}:
                with contextlib.suppress(CannotStart):
                    self._images[name] = await self._project.image(name)
            if self._may_have_strays:
                with contextlib.suppress(CannotStart):  # the next look finds them
                    await self._remove_strays()
            await asyncio.sleep(_LOOK)

    async def _remove_strays(self) -> None:
        """Removes what starts left that seemed to fail: perhaps nobody wants that replica again. Raises CannotStart."""
        async with self._one_at_a_time:
            for container in await self._project.containers("replica"):
                if container.id not in self._known:
                    await self._project.docker("rm", "--force", container.id)
            self._may_have_strays = False

    def _outdated(self, container: Container) -> str:
        """Says that its image was built or pulled anew; empty if it was not. Each start takes the one of the moment."""
        now = self._images.get(container.image_name)
        if not now or now == container.image:
            return ""
        return (
            f"it runs image {_short(container.image)}, and {container.image_name} is {_short(now)} by now: "
            f"groundserve restart {self._folder.name} replaces it"
        )

    def _silent(self, id: int, why: str) -> None:
        replica = self._replicas[id]
        if bool(why) != bool(replica.silence):
            replica.silence = f"since {time.strftime('%H:%M:%S')} it is unknown whether it runs: {why}" if why else ""


def project_of(recipe: Recipe, folder: ServiceFolder, addresses: Addresses, name: str) -> Project:
    """The Compose project of a service, by this name; raises ConfigError for addresses that it cannot publish."""
    return Project(name, _files(recipe, os.environ), environ(addresses, recipe, folder))


def _files(recipe: Recipe, environ: Mapping[str, str]) -> list[Path]:
    """The files in COMPOSE_FILE, as for `docker compose`: users with overlays of their own list all files there."""
    if named := environ.get("COMPOSE_FILE"):
        return [ROOT / file for file in named.split(environ.get("COMPOSE_PATH_SEPARATOR", ":"))]
    return [ROOT / "compose.yaml", *([] if recipe.gpus else [ROOT / "docker" / "compose.cpu.yaml"])]


def secrets_of(id: int, recipe: Recipe) -> dict[str, str]:
    """The replica's variables that are secrets."""
    return {name: value for name, value in recipe.envs(id, PORT).items() if name in recipe.secrets}


def replica_overlay(id: int, recipe: Recipe, secrets: Collection[str]) -> dict[str, Any]:
    """What to change in compose.yaml for this one replica, whose `secrets` (names) come in a file."""
    arguments = recipe.arguments(PORT)
    model = Path(arguments[arguments.index("--model") + 1])
    labels = {_ID: str(id), _VERSION: str(recipe.version), _DIGEST: recipe.digest}
    overlay: dict[str, Any] = {
        "command": [_literal(part) for part in arguments],
        "environment": {
            # Empty, because compose.yaml, or a file of the user's own, may have a variable of the same name.
            **{name: "" if name in secrets else _literal(value) for name, value in recipe.envs(id, PORT).items()},
        },
        "labels": labels,
        # Only the controller restarts replicas, with a back-off and a limit; Docker must not revive an outdated one.
        "restart": "no",
    }
    if model.is_absolute():
        overlay["volumes"] = [_literal(f"{model}:{model}:ro")]
    if not secrets:
        return {"services": {"replica": overlay}}
    overlay["environment"][_SECRETS_FILE] = "/run/secrets/groundserve"
    overlay["secrets"] = ["groundserve"]
    return {"services": {"replica": overlay}, "secrets": {"groundserve": {"environment": _SECRETS}}}


def _short(digest: str) -> str:
    """As `docker images` prints it."""
    return digest.removeprefix("sha256:")[:12]


def _literal(text: str) -> str:
    """Escapes dollars, which Compose would expand as variables."""
    return text.replace("$", "$$")
