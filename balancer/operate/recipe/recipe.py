"""How one replica of a service is started on this machine: its command, its environment and its port."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.recipe.launch import PORT_MARK, Launch, hidden, read
from balancer.operate.recipe.script import Misread
from balancer.spec.secret_names import is_secret
from balancer.spec.service_file import Spec
from balancer.spec.settings import ReadinessProbe

# Variables that a replica's command finds in its environment: two of SkyServe's, and ours for the port. A script that
# listens on ${GROUNDSERVE_PORT:-8000} works with both.
REPLICA_ID = "SKYPILOT_SERVE_REPLICA_ID"
GPUS = "SKYPILOT_NUM_GPUS_PER_NODE"
# And of a replica on several machines: how many, and which of them this is, from 0.
NODES = "SKYPILOT_NUM_NODES"
NODE_RANK = "SKYPILOT_NODE_RANK"
PORT = "GROUNDSERVE_PORT"
LEASE_WAIT = "LEASE_WAIT"
GPU_SHARE = "GPU_SHARE"
GPU_SLICE = "GPU_SLICE"
# SGLang's flag, by which a service says how much of each GPU is its own during its turn.
FRACTION = "--mem-fraction-static"
# For others that look for a GPU: whose replica has one.
SERVICE, PRIORITY = "GROUNDSERVE_SERVICE", "GROUNDSERVE_PRIORITY"
# Seconds that one start waits for a GPU. The controller keeps trying, and can report the reason in between.
LEASE_WAIT_HERE = "3"
# Seconds that it waits for its turn on a shared GPU, where other replicas first finish their requests.
TURN_WAIT_HERE = "30"

# A flag of a script's command that gets its value from a variable.
_SHOWS = re.compile(r"(--?[A-Za-z][\w-]*)(?:=|\s+)[\"']?\$\{?(\w+)")
# A script that leases its GPUs itself.
_LEASES_ITSELF = re.compile(r"-m +replica\b")

# The folder that holds the project's packages, so that child processes find them whatever their working folder.
_PACKAGES = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True, slots=True)
class Invocation:
    """How to start one process. `envs` are added to our own environment and may hold secrets."""

    argv: tuple[str, ...]
    envs: Mapping[str, str] = field(repr=False)
    workdir: Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all replicas of one version of a service have in common."""

    version: int
    spec: Spec
    # The SGLang command in `run:`; None if bash runs the script unchanged.
    launch: Launch | None
    # GPUs that one replica takes, on each of its machines.
    gpus: int
    # The port that every replica must use because the script knows no other; None if any free port will do.
    fixed_port: int | None
    # The RESOURCES column of the status tables.
    resources: str
    # The maximum number of replicas that the engine has room for; None if nothing says what a replica takes.
    fits: int | None
    # Notes for the user, such as which commands of the script are not run.
    notes: tuple[str, ...]
    # What else of the file goes into a replica where its engine runs it, such as an image, as text: the engine says it.
    surroundings: str = ""

    @property
    def readiness_probe(self) -> ReadinessProbe:
        """The file's probe; without one, SGLang's /health, or SkyServe's default (/) for other scripts."""
        return self.spec.readiness_probe or ReadinessProbe(path="/" if self.launch is None else "/health")

    @property
    def model(self) -> str | None:
        return self.launch.model if self.launch else None

    def starts_like(self, other: "Recipe") -> bool:
        """Would a replica of the other recipe be the very same process?"""
        mine, others = ((one.fixed_port, one.surroundings, one.invocation(0, 0)) for one in (self, other))
        return mine == others

    @property
    def workdir(self) -> Path:
        """The folder that a replica's process starts in: the one from which the script would start SGLang."""
        return Path(os.path.normpath(self.spec.workdir / self.launch.folder)) if self.launch else self.spec.workdir

    def invocation(self, id: int, port: int | str) -> Invocation:
        """The process of a replica; `port` may be a mark that is replaced by the number later."""
        envs = self.envs(id, port)
        if self.launch is None:
            script = ("bash", "-c", self.spec.run)
            if not self.gpus or _LEASES_ITSELF.search(self.spec.run):
                return Invocation(script, envs, self.workdir)
            lease = ("--gpus", str(self.gpus), *self._kinds(), "--port", str(port), "--exec", "--", *script)
            return Invocation((*python("replica"), *lease), with_packages(envs), self.workdir)
        return Invocation((*python("replica"), *self.arguments(port)), with_packages(envs), self.workdir)

    def envs(self, id: int, port: int | str) -> dict[str, str]:
        """The variables that a replica finds in its environment; some may be secrets."""
        own = {REPLICA_ID: str(id), GPUS: str(self.gpus), PORT: str(port)}
        if self.spec.num_nodes > 1:
            own[NODES] = str(self.spec.num_nodes)
        shares = self.spec.operation.gpu_share
        if shares:
            own |= {GPU_SHARE: "yes", GPU_SLICE: f"{self.spec.settings.gpu_slice:g}"}
        if self.gpus or shares:
            own[LEASE_WAIT] = os.environ.get(LEASE_WAIT) or (TURN_WAIT_HERE if shares else LEASE_WAIT_HERE)
        if self.gpus or shares:
            own |= {SERVICE: self.spec.name, PRIORITY: str(self.spec.settings.priority)}
        if self.launch is None:
            return {**self.spec.envs, **own}
        launch = self.launch.at_port(port)
        return {**self.spec.envs, **own, **launch.envs, **hidden(launch.flags)[1]}

    @property
    def secrets(self) -> frozenset[str]:
        """The names of those variables whose values are shown to nobody."""
        if self.launch is None:
            return self.spec.secrets
        return self.spec.secrets | set(hidden(self.launch.flags)[1]) | set(filter(is_secret, self.launch.envs))

    def arguments(self, port: int | str) -> tuple[str, ...]:
        """The arguments of `python -m replica`; only for a script that starts SGLang."""
        assert self.launch is not None
        launch = self.launch.at_port(port)
        arguments = ["--model", _absolute(launch.model, self.workdir), "--port", str(port)]
        if self.gpus:
            arguments += ["--gpus", str(self.gpus), *self._kinds()]
        if launch.flags:
            arguments += ["--", *hidden(launch.flags)[0]]
        return tuple(arguments)

    def among_nodes(self, rank: str, meeting: str) -> tuple[str, ...]:
        """What follows the command on one of several nodes: SGLang's own flags. `meeting` is where the nodes meet."""
        nodes, launch = self.spec.num_nodes, self.launch
        if nodes == 1 or launch is None:
            return ()
        flags = ["--nnodes", str(nodes), "--node-rank", rank, "--dist-init-addr", meeting]
        if self.gpus and not {"--tp-size", "--tp"} & set(launch.flags):
            flags += ["--tp-size", str(self.gpus * nodes)]
        return tuple(flags if launch.flags else ["--", *flags])

    def _kinds(self) -> tuple[str, ...]:
        kinds = ",".join(self.spec.accelerators)
        return ("--gpu-kinds", kinds) if kinds else ()

    @property
    def digest(self) -> str:
        """A hash that is equal for recipes that start replicas in the same way; reveals none of its input."""
        # Whose replica it is changes nothing about its start.
        told = {name: value for name, value in self.envs(0, 0).items() if name not in (SERVICE, PRIORITY)}
        said: list[object] = [self.arguments(0) if self.launch else self.spec.run, sorted(told.items())]
        made = json.dumps([*said, self.surroundings] if self.surroundings else said)
        return hashlib.sha256(made.encode()).hexdigest()[:16]


def recipe(spec: Spec, version: int = 1, resources: str = "1x CPU") -> Recipe:
    """The recipe of a service. Raises ConfigError if its replicas, or that many of them, cannot be started."""
    if not spec.run.strip():
        raise ConfigError(f"{spec.source}: there is no `run:`, so nothing says how to start a replica")
    for name, flag in spec.missing.items():
        raise ConfigError(f"{spec.source}: {name} has no value: give it with {flag} {name}=VALUE")
    gpus = min(spec.accelerators.values(), default=0)  # until we know which kinds of GPU this machine has
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
        if launch.gpus is not None and launch.gpus % spec.num_nodes:
            raise ConfigError(
                f"{spec.source}: num_nodes: run: takes {launch.gpus} GPUs, which cannot be spread evenly over "
                f"{spec.num_nodes} machines"
            )
        gpus = launch.gpus // spec.num_nodes if launch.gpus is not None else gpus
        notes += [
            f"{spec.source}: run: `{part}` is not run: groundserve starts SGLang itself" for part in launch.left_out
        ]
    notes += [
        f"{spec.source}: run: {flag} ${name} shows a secret to all users of this machine, by the command line: "
        "let the program read it from the variable"
        for flag, name in (_SHOWS.findall(spec.run) if launch is None else ())
        if name in spec.secrets
    ]
    if launch is None and not re.search(rf"\$\{{?{PORT}\b", spec.run):
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


def check_one_machine(spec: Spec) -> None:
    """For engines whose replicas run on one machine each; raises ConfigError."""
    if spec.num_nodes > 1:
        raise ConfigError(
            f"{spec.source}: num_nodes: one replica on {spec.num_nodes} machines runs on Slurm or Kubernetes only: say "
            "which with --on"
        )


def for_kind(made: Recipe, kind: str) -> Recipe:
    """The recipe for replicas on GPUs of this kind; the file may ask for a different number of each kind."""
    spec = replace(made.spec, accelerators={kind: made.spec.accelerators[kind]})
    again = with_fraction(recipe(spec, made.version), fraction(made) or None)
    return replace(again, resources=made.resources, fits=made.fits)


def fraction(recipe: Recipe) -> float:
    """The --mem-fraction-static of its replicas; 0 if there is none."""
    flags = recipe.launch.flags if recipe.launch else ()
    said = 0.0
    for at, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        if name == FRACTION:
            try:
                said = float(value if has_value else "".join(flags[at + 1 : at + 2]))
            except ValueError:
                said = 0.0
    return said


def with_fraction(made: Recipe, share: float | None) -> Recipe:
    """The recipe with this share of each GPU that it shares, if there is one and its file says none."""
    if made.launch is None or not made.spec.operation.gpu_share or share is None or fraction(made):
        return made
    return replace(made, launch=replace(made.launch, flags=(*made.launch.flags, FRACTION, f"{share:g}")))


def planned_fraction(made: Recipe) -> float:
    """The share that it was given and that its file does not say; 0 if there is none."""
    share = fraction(made)
    return share if share and not fraction(recipe(made.spec)) else 0.0


def _launch(spec: Spec, gpus: int) -> tuple[Launch | None, str]:
    """The script's SGLang command. If it is None but the script seems to start SGLang, also says why."""
    try:
        return read(spec.run, {**os.environ, **spec.envs, GPUS: str(gpus), PORT: PORT_MARK}), ""
    except Misread as obstacle:
        is_close = re.search(r"\bsglang(\.launch_server| +serve)\b|-m +replica\b", spec.run)
        return None, f"it starts SGLang in a way that is not understood: {obstacle}" if is_close else ""


def python(module: str) -> tuple[str, ...]:
    """The beginning of a command line that runs one of the project's own packages."""
    return (sys.executable, "-P", "-m", module)


def with_packages(envs: Mapping[str, str]) -> dict[str, str]:
    """`envs` with the project's packages on Python's path, for `python` above."""
    there = envs.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    return {**envs, "PYTHONPATH": os.pathsep.join([_PACKAGES, *([there] if there else [])])}


def _absolute(model: str, workdir: Path) -> str:
    """A model's folder as an absolute path; anything else is returned unchanged, as a name."""
    # os.path, because Path raises for names that are too long and for the home folder of an unknown user.
    folder = os.path.join(workdir, os.path.expanduser(model))  # noqa: PTH111, PTH118
    return str(Path(folder).resolve()) if os.path.isdir(folder) else model  # noqa: PTH112
