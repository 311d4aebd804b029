"""One Compose project, driven as a person would: with `docker compose` and `docker`, never through their sockets."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from balancer.errors import ConfigError
from balancer.inherited import tell
from balancer.operate.engines.child import Child
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.typed import last_line, typed
from balancer.operate.recipe.recipe import Invocation
from balancer.operate.state.service_folder import ServiceFolder

# The checkout: compose.yaml builds its images from it.
ROOT = Path(__file__).resolve().parents[4]
_SERVICE = "com.docker.compose.service"
_PROJECT = "com.docker.compose.project"
# Seconds that Docker gets to answer a question, and to start or remove what is there already. Then it is silent.
ANSWER = 60.0
WORK = 180.0
# Seconds between two questions to a Docker that is silent.
_AGAIN = 2.0
_SILENT = "Docker does not answer within {:.0f} s"


@dataclass(frozen=True, slots=True)
class Container:
    """One container according to `docker inspect`. `address` is empty while it has none; `age` is in seconds.

    `image` is the digest of what it runs, `image_name` what stood for that when it was created.
    """

    id: str
    labels: Mapping[str, str]
    address: str
    is_running: bool
    exit_code: int
    restarts: int
    age: float
    image: str = ""
    image_name: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Container":
        state = facts["State"]
        networks = facts["NetworkSettings"]["Networks"].values()
        started = re.sub(r"(\.\d{6})\d*", r"\1", state["StartedAt"].replace("Z", "+00:00"))
        return cls(
            facts["Id"],
            facts["Config"]["Labels"] or {},
            next((network["IPAddress"] for network in networks if network["IPAddress"]), ""),
            state["Running"],
            state["ExitCode"],
            facts["RestartCount"],
            max(0.0, (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds()),
            facts["Image"],
            facts["Config"]["Image"],
        )


class Project:
    """A project of Compose files. `environ` holds the variables that they use, on top of our own environment."""

    def __init__(self, name: str, files: Sequence[Path], environ: Mapping[str, str]) -> None:
        self.name = name
        self._files = tuple(files)
        self._environ = {**os.environ, **environ}

    def command(self, *arguments: str, overlays: Sequence[Path] = ()) -> list[str]:
        files = [part for file in (*self._files, *overlays) for part in ("-f", str(file))]
        return ["docker", "compose", "-p", self.name, "--project-directory", str(ROOT), *files, *arguments]

    def build_what_is_missing(self) -> None:
        """Builds the images if any is missing, and shows the progress. May block for minutes. Raises ConfigError."""
        listed = _answered(self.command("config", "--images"), env=self._environ)
        if listed.returncode != 0:
            raise ConfigError(last_line(listed.stderr))
        for image in sorted(set(listed.stdout.split())):
            is_there = _answered(["docker", "image", "inspect", image])
            if is_there.returncode != 0:
                tell(sys.stdout, f"building {image}")
                if subprocess.run(self.command("build"), env=self._environ, check=False).returncode != 0:
                    raise ConfigError(f"{image} could not be built: see above")
                return

    async def compose(
        self,
        *arguments: str,
        overlays: Sequence[Path] = (),
        extra: float = 0.0,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Returns what `docker compose` printed; raises CannotStart with its last line if it fails.

        `extra` seconds are granted for containers that take their time to stop; `environ` are more variables.
        """
        command = self.command(*arguments, overlays=overlays)
        return await typed(command, {**self._environ, **environ}, WORK + extra, _SILENT)

    async def docker(self, *arguments: str, extra: float = 0.0) -> str:
        """Returns what `docker` printed; raises CannotStart with its last line if it fails."""
        return await typed(["docker", *arguments], self._environ, ANSWER + extra, _SILENT)

    async def containers(self, service: str) -> list[Container]:
        """The containers of one of the project's services, including those that have ended."""
        labels = [f"label={_PROJECT}={self.name}", f"label={_SERVICE}={service}"]
        ids = await self.docker("ps", "-aq", "--no-trunc", *(part for one in labels for part in ("--filter", one)))
        found = [await self.inspect(id) for id in ids.split()]
        return [container for container in found if container is not None]

    async def inspect(self, id: str) -> Container | None:
        """The container with this id; None if there is certainly none. Raises CannotStart if Docker does not say."""
        try:
            return Container.of(json.loads(await self.docker("inspect", id))[0])
        except CannotStart as failure:
            if "no such" in str(failure).lower():
                return None
            raise

    async def image(self, name: str) -> str:
        """The digest that this name stands for; empty if there is no such image. Raises CannotStart likewise."""
        try:
            return (await self.docker("image", "inspect", "--format", "{{.Id}}", name)).strip()
        except CannotStart as failure:
            if "no such" in str(failure).lower():
                return ""
            raise

    async def _certainly(self, id: str, on_silence: Callable[[str], None]) -> Container | None:
        """The same, for as long as it takes Docker to answer."""
        while True:
            try:
                container = await self.inspect(id)
            except CannotStart as failure:
                on_silence(str(failure))
                await asyncio.sleep(_AGAIN)
            else:
                on_silence("")
                return container

    async def follow(self, id: str, log: Path, on_silence: Callable[[str], None] = lambda _: None) -> Container | None:
        """Appends the container's output to `log` until it ends; returns its final state, or None if it is gone.

        A Docker that is restarted or silent ends nothing: it is asked until it answers. Meanwhile `on_silence` has
        been told why, and is told "" afterwards.
        """
        since: tuple[str, ...] = ()
        while True:
            with contextlib.suppress(CannotStart):
                printing = await Child.start(
                    Invocation(("docker", "logs", "--follow", *since, id), {}, ROOT), log, _nothing
                )
                try:
                    await printing.ended()
                except asyncio.CancelledError:
                    await printing.kill()
                    raise
            container = await self._certainly(id, on_silence)
            if container is None or not container.is_running:
                return container
            since = ("--since", "0s")  # Docker itself was restarted, or restarted the container
            await asyncio.sleep(1)


def name_of(folder: ServiceFolder) -> str:
    """The project's name. All who may use the Docker engine share its projects, and Compose allows only lower case
    letters, digits, '-' and '_'; the user and the service's folder tell apart services whose names then read alike.
    """
    digest = hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:8]
    return f"{_earlier_name_of(folder)}-{os.getuid()}-{digest}"


def _earlier_name_of(folder: ServiceFolder) -> str:
    """What earlier versions called it."""
    return "groundserve-" + re.sub(r"[^a-z0-9_-]", "-", folder.name.lower())


def name_in_use(folder: ServiceFolder) -> str:
    """The name by which the service's containers are found: the earlier one if a balancer of that project reads our
    folder, else `name_of`. Raises ConfigError if Docker cannot tell.
    """
    earlier = _earlier_name_of(folder)
    filters = (f"label={_PROJECT}={earlier}", f"volume={folder.service_file.parent}")
    asked = _answered(["docker", "ps", "-aq", *(part for one in filters for part in ("--filter", one))])
    if asked.returncode != 0:
        raise ConfigError(last_line(asked.stderr))
    return earlier if asked.stdout.split() else name_of(folder)


def check_docker() -> None:
    """Raises ConfigError unless a Docker engine with Compose v2 answers and the project's compose.yaml is here."""
    if not (ROOT / "compose.yaml").is_file():
        raise ConfigError(
            "--on compose builds its images from the project's own folder, which this installation has not: run it in "
            "a clone of groundserve, or use --on local"
        )
    if not has_docker():
        raise ConfigError("no Docker engine with Compose v2 answers: start it, or use --on local")


def has_docker() -> bool:
    try:
        return all(_answered(["docker", *words]).returncode == 0 for words in (("compose", "version"), ("info",)))
    except ConfigError:
        return False


def take_down(folder: ServiceFolder) -> None:
    """Stops and removes a service's containers and network when its controller is gone; raises ConfigError."""
    # Run in "/", where there is no compose file: the containers' labels hold all that is needed.
    try:
        command = ["docker", "compose", "-p", name_in_use(folder), "down", "--remove-orphans"]
        done = _answered(command, cwd="/", timeout=WORK)
    except ConfigError as failure:
        raise ConfigError(f"{folder.name}: {failure}") from None
    if done.returncode != 0:
        raise ConfigError(f"{folder.name}: {last_line(done.stderr)}")


def _answered(
    command: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; raises ConfigError if it is not there, or Docker is silent."""
    timeout = timeout or ANSWER
    try:
        return subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except OSError as failure:
        raise ConfigError(f"{command[0]}: {failure.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(_SILENT.format(timeout)) from None


def _nothing() -> None:
    pass
