"""A service file, read and resolved: what to run, how many replicas of it, and the balancer's settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from balancer.errors import ConfigError
from balancer.spec import text_file
from balancer.spec.document import Document, fill_in
from balancer.spec.resources import needs
from balancer.spec.schema import NO_POOLS, Operation, Service, Task
from balancer.spec.secret_names import is_secret
from balancer.spec.settings import PolicyName, ReadinessProbe, Settings
from balancer.spec.text_file import PATIENCE
from balancer.spec.tree import KeyPath, shown

NOTHING: Mapping[str, str] = MappingProxyType({})
_HERE = Path()
# Linux's limit for one argument or variable of a process, in bytes.
_MAX_VARIABLE = 128 << 10


@dataclass(frozen=True, slots=True)
class Spec:
    """A service file, read and resolved."""

    name: str
    # The file's path, for messages.
    source: str
    service: Service
    settings: Settings
    operation: Operation
    run: str
    # The folder that relative paths are relative to, and the folder that replicas run in.
    base: Path
    workdir: Path
    # The endpoint's certificate and key.
    tls: tuple[Path, Path] | None
    # Variables for the replicas' commands. They include secrets, so they are never printed.
    envs: Mapping[str, str] = field(repr=False)
    # The names among them whose values are to be shown to nobody.
    secrets: frozenset[str]
    # Those whose values stand in the file, under secrets: or envs:.
    secrets_in_file: frozenset[str]
    # Names in envs: or secrets: without a value, each with the flag that gives one: --env or --secret.
    missing: Mapping[str, str]
    # Acceptable GPU types, each with how many GPUs of it one replica takes; empty: no GPU requested.
    accelerators: Mapping[str, int]
    # What one replica requests, in GB and cores; None: the file does not say.
    memory: float | None
    cpus: float | None
    # The port that the file expects a replica to listen on.
    port: int | None
    # For people: which keys have no effect here, and why.
    warnings: tuple[str, ...]
    # How many machines one replica runs on.
    num_nodes: int = 1

    @property
    def readiness_probe(self) -> ReadinessProbe | None:
        """None if the file does not say: then whoever knows the program decides."""
        return self.service.readiness_probe

    @property
    def policy(self) -> PolicyName | None:
        return self.service.load_balancing_policy

    @property
    def min_replicas(self) -> int:
        policy = self.service.replica_policy
        if policy is not None:
            # With autoscaling, spare replicas are added to what the load asks for.
            return policy.min_replicas if self.autoscales else policy.min_replicas + policy.num_overprovision
        return 1 if self.service.replicas is None else self.service.replicas

    @property
    def max_replicas(self) -> int | None:
        """The maximum number of replicas; None where the file autoscales without a limit."""
        policy = self.service.replica_policy
        if policy is None or not self.autoscales:
            return self.min_replicas
        return policy.max_replicas

    @property
    def autoscales(self) -> bool:
        policy = self.service.replica_policy
        if policy is None:
            return False
        return policy.target_qps_per_replica is not None or self.operation.target_in_flight_per_replica is not None

    def for_balancer(self, readiness_probe: ReadinessProbe, defaults: Mapping[str, Any] = NOTHING) -> str:
        """The YAML for one balancer process: variables filled in, without envs, secrets and commands.

        `defaults` are settings that apply where the file has none.
        """
        service = self.service.model_dump(mode="json", exclude_unset=True, exclude={"readiness_probe", "tls"})
        service["readiness_probe"] = readiness_probe.model_dump(mode="json", exclude_none=True)
        ours = {**defaults, **self.settings.model_dump(mode="json", exclude_unset=True)}
        ours |= self.operation.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump({"name": self.name, "service": service, "x-groundserve": ours}, sort_keys=False)


def load(
    path: str | Path,
    *,
    name: str | None = None,
    envs: Mapping[str, str] = NOTHING,
    secrets: Mapping[str, str] = NOTHING,
    patience: float = PATIENCE,
) -> Spec:
    """The service that a file describes. Raises ConfigError with one line that names file, line and key.

    `patience`: seconds to wait for data if the file is a pipe.
    """
    return parse(read(path, patience), source=str(path), name=name, envs=envs, secrets=secrets)


def read(path: str | Path, patience: float = PATIENCE) -> str:
    """The file's text. Raises ConfigError if it cannot be read."""
    return text_file.read(path, str(path), "a service YAML", patience)


def parse(
    text: str,
    *,
    source: str,
    name: str | None = None,
    envs: Mapping[str, str] = NOTHING,
    secrets: Mapping[str, str] = NOTHING,
    base: Path = _HERE,
) -> Spec:
    """Like load, from the file's text. `envs`, `secrets` and `name` override the file's own.

    Relative paths in the file are relative to `base`.
    """
    document = Document(text, source)
    if "service" not in document.data:
        if "pool" in document.data:
            raise document.fault(("pool",), f"cannot be used here: {NO_POOLS}")
        raise ConfigError(f"{source}: there is no `service:` section, so there is nothing to serve")
    variables, missing, hidden = _variables(document, envs, secrets)
    task = document.validated(Task, _filled(document, variables))
    operation, settings = _own_keys(task, document)
    asked = needs(task.resources, task.service.ports, document)
    spec = Spec(
        name=_service_name(name, task.name or Path(source).stem, source),
        source=source,
        service=task.service,
        settings=settings,
        operation=operation,
        run=task.run or "",
        base=base.absolute(),
        workdir=_path(base, task.workdir or ".", ("workdir",), document),
        tls=_tls(task.service, base, document),
        envs=MappingProxyType(variables),
        secrets=hidden,
        secrets_in_file=_given_in(document, hidden),
        missing=MappingProxyType(missing),
        accelerators=asked.accelerators,
        memory=asked.memory,
        cpus=asked.cpus,
        port=asked.port,
        warnings=(*document.marked(task), *asked.warnings),
        num_nodes=task.num_nodes,
    )
    _check_consistency(spec, document)
    return spec


def _variables(
    document: Document, envs: Mapping[str, str], secrets: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], frozenset[str]]:
    """Names and values of envs: and secrets: with overrides; names without a value, with their flags; secret names."""
    found: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for section, flag in (("envs", "--env"), ("secrets", "--secret")):
        values = document.data.get(section) or {}
        if isinstance(values, list):
            values = {str(name).removeprefix("secrets:"): None for name in values}
        if not isinstance(values, dict):
            raise document.fault((section,), "should be names with their values")
        for name, value in values.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise document.fault((section, name), "is not a name that an environment variable can have")
            if isinstance(value, dict | list):
                raise document.fault((section, name), "should be a single value")
            found[str(name)] = value
            flags[str(name)] = flag
    found |= {**envs, **secrets}
    for name, value in found.items():
        path: KeyPath = ("envs" if flags.get(name) != "--secret" else "secrets", name)
        if "\0" in str(value):
            raise document.fault(path, "contains a NUL, which no variable can")
        if len(f"{name}={value}\0".encode(errors="surrogateescape")) > _MAX_VARIABLE:
            raise document.fault(path, f"is longer than {_MAX_VARIABLE >> 10} KiB: put it into a file")
    missing = {name: flags[name] for name, value in found.items() if value is None}
    hidden = frozenset(name for name in found if name in secrets or flags.get(name) == "--secret" or is_secret(name))
    return {name: str(value) for name, value in found.items() if value is not None}, missing, hidden


def _given_in(document: Document, hidden: frozenset[str]) -> frozenset[str]:
    """The names of secrets with a value beside them, each under its section, as in secrets.HF_TOKEN."""
    sections = {name: document.data.get(name) for name in ("envs", "secrets")}
    return frozenset(
        f"{section}.{name}"
        for section, values in sections.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if name in hidden and value not in (None, "")
    )


def _filled(document: Document, variables: Mapping[str, str]) -> dict[str, Any]:
    """The file's content, with variables filled in where SkyServe fills them in."""
    result = dict(document.data)
    for key in ("service", "workdir"):
        if key in result:
            try:
                result[key] = fill_in(result[key], variables)
            except ValueError as failure:
                raise document.fault((key,), str(failure)) from None
    return result


def _own_keys(task: Task, document: Document) -> tuple[Operation, Settings]:
    """`x-groundserve:`, split into the controller's part and the balancer's settings."""
    under: KeyPath = ("x-groundserve",)
    values = task.x_groundserve or {}
    for key in values:
        if key not in (known := [*Operation.model_fields, *Settings.model_fields]):
            raise document.unknown_key((*under, key), known)
    ours = {key: value for key, value in values.items() if key in Operation.model_fields}
    theirs = {key: value for key, value in values.items() if key in Settings.model_fields}
    if (timeout := task.service.load_balancer.stream_timeout_seconds) is not None:
        theirs = {"idle_timeout": timeout} | theirs
    return document.validated(Operation, ours, under), document.validated(Settings, theirs, under)


def _check_consistency(spec: Spec, document: Document) -> None:
    service, policy = spec.service, spec.service.replica_policy
    if policy is None:
        targets = None
    elif service.replicas is not None:
        raise document.fault(("service", "replica_policy"), "and service.replicas exclude each other: keep one")
    else:
        targets = policy.target_qps_per_replica
        if policy.max_replicas is not None and policy.max_replicas < policy.min_replicas:
            raise document.fault(("service", "replica_policy", "max_replicas"), "is less than min_replicas")
        if policy.max_replicas not in (None, policy.min_replicas) and not spec.autoscales:
            raise document.fault(
                ("service", "replica_policy", "max_replicas"),
                "differs from min_replicas, but nothing says when to scale: give target_qps_per_replica",
            )
        if targets == 0 or (isinstance(targets, dict) and not all(targets.values())):
            raise document.fault(("service", "replica_policy", "target_qps_per_replica"), "should be more than 0")
    if isinstance(targets, dict) != (spec.policy == "instance_aware_least_load"):
        raise document.fault(
            ("service", "load_balancing_policy"),
            "instance_aware_least_load and a target_qps_per_replica by GPU type need each other",
        )


def _service_name(given: str | None, own: str, source: str) -> str:
    """The given name, else the file's own."""
    name = given or own
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        where = "" if given else f"{source}: "
        raise ConfigError(
            f"{where}{shown(name)!r} cannot name a service: use letters, digits, '-', '_' and '.', at most 63"
        )
    return name


def _path(base: Path, text: str, key: KeyPath, document: Document) -> Path:
    try:
        return (base / Path(text).expanduser()).absolute()
    except RuntimeError:
        raise document.fault(key, "names the home of a user who does not exist here") from None


def _tls(service: Service, base: Path, document: Document) -> tuple[Path, Path] | None:
    if service.tls is None:
        return None
    certificate = _path(base, service.tls.certfile, ("service", "tls", "certfile"), document)
    return certificate, _path(base, service.tls.keyfile, ("service", "tls", "keyfile"), document)
