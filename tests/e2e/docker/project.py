"""One Compose project of the repository's own compose.yaml, driven as a person drives it: by docker compose."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).parents[3]

T = TypeVar("T")


class CommandError(AssertionError):
    """A docker command failed; the message is the command and what it said."""


def docker(*arguments: str, environ: dict[str, str] | None = None, timeout: float = 600) -> str:
    """Standard output of a docker command, run in the repository. Raises CommandError."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise CommandError(f"docker {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"[-8000:])
    return done.stdout


@dataclass(frozen=True)
class Container:
    """One container as `docker inspect` tells."""

    facts: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.facts["Id"])

    @property
    def name(self) -> str:
        return str(self.facts["Name"]).lstrip("/")

    @property
    def image(self) -> str:
        return str(self.facts["Image"])

    @property
    def address(self) -> str:
        (network,) = self.facts["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.facts["State"])

    @property
    def restarts(self) -> int:
        return int(self.facts["RestartCount"])


@dataclass(frozen=True)
class Project:
    """`files` are compose files, `environ` the variables that .env.example explains. Ports are given by the engine."""

    name: str
    files: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, timeout: float = 600, **environ: str) -> str:
        files = [part for file in self.files for part in ("-f", file)]
        own = {"PORT": "0", "ADMIN_PORT": "0", "TAG": "test", **self.environ, **environ}
        return docker("compose", "-p", self.name, *files, *arguments, environ=own, timeout=timeout)

    def scale(self, count: int, **environ: str) -> None:
        """What README.md says scaling is: nothing else is touched, and it returns when the new ones are ready."""
        asked = ("--scale", f"replica={count}", "--wait", "replica")
        self.compose("up", "-d", "--no-recreate", "--no-deps", *asked, **environ)

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "1")

    def containers(self, service: str = "replica", *, every: bool = False) -> list[Container]:
        """A service's containers in the order of their numbers; the stopped ones too if `every`."""
        ids = self.compose("ps", "-q", *(["--all"] if every else []), service).split()
        found = [Container(facts) for facts in json.loads(docker("inspect", *ids))] if ids else []
        return sorted(found, key=lambda one: int(one.facts["Config"]["Labels"]["com.docker.compose.container-number"]))

    def url(self, port: int = 30001) -> str:
        return "http://" + self.compose("port", "balancer", str(port)).strip()

    def status(self) -> dict[str, Any]:
        """The balancer's GET /status."""
        answer = httpx.get(self.url(30002) + "/status", timeout=10)
        return dict(answer.raise_for_status().json())

    def logs(self, service: str = "replica") -> str:
        return self.compose("logs", "--no-color", service)


def until(look: Callable[[], T], what: str, timeout: float = 60) -> T:
    """The first true value of `look`, asked again and again. Raises AssertionError."""
    give_up = time.monotonic() + timeout
    while not (seen := look()):
        assert time.monotonic() < give_up, f"not within {timeout} s: {what}"
        time.sleep(0.2)
    return seen
