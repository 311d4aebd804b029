"""What each `groundserve` command does, once its words are parsed; returns the exit code."""

import fnmatch
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
from rich.console import Console
from rich.text import Text

from balancer.errors import ConfigError
from balancer.operate import control, machine
from balancer.operate import up as service_up
from balancer.operate.detach import detached
from balancer.operate.launch import masked
from balancer.operate.recipe import Recipe, recipe
from balancer.operate.state import AlreadyUp, ServiceFolder, folders, state_root
from balancer.spec import load, read
from balancer.views.progress import COLOURS, Lines
from balancer.views.status import ServiceRow, Snapshot
from balancer.views.table import tables

# The admin port that is asked when no service of our own is known: Compose's, or one started by hand.
STRANGER = "GROUNDSERVE_ADMIN"
_DEFAULT_ADMIN = "http://127.0.0.1:30002"
# A controller that does not even answer gets this long, in seconds, to end by SIGTERM.
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """A service file and what overrides it."""

    path: str
    name: str | None = None
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Display:
    """How `status` shows what it found."""

    endpoint_only: bool = False
    as_json: bool = False
    verbose: bool = False
    watch: bool = False


def recipe_from(source: Source) -> Recipe:
    """The file's recipe, fitted to this machine; warnings go to stderr. Raises ConfigError when it cannot run here."""
    spec = load(source.path, name=source.name, envs=source.envs, secrets=source.secrets)
    made, warnings = machine.fitted_here(recipe(spec))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return made


@dataclass(frozen=True, slots=True)
class Doors:
    """Where `up` lets clients in, and whom; None: as it finds best."""

    listen: str | None = None
    admin: str | None = None
    is_open: bool = False
    api_keys: str | None = None


def up(recipe: Recipe, doors: Doors, is_detached: bool) -> int:
    name = recipe.spec.name
    folder = ServiceFolder(state_root(), name)
    try:
        lock = folder.claim()
    except AlreadyUp:
        where = _snapshot(folder).service.endpoint
        raise ConfigError(
            f"{name} is up already{f' at {where}' if where else ''}: "
            f"groundserve down {name} ends it, -n NAME gives this one another name"
        ) from None
    except OSError as failure:
        raise ConfigError(
            f"{folder.path}: {failure.strerror}: set XDG_STATE_HOME to a folder that can be written"
        ) from None
    with lock:
        where_to = service_up.addresses(doors.listen, doors.admin, doors.is_open, doors.api_keys)

        def work(progress: Lines, came_up: Callable[[], None]) -> int:
            folder.sign(lock)
            return service_up.run(recipe, folder, where_to, progress, came_up)

        if is_detached:
            return detached(lambda came_up: work(Lines(sys.stdout), came_up), folder.controller_log)
        return work(service_up.on_terminal(folder), lambda: None)


def check(source: Source) -> int:
    made = recipe_from(source)
    spec = made.spec
    most = "as many as fit" if spec.max_replicas is None else str(spec.max_replicas)
    count = str(spec.min_replicas) if most == str(spec.min_replicas) else f"{spec.min_replicas} to {most}"
    print(f"{spec.name}: {count} replicas, {made.resources} each, readiness {made.readiness_probe.path}")
    print(f"policy: {spec.policy or 'round_robin'}")
    if made.launch is None:
        where = f"port {made.fixed_port}" if made.fixed_port else "a free port each, in GROUNDSERVE_PORT"
        print(f"run: as it is, with bash, on {where}")
    else:
        print(f"run: SGLang serves {made.launch.model}" + "".join(f" {flag}" for flag in masked(made.launch.flags)))
    return 0


def status(patterns: Sequence[str], how: Display) -> int:
    if not how.watch:
        return _show(patterns, how)
    console = Console(highlight=False)
    while True:
        with console.capture() as capture:
            _show(patterns, how, console)
        console.clear()
        sys.stdout.write(capture.get())
        sys.stdout.flush()
        time.sleep(1)


def _show(patterns: Sequence[str], how: Display, console: Console | None = None) -> int:
    snapshots = [_snapshot(folder) for folder in _up_folders(patterns)]
    if not snapshots and not patterns:
        snapshots = _of_a_stranger()
    if how.endpoint_only:
        if len(snapshots) != 1:
            raise ConfigError(f"--endpoint wants one service, and {len(snapshots) or 'none'} fit: give one NAME")
        print(snapshots[0].service.endpoint)
    elif how.as_json:
        print(json.dumps([snapshot.to_json() for snapshot in snapshots], indent=2))
    else:
        text = Text(tables(snapshots, how.verbose))
        for word, colour in COLOURS.items():
            text.highlight_regex(rf"(?<!\S){word}(?!\S)", colour)
        (console or Console(highlight=False)).print(text, soft_wrap=True)
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
        "folder": str(Path.cwd()),
        "envs": dict(source.envs),
        "secrets": dict(source.secrets),
        "mode": mode,
    }
    print(_ask(name, request, timeout=None))
    return 0


def down(names: Sequence[str], is_all: bool, replica_id: int | None) -> int:
    if bool(names) == is_all:
        raise ConfigError("down: give the NAMEs of services, or --all")
    if replica_id is not None:
        if len(names) != 1:
            raise ConfigError("--replica-id wants the NAME of one service")
        _ask(names[0], {"do": "replace", "id": replica_id})
        print(f"{names[0]}: replica {replica_id} finishes what it has and ends; another takes its place")
        return 0
    found = _up_folders(names)
    if not found:
        print("No existing services.")
    for folder in found:
        _take_down(folder)
        print(f"{folder.name} is down")
    return 0


def _take_down(folder: ServiceFolder) -> None:
    try:
        control.ask(folder.socket, {"do": "down"}, timeout=None)
    except control.NotUp:
        # It starts, or it hangs: its children go with it, however it ends.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if (process := folder.holder()) is not None:
                os.kill(process, number)
                _wait_until(lambda: not folder.is_up(), _PATIENCE)
    _wait_until(lambda: not folder.is_up(), _PATIENCE)


def logs(name: str, id: int | None, is_balancer: bool, follow: bool, tail: int | None) -> int:
    folder = ServiceFolder(state_root(), name)
    if is_balancer:
        paths = {"": folder.balancer_log}
    elif id is not None:
        paths = {"": folder.replica_log(id)}
    else:
        paths = {f"{name}-{path.stem.removeprefix('replica-')} | ": path for path in folder.replica_logs()}
    if not paths or not any(path.exists() for path in paths.values()):
        what = "the balancer" if is_balancer else "any replica" if id is None else f"replica {id}"
        known = ", ".join(other.name for other in folders(state_root())) or "none"
        raise ConfigError(f"there is no log of {what} of {name}; services that ran here: {known}")
    for line in log_lines(paths, tail, follow):
        print(line, flush=follow)
    return 0


def log_lines(paths: Mapping[str, Path], tail: int | None, follow: bool) -> Iterator[str]:
    """The lines of each file with its prefix; `follow` never ends, and waits for files that are not there yet."""
    opened: dict[str, TextIO] = {}
    is_first = True
    while is_first or follow:
        for prefix, path in paths.items():
            if prefix not in opened and path.exists():
                opened[prefix] = path.open(errors="replace")
            if prefix in opened:
                lines = opened[prefix].read().splitlines()
                yield from (prefix + line for line in (lines[-tail:] if is_first and tail is not None else lines))
        is_first = False
        if follow:
            time.sleep(0.2)


def _ask(name: str, request: Mapping[str, Any], timeout: float | None = 10) -> Any:
    folder = ServiceFolder(state_root(), name)
    if not folder.is_up():
        raise ConfigError(_unknown(name))
    try:
        return control.ask(folder.socket, request, say=print, timeout=timeout)
    except control.NotUp:
        raise ConfigError(f"{name} is just starting or ending: try again in a moment") from None


def _up_folders(patterns: Iterable[str]) -> list[ServiceFolder]:
    """Services that are up and fit; raises ConfigError for a pattern that fits none."""
    there = [folder for folder in folders(state_root()) if folder.is_up()]
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(folder.name, pattern) for folder in there):
            raise ConfigError(_unknown(pattern))
    return [f for f in there if not patterns or any(fnmatch.fnmatchcase(f.name, pattern) for pattern in patterns)]


def _unknown(name: str) -> str:
    there = ", ".join(folder.name for folder in folders(state_root()) if folder.is_up())
    return f"no service {name} is up here; {f'there is {there}' if there else 'none is'}"


def _snapshot(folder: ServiceFolder) -> Snapshot:
    try:
        return Snapshot.from_json(control.ask(folder.socket, {"do": "status"}))
    except (control.NotUp, ConfigError):
        # Up by its lock, but it does not answer: it begins, it ends, or it hangs.
        return Snapshot(ServiceRow(folder.name, "-", "CONTROLLER_INIT", None, "", "-", 0, 0, 0, 0))


def _of_a_stranger() -> list[Snapshot]:
    """The balancer at GROUNDSERVE_ADMIN or the default address, if one answers there."""
    admin = os.environ.get(STRANGER, _DEFAULT_ADMIN).rstrip("/")
    try:
        answer = httpx.get(f"{admin}/status", timeout=5, trust_env=False)
        return [Snapshot.from_json(answer.raise_for_status().json())]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return []


def _wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not is_so() and time.monotonic() < give_up:
        time.sleep(0.02)
