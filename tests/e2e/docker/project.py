"""One Compose project of the repository's own compose.yaml, driven as a person drives it: by docker compose."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[3]
# What the tests build, so that a person's own images keep their names.
TAG = "test"


class CommandError(AssertionError):
    """A docker command failed; the message is the command and what it said."""


def docker(*arguments: str, environ: dict[str, str] | None = None, timeout: float = 600) -> str:
    """What a docker command says, run in the repository. Raises CommandError."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if arguments[0] == "logs" else subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        said = f"{done.stdout}{done.stderr or ''}"[-8000:]
        raise CommandError(f"docker {' '.join(arguments)}: exit {done.returncode}\n{said}")
    return done.stdout


@dataclass(frozen=True)
class Container:
    """One container as `docker inspect` told it."""

    facts: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.facts["Id"])

    @property
    def number(self) -> int:
        return int(self.facts["Config"]["Labels"]["com.docker.compose.container-number"])

    @property
    def image(self) -> str:
        return str(self.facts["Image"])

    @property
    def member(self) -> str:
        """What the balancer calls it."""
        (network,) = self.facts["NetworkSettings"]["Networks"].values()
        return f"{network['IPAddress']}:8000"

    @property
    def is_healthy(self) -> bool:
        return bool(self.facts["State"]["Health"]["Status"] == "healthy")

    @property
    def exit_code(self) -> int:
        return int(self.facts["State"]["ExitCode"])

    @property
    def restarts(self) -> int:
        return int(self.facts["RestartCount"])

    def again(self) -> "Container":
        """The same container as it is now."""
        return Container(json.loads(docker("inspect", self.id))[0])

    def logs(self) -> str:
        return docker("logs", self.id)


@dataclass(frozen=True)
class Project:
    """`files` are compose files, `environ` the variables that .env.example explains. The engine chooses the ports.

    Unless told otherwise it has GPUs of its own, pretended ones: its leases are no other project's, nor a person's.
    """

    name: str
    files: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, timeout: float = 600, **environ: str) -> str:
        files = [part for file in self.files for part in ("-f", file)]
        own = {"PORT": "0", "ADMIN_PORT": "0", "TAG": TAG, "LEASE_VOLUME": f"{self.name}-leases"}
        own |= self.environ | environ
        return docker("compose", "-p", self.name, *files, *arguments, environ=own, timeout=timeout)

    def up(self, **environ: str) -> None:
        """From nothing, whatever a run before left behind, to a balancer that can answer."""
        self.down()
        self.compose("up", "-d", "--wait", **environ)

    def scale(self, count: int) -> None:
        """Scaling as the docs have it: nothing else is touched, and it returns when the new replicas are ready."""
        asked = ("--scale", f"replica={count}", "--wait", "replica")
        self.compose("up", "-d", "--no-recreate", "--no-deps", *asked)

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "0")

    def containers(self, service: str = "replica") -> list[Container]:
        """A service's containers, the stopped ones too, in the order of their numbers."""
        ids = self.compose("ps", "-q", "--all", service).split()
        found = [Container(facts) for facts in json.loads(docker("inspect", *ids))] if ids else []
        return sorted(found, key=lambda one: one.number)

    def url(self, port: int = 30001) -> str:
        return "http://" + self.compose("port", "balancer", str(port)).strip()

    def status(self) -> dict[str, Any]:
        """The balancer's GET /status."""
        answer = httpx.get(self.url(30002) + "/status", timeout=10)
        return dict(answer.raise_for_status().json())

    def ready(self) -> set[str]:
        """The members that the balancer calls READY."""
        return {row["name"] for row in self.status()["replicas"] if row["status"] == "READY"}
