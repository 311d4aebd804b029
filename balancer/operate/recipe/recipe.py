"""How one replica of a service is started on this machine: its command, its variables, where it listens."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.recipe.launch import PORT_MARK, Launch, read
from balancer.operate.recipe.script import Misread
from balancer.spec.service_file import Spec
from balancer.spec.settings import ReadinessProbe

# What a replica's command finds in its environment: SkyServe's own two, and ours for the port. A script that listens
# on ${GROUNDSERVE_PORT:-8000} serves under both.
REPLICA_ID = "SKYPILOT_SERVE_REPLICA_ID"
GPUS = "SKYPILOT_NUM_GPUS_PER_NODE"
PORT = "GROUNDSERVE_PORT"
LEASE_WAIT = "LEASE_WAIT"
GPU_SHARE = "GPU_SHARE"
# Seconds that one start waits for a GPU; its controller goes on trying, and meanwhile can tell a person why.
LEASE_WAIT_HERE = "3"
# And for its turn on one that is shared, where others first answer what they have.
TURN_WAIT_HERE = "30"

# A script that comes to its GPUs by itself.
_LEASES_ITSELF = re.compile(r"-m +replica\b")

# The folder that the project's packages are in, so that children find them wherever they are started.
_PACKAGES = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True, slots=True)
class Invocation:
    """One process to be. `envs` come on top of our own environment and may hold secrets."""

    argv: tuple[str, ...]
    envs: Mapping[str, str] = field(repr=False)
    workdir: Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all replicas of one version of a service have in common."""

    version: int
    spec: Spec
    # The SGLang command in `run:`; None: the script is run as it is.
    launch: Launch | None
    # GPUs that one replica takes; 0: none.
    gpus: int
    # The port that each replica must have because its script knows no other; None: any free one.
    fixed_port: int | None
    # What the tables say under RESOURCES.
    resources: str
    # The most replicas that the engine has room for; None: nothing says what one takes.
    fits: int | None
    # For a person: what of the script is not run, and the like.
    notes: tuple[str, ...]

    @property
    def readiness_probe(self) -> ReadinessProbe:
        """SGLang's own /health, where the file does not say; SkyServe's default for all else."""
        return self.spec.readiness_probe or ReadinessProbe(path="/" if self.launch is None else "/health")

    @property
    def model(self) -> str | None:
        return self.launch.model if self.launch else None

    def starts_like(self, other: "Recipe") -> bool:
        """Would a replica of the other recipe be the very same process?"""
        return self.fixed_port == other.fixed_port and self.invocation(0, 0) == other.invocation(0, 0)

    @property
    def workdir(self) -> Path:
        """The folder that a replica's process starts in: where the script would have gone before it starts SGLang."""
        return Path(os.path.normpath(self.spec.workdir / self.launch.folder)) if self.launch else self.spec.workdir

    def invocation(self, id: int, port: int) -> Invocation:
        """The process of a replica on this host."""
        envs = self.envs(id, port)
        if self.launch is None:
            script = ("bash", "-c", self.spec.run)
            if not self.gpus or _LEASES_ITSELF.search(self.spec.run):
                return Invocation(script, envs, self.workdir)
            lease = ("--gpus", str(self.gpus), *self._kinds(), "--port", str(port), "--exec", "--", *script)
            return Invocation((*python("replica"), *lease), with_packages(envs), self.workdir)
        return Invocation((*python("replica"), *self.arguments(port)), with_packages(envs), self.workdir)

    def envs(self, id: int, port: int) -> dict[str, str]:
        """What a replica finds in its environment; secrets may be among it."""
        own = {REPLICA_ID: str(id), GPUS: str(self.gpus), PORT: str(port)}
        shares = self.spec.operation.gpu_share
        if shares:
            own[GPU_SHARE] = "yes"
        if self.gpus or shares:
            own[LEASE_WAIT] = os.environ.get(LEASE_WAIT) or (TURN_WAIT_HERE if shares else LEASE_WAIT_HERE)
        return {**self.spec.envs, **own, **(self.launch.at_port(port).envs if self.launch else {})}

    def arguments(self, port: int) -> tuple[str, ...]:
        """Those of `python -m replica`, where the script starts SGLang."""
        assert self.launch is not None
        launch = self.launch.at_port(port)
        arguments = ["--model", _absolute(launch.model, self.workdir), "--port", str(port)]
        if self.gpus:
            arguments += ["--gpus", str(self.gpus), *self._kinds()]
        if launch.flags:
            arguments += ["--", *launch.flags]
        return tuple(arguments)

    def _kinds(self) -> tuple[str, ...]:
        kinds = ",".join(self.spec.accelerators)
        return ("--gpu-kinds", kinds) if kinds else ()

    @property
    def digest(self) -> str:
        """Equal where replicas are started alike, and different elsewhere; tells nothing of what went in."""
        made = json.dumps([self.arguments(0) if self.launch else self.spec.run, sorted(self.envs(0, 0).items())])
        return hashlib.sha256(made.encode()).hexdigest()[:16]


def recipe(spec: Spec, version: int = 1, resources: str = "1x CPU") -> Recipe:
    """Raises ConfigError when replicas of this service cannot be started, or not that many of them."""
    if not spec.run.strip():
        raise ConfigError(f"{spec.source}: there is no `run:`, so nothing says how to start a replica")
    for name, flag in spec.missing.items():
        raise ConfigError(f"{spec.source}: {name} has no value: give it with {flag} {name}=VALUE")
    gpus = min(spec.accelerators.values(), default=0)  # until it is known which kinds are here
    launch, why_not = _launch(spec, gpus)
    notes: list[str] = []
    fixed_port = None
    if why_not:
        notes.append(f"{spec.source}: run: {why_not}, so bash runs it as it is")
    if launch is None and spec.operation.gpu_share:
        raise ConfigError(
            f"{spec.source}: x-groundserve.gpu_share: only SGLang as groundserve starts it can give its memory back, "
            f"and `run:` starts something else{why_not and f' ({why_not})'}"
        )
    if launch is not None:
        gpus = launch.gpus or gpus
        notes += [
            f"{spec.source}: run: `{part}` is not run: groundserve starts SGLang itself" for part in launch.left_out
        ]
    elif not re.search(rf"\$\{{?{PORT}\b", spec.run):
        if spec.port is None:
            raise ConfigError(
                f"{spec.source}: nothing says where a replica listens: let `run:` use ${{{PORT}:-8000}}, "
                f"or give resources.ports{why_not and f' ({why_not})'}"
            )
        fixed_port = spec.port
        most = spec.max_replicas
        if most is None or most > 1:
            raise ConfigError(
                f"{spec.source}: all replicas would listen on port {spec.port} of this machine: "
                f"let `run:` listen on ${{{PORT}:-{spec.port}}}, or ask for one replica{why_not and f' ({why_not})'}"
            )
    return Recipe(version, spec, launch, gpus, fixed_port, resources, None, tuple(notes))


def for_kind(made: Recipe, kind: str) -> Recipe:
    """The recipe where replicas run on GPUs of that kind, of which the file may want another number."""
    spec = replace(made.spec, accelerators={kind: made.spec.accelerators[kind]})
    return replace(recipe(spec, made.version), resources=made.resources, fits=made.fits)


def _launch(spec: Spec, gpus: int) -> tuple[Launch | None, str]:
    """The SGLang command of the script; where there is none of which all is understood, why, if it starts SGLang."""
    try:
        return read(spec.run, {**os.environ, **spec.envs, GPUS: str(gpus), PORT: PORT_MARK}), ""
    except Misread as obstacle:
        is_close = re.search(r"\bsglang(\.launch_server| +serve)\b|-m +replica\b", spec.run)
        return None, f"it starts SGLang in a way that is not understood: {obstacle}" if is_close else ""


def python(module: str) -> tuple[str, ...]:
    """The start of a command that runs one of the project's own packages."""
    return (sys.executable, "-P", "-m", module)


def with_packages(envs: Mapping[str, str]) -> dict[str, str]:
    """`envs` with the project's packages on Python's path, for `python` above."""
    there = envs.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    return {**envs, "PYTHONPATH": os.pathsep.join([_PACKAGES, *([there] if there else [])])}


def _absolute(model: str, workdir: Path) -> str:
    """A model's folder as an absolute path; anything else stays a name."""
    # As strings: a Path raises for names that are too long, and for the home of somebody unknown.
    folder = os.path.join(workdir, os.path.expanduser(model))  # noqa: PTH111, PTH118
    return str(Path(folder).resolve()) if os.path.isdir(folder) else model  # noqa: PTH112
