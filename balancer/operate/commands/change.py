"""What each `groundserve` command that changes something does (and `check`); returns the exit code."""

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balancer.errors import ConfigError
from balancer.inherited import tell
from balancer.operate.commands import up as service_up
from balancer.operate.commands.detach import detached
from balancer.operate.commands.progress import Lines
from balancer.operate.commands.show import elsewhere, snapshot_of, unknown, up_folders, warn
from balancer.operate.engines import choose
from balancer.operate.engines.choose import Asked
from balancer.operate.engines.compose import project
from balancer.operate.engines.local import machine
from balancer.operate.recipe.launch import masked
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state import control_socket
from balancer.operate.state.service_folder import AlreadyUp, ServiceFolder, state_root
from balancer.spec.service_file import load, read

# A controller that does not even answer gets this long, in seconds, to end by SIGTERM.
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """A service file and what overrides it."""

    path: str
    name: str | None = None
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def recipe_from(source: Source) -> Recipe:
    """The file's recipe, fitted to this machine; warnings go to stderr. Raises ConfigError when it cannot run here."""
    spec = load(source.path, name=source.name, envs=source.envs, secrets=source.secrets)
    made, warnings = machine.fitted_here(recipe(spec))
    for warning in warnings:
        tell(sys.stderr, f"warning: {warning}")
    return made


@dataclass(frozen=True, slots=True)
class Doors:
    """Where `up` lets clients in, and whom; None: as it finds best."""

    listen: str | None = None
    admin: str | None = None
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None


def up(recipe: Recipe, doors: Doors, on: Asked, is_detached: bool) -> int:
    name, kind = recipe.spec.name, choose.chosen(on, recipe)
    folder = ServiceFolder(state_root(), name)
    left = folder.left if kind == "compose" else None
    try:
        lock = folder.claim()
    except AlreadyUp:
        where = snapshot_of(folder).service.endpoint
        raise ConfigError(
            f"{name} is up already{f' at {where}' if where else ''}: "
            f"groundserve down {name} ends it, -n NAME gives this one another name"
        ) from None
    except OSError as failure:
        raise ConfigError(
            f"{failure.filename or folder.path}: {failure.strerror}: set XDG_STATE_HOME to a folder that can be written"
        ) from None
    with lock:
        where_to = service_up.addresses(doors.listen, doors.admin, doors.is_open, doors.api_keys, doors.admin_key, left)

        project = choose.project(recipe, folder, where_to) if kind == "compose" else None
        if project is not None:
            project.build_what_is_missing()

        def work(progress: Lines, came_up: Callable[[], None]) -> int:
            folder.sign(lock)
            return service_up.run(recipe, folder, where_to, project, progress, came_up)

        if is_detached:
            return detached(lambda came_up: work(Lines(sys.stdout), came_up), folder.controller_log)
        return work(service_up.on_terminal(folder), lambda: None)


def check(source: Source) -> int:
    made = recipe_from(source)
    spec = made.spec
    most = "as many as fit" if spec.max_replicas is None else str(spec.max_replicas)
    if most == str(spec.min_replicas):
        count = "1 replica" if most == "1" else f"{most} replicas"
    else:
        count = f"{spec.min_replicas} to {most} replicas"
    print(f"{spec.name}: {count}, {made.resources} each, readiness {made.readiness_probe.path}")
    print(f"policy: {spec.policy or 'round_robin'}")
    if made.launch is None:
        where = f"port {made.fixed_port}" if made.fixed_port else "a free port each, in GROUNDSERVE_PORT"
        print(f"run: as it is, with bash, on {where}")
    else:
        print(f"run: SGLang serves {made.launch.model}" + "".join(f" {flag}" for flag in masked(made.launch.flags)))
        if made.gpus:
            print("\n".join(machine.placed(made, machine.seated_for(made))))
    return 0


def scale(name: str, replicas: int) -> int:
    _ask(name, {"do": "scale", "replicas": replicas})
    count = "1 replica" if replicas == 1 else f"{replicas} replicas"
    print(f"{name}: {count} from now on; groundserve status {name} shows how far it is")
    return 0


def update(name: str, source: Source, mode: str) -> int:
    request = {
        "do": "update",
        "text": read(source.path),
        "source": source.path,
        "envs": dict(source.envs),
        "secrets": dict(source.secrets),
        "mode": mode,
    }
    print(_ask(name, request, timeout=None))
    return 0


def down(names: Sequence[str], replica_id: int | None) -> int:
    """All services where no names are given."""
    if replica_id is not None:
        _ask(names[0], {"do": "replace", "id": replica_id})
        print(f"{names[0]}: replica {replica_id} finishes what it has and ends; another takes its place")
        return 0
    found, failures = up_folders(names)
    if not found and not failures:
        print("No existing services.")
    for folder in found:
        # One that cannot be taken down is told of, and keeps none of the others up.
        try:
            _take_down(folder)
            print(f"{folder.name} is down")
        except ConfigError as failure:
            failures.append(failure)
    warn(failures)
    return 1 if failures else 0


def _take_down(folder: ServiceFolder) -> None:
    if folder.is_left:
        project.take_down(folder.name)
        folder.left_nothing()
        return
    try:
        control_socket.ask(folder.socket, {"do": "down"}, timeout=None)
    except control_socket.NotUp:
        # It starts, or it hangs: its children go with it, however it ends.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not _is_ended(folder, number):
                _wait_until(lambda: not folder.is_up(), _PATIENCE)
    _wait_until(lambda: not folder.is_up(), _PATIENCE)
    if folder.is_up():
        raise ConfigError(f"{folder.name} does not end: see who has {folder.path / 'lock'} open")


def _is_ended(folder: ServiceFolder, number: signal.Signals) -> bool:
    """Did its controller end? If not, it now has the signal. Raises ConfigError where it cannot be reached."""
    holder = folder.holder()
    if holder is None:
        return not folder.is_up()
    elsewhere(folder)
    try:
        holder.signal(number)
    except PermissionError:
        raise ConfigError(f"{folder.name}: process {holder.pid} is another user's: it is not ours to end") from None
    return False


def _ask(name: str, request: Mapping[str, Any], timeout: float | None = 10) -> Any:
    folder = ServiceFolder(state_root(), name)
    if folder.is_left:
        raise ConfigError(
            f"{name} serves on, but its controller is gone: groundserve up with its file takes it up again"
        )
    if not folder.is_up():
        raise ConfigError(unknown(name))
    try:
        return control_socket.ask(folder.socket, request, say=print, timeout=timeout)
    except control_socket.NotUp:
        elsewhere(folder)
        raise ConfigError(f"{name} is just starting or ending: try again in a moment") from None


def _wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not is_so() and time.monotonic() < give_up:
        time.sleep(0.02)
