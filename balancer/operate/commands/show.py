"""Shows the services, their state and their logs: `groundserve status` and `groundserve logs`."""

import contextlib
import fnmatch
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
from rich.console import Console
from rich.text import Text

from balancer.contract.status import ServiceRow, Snapshot
from balancer.contract.words import Phase, ServiceStatus, Status
from balancer.errors import ConfigError
from balancer.operate.commands.begin import is_meant
from balancer.operate.commands.boot import how_to_disable
from balancer.operate.commands.log_reader import LogReader
from balancer.operate.commands.progress import COLOURS
from balancer.operate.commands.table import tables
from balancer.operate.state import control_socket
from balancer.operate.state.service_folder import ServiceFolder, folders, state_root
from balancer.operate.state.state_file import BrokenState

# Where to ask if `groundserve up` runs nothing here: a balancer that docker compose or the user started.
ADMIN_VARIABLE = "GROUNDSERVE_ADMIN"
DEFAULT_ADMIN = "http://127.0.0.1:30002"

# Exit codes of `groundserve status`, for scripts.
ALL_READY = 0
DEGRADED = 3  # it serves, with fewer ready replicas than it should have
DOWN = 4  # it does not serve, or nobody knows whether it does

LogOf = Literal["replicas", "balancer", "controller"]


class NoSuchService(ConfigError):
    """No service of this name is up."""


@dataclass(frozen=True, slots=True)
class Display:
    """How `status` shows the services."""

    endpoint_only: bool = False
    as_json: bool = False
    verbose: bool = False
    watch: bool = False


def status(patterns: Sequence[str], how: Display) -> int:
    """Shows the services, and returns the exit code of the one that fares worst, or 0 with `endpoint_only`."""
    if not how.watch:
        try:
            return _show(patterns, how)
        except NoSuchService as failure:
            if how.endpoint_only:
                raise
            warn([failure])
            return DOWN
    console = Console(highlight=False)
    while True:
        with console.capture() as capture:
            _show(patterns, how, console)
        console.clear()
        sys.stdout.write(capture.get())
        sys.stdout.flush()
        time.sleep(1)


def _show(patterns: Sequence[str], how: Display, console: Console | None = None) -> int:
    found, failures = up_folders(patterns, with_meant=True)
    warn(failures)
    meant = [folder.name for folder in found if not folder.is_up() and not folder.is_detached]
    snapshots = [snapshot_of(folder) for folder in found if folder.name not in meant]
    if not snapshots and not patterns and not failures:
        snapshots = _from_default_admin_port()
    if how.endpoint_only:
        if len(snapshots) != 1:
            raise ConfigError(f"--endpoint wants one service, and {len(snapshots) or 'none'} fit: give one NAME")
        print(snapshots[0].service.endpoint)
        return 0
    if how.as_json:
        print(json.dumps([snapshot.to_json() for snapshot in snapshots], indent=2))
        warn(ConfigError(no_such_service(name)) for name in meant)
    else:
        text = Text(tables(snapshots, how.verbose))
        for word in (*Status, *ServiceStatus):
            if word.phase in COLOURS:
                text.highlight_regex(rf"(?<!\S){word}(?!\S)", COLOURS[word.phase])
        (console or Console(highlight=False)).print(text, soft_wrap=True)
        for name in meant:
            (console or Console(highlight=False)).print(no_such_service(name), soft_wrap=True)
    return max([DOWN if failures or meant else ALL_READY, *map(exit_code, snapshots)])


def exit_code(snapshot: Snapshot) -> int:
    """Without a controller nobody knows how many replicas there should be: then at least one, and all ready."""
    service = snapshot.service
    staying = sum(replica.status.phase is not Phase.LEAVING for replica in snapshot.replicas)
    wanted = service.wanted if service.wanted is not None else max(1, staying)
    is_leaving = service.status.phase is Phase.LEAVING
    if service.ready >= wanted and not is_leaving and service.status is not ServiceStatus.CONTROLLER_INIT:
        return ALL_READY
    return DEGRADED if service.ready else DOWN


def logs(name: str, ids: Sequence[int], of: LogOf, follow: bool, tail: int | None) -> int:
    """Prints logs. `ids` selects replicas; empty means all of them."""
    folder = ServiceFolder(state_root(), name)
    if of == "balancer":
        paths = {"": folder.balancer_log}
    elif of == "controller":
        paths = {"": folder.controller_log}
    elif len(ids) == 1:
        paths = {"": folder.replica_log(ids[0])}
    else:
        known = [folder.replica_log(id) for id in ids] or folder.replica_logs()
        paths = {f"{name}-{path.stem.removeprefix('replica-')} | ": path for path in known}
    if of == "controller" and folder.is_up() and not folder.controller_log.exists():
        raise ConfigError(f"the controller of {name} prints where groundserve up was started: only -d gives it a log")
    if not any(path.is_file() for path in paths.values()):
        some = f"replica {' or '.join(map(str, ids))}" if ids else "any replica"
        what = some if of == "replicas" else f"the {of}"
        if of == "replicas" and (there := [path.stem.removeprefix("replica-") for path in folder.replica_logs()]):
            raise ConfigError(f"there is no log of {what} of {name}; there is one of each of these: {', '.join(there)}")
        known_names = ", ".join(other.name for other in folders(state_root())) or "none"
        raise ConfigError(f"there is no log of {what} of {name}; services that ran here: {known_names}")
    with contextlib.ExitStack() as opened:
        readers = {
            prefix: opened.enter_context(LogReader(path, folder.log_files(path))) for prefix, path in paths.items()
        }
        for prefix, reader in readers.items():
            for line in reader.all() if tail is None else reader.last(tail):
                print(prefix + line, flush=follow)
            if not follow and tail is None:
                for line in reader.rest():
                    print(prefix + line)
        while follow:
            time.sleep(0.2)
            for prefix, reader in readers.items():
                for line in reader.more():
                    print(prefix + line, flush=True)
    return 0


def up_folders(patterns: Collection[str], with_meant: bool = False) -> tuple[list[ServiceFolder], list[ConfigError]]:
    """The matching services that are up, even without a controller, and an error for each matching broken folder.

    `with_meant` adds those of which nothing runs although they are meant to. Raises NoSuchService if a pattern matches
    none.
    """
    services: list[ServiceFolder] = []
    failures: list[ConfigError] = []
    matched: set[str] = set()
    for folder in folders(state_root()):
        matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(folder.name, pattern)}
        if patterns and not matching:
            continue
        try:
            if not folder.is_up() and not folder.is_detached and not (with_meant and is_meant(folder)):
                continue
            services.append(folder)
        except BrokenState as failure:
            failures.append(ConfigError(f"{folder.name}: {failure}"))
        matched |= matching
    if missing := [pattern for pattern in patterns if pattern not in matched]:
        raise NoSuchService(no_such_service(missing[0]))
    return services, failures


def no_such_service(name: str) -> str:
    """The error message for the name of a service that is not up."""
    if is_meant(ServiceFolder(state_root(), name)):
        ends = " && ".join(filter(None, (how_to_disable(name), f"groundserve down {name}")))
        return f"{name} is meant to run and does not: groundserve up {name} resumes it, {ends} ends that"
    names = ", ".join(folder.name for folder in up_folders([])[0] if not folder.is_detached)
    return f"no service {name} is up here; {f'there is {names}' if names else 'none is'}"


def check_host(folder: ServiceFolder) -> None:
    """Raises ConfigError if the service runs on another host, as several hosts may share the disk with the folders."""
    holder = folder.holder()
    if holder is not None and not holder.is_here:
        raise ConfigError(
            f"{folder.name} runs on {holder.host} as process {holder.pid}, out of reach from here: say it there"
        )


def admin_keys(patterns: Sequence[str]) -> int:
    """Prints for each service the path of the file with the key for changes on its admin port."""
    services, failures = up_folders(patterns)
    for folder in services:
        try:
            print(
                folder.admin_key_file if folder.is_detached else control_socket.ask(folder.socket, {"do": "admin key"})
            )
        except control_socket.NotUp:
            failures.append(ConfigError(f"{folder.name} is just starting or ending: try again in a moment"))
    warn(failures)
    return 1 if failures else 0


def snapshot_of(folder: ServiceFolder) -> Snapshot:
    """A service's snapshot from its controller, or from its balancer if the controller is gone."""
    try:
        if folder.is_detached and (left := folder.desired) is not None:
            gone = f"its controller is gone, and no balancer answers: groundserve up {folder.name} takes up what runs"
            return _from_admin_port(f"http://{left.admin}") or _bare(folder, ServiceStatus.FAILED, gone)
        return Snapshot.from_json(control_socket.ask(folder.socket, {"do": "status"}))
    except BrokenState as failure:
        return _bare(folder, ServiceStatus.FAILED, str(failure))
    except control_socket.NotUp:
        pass
    except (ConfigError, ValueError):
        return _bare(folder, ServiceStatus.CONTROLLER_INIT)
    # Its lock is held, but it does not answer: it is starting, ending or hanging, or it runs on another host.
    try:
        check_host(folder)
    except ConfigError as failure:
        return _bare(folder, ServiceStatus.CONTROLLER_INIT, str(failure))
    return _bare(folder, ServiceStatus.CONTROLLER_INIT)


def _bare(folder: ServiceFolder, status: ServiceStatus, reason: str = "") -> Snapshot:
    return Snapshot(ServiceRow(folder.name, "-", status, None, "", "-", 0, 0, 0, 0, reason=reason))


def warn(failures: Iterable[ConfigError]) -> None:
    """Prints the errors of single services, which did not keep the command from handling the others."""
    for failure in failures:
        print(f"groundserve: {failure}", file=sys.stderr)


def _from_default_admin_port() -> list[Snapshot]:
    """The services of the balancer at GROUNDSERVE_ADMIN or the default address; empty if none answers."""
    admin = os.environ.get(ADMIN_VARIABLE, DEFAULT_ADMIN).rstrip("/")
    try:
        answer = httpx.get(f"{admin}/services", timeout=5, trust_env=False).raise_for_status()
        return [Snapshot.from_json(snapshot) for snapshot in answer.json()]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError):
        return []


def _from_admin_port(admin: str) -> Snapshot | None:
    """The snapshot from the balancer at this admin port; None if none answers."""
    try:
        answer = httpx.get(f"{admin}/status", timeout=5, trust_env=False)
        return Snapshot.from_json(answer.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
