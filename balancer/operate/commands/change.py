"""The `groundserve` commands that change something, and `check`. Each returns the exit code."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from balancer.errors import ConfigError
from balancer.inherited import tell
from balancer.operate.commands import up as service_up
from balancer.operate.commands.begin import Source, beginning
from balancer.operate.commands.boot import is_enabled, said_of
from balancer.operate.commands.detach import AskedToEnd, detached
from balancer.operate.commands.division import divide
from balancer.operate.commands.progress import Lines
from balancer.operate.commands.show import check_host, no_such_service, snapshot_of, up_folders, warn
from balancer.operate.commands.together import end_and_keep, is_up, passed_on, raise_when_asked
from balancer.operate.engines import shared_memory
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.choose import AUTO, choose_engine, take_down_detached
from balancer.operate.engines.engine import Engine
from balancer.operate.recipe.launch import masked
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state import control_socket
from balancer.operate.state.service_folder import AlreadyUp, ServiceFolder, state_root
from balancer.operate.state.state_file import BrokenState
from balancer.spec.service_file import load, parse, read

# Seconds that a controller which does not answer gets to end after each signal (SIGTERM, then SIGKILL).
_PATIENCE = 10.0
# While it ends: seconds between two questions whether it is alive, and of silence after which it is not.
_LOOK = 2.0
_SILENCE = 30.0


def fitted(source: Source, on: str = AUTO) -> tuple[Recipe, Engine]:
    """The file's recipe, fitted to the engine that is to run it, and this engine; warnings go to stderr.

    Raises ConfigError if it cannot run here.
    """
    unfitted = recipe(load(source.path, name=source.name, envs=source.envs, secrets=source.secrets))
    engine = choose_engine(on, unfitted, ServiceFolder(state_root(), unfitted.spec.name))
    first, warnings = engine.fit(unfitted)
    for warning in warnings:
        tell(sys.stderr, f"warning: {warning}")
    return first, engine


def up(source: Source, flags: AddressFlags, on: str, is_detached: bool) -> int:
    begin = beginning(source, flags, on)
    folder = begin.folder
    try:
        lock = folder.claim()
    except AlreadyUp:
        raise _is_up_already(folder) from None
    except OSError as failure:
        raise ConfigError(
            f"{failure.filename or folder.path}: {failure.strerror}: set XDG_STATE_HOME to a folder that can be written"
        ) from None
    with lock:
        addresses = begin.engine.prepare(begin.wanted.serving, begin.flags, begin.left)

        def work(progress: Lines, came_up: Callable[[], None]) -> int:
            folder.sign(lock)
            return service_up.run(begin, addresses, progress, came_up)

        if is_detached:
            return detached(lambda came_up: work(Lines(sys.stdout), came_up), folder.controller_log)
        return work(service_up.on_terminal(folder), lambda: None)


def _is_up_already(folder: ServiceFolder) -> ConfigError:
    where = snapshot_of(folder).service.endpoint
    return ConfigError(
        f"{folder.name} is up already{f' at {where}' if where else ''}: "
        f"groundserve down {folder.name} ends it, -n NAME gives this one another name"
    )


def up_together(sources: Sequence[Source], flags: AddressFlags, on: str, is_detached: bool) -> int:
    """Brings several services up behind the endpoint of the first, one after the other.

    In the foreground it then waits until others have taken all of them down, or until it is asked to end: what it
    brought up and still is up ends then, and stays meant to exist unless it was Ctrl-C that asked. If one of them does
    not come up, the others end, too; those that were resumed stay meant to exist.
    """
    sources = [source if source.is_name else replace(source, text=read(source.path)) for source in sources]
    specs = [
        parse(source.text, source=source.path, name=source.name, envs=source.envs, secrets=source.secrets)
        for source in sources
        if source.text is not None
    ]
    named = iter(specs)
    names = [source.path if source.text is None else next(named).name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two services are called {min(twice)}: give one of the files another `name:`")
    for folder in (ServiceFolder(state_root(), name) for name in names):
        if folder.is_up():  # said before the division, which would write down a share that it does not have
            raise _is_up_already(folder)
    for line in divide([recipe(spec) for spec in specs]):
        print(line, flush=True)
    begun: list[str] = []
    kept = {source.path for source in sources if source.text is None}
    if not is_detached:
        raise_when_asked()
    try:
        for name, source in zip(names, sources, strict=True):
            planned = replace(source, is_planned=source.text is not None)
            # Balancers that run already know all services; else the first service's balancer does.
            joins = name != names[0] and not flags.balancers
            joining = replace(flags, join=names[0]) if joins else flags
            if not is_up(name, if_broken=True):
                begun.append(name)
            if code := up(planned, joining, on, is_detached=True):
                return code
        if is_detached:
            return 0
        print(f"{', '.join(names)} share one endpoint; Ctrl-C takes them down", flush=True)
        while any(is_up(name, if_broken=True) for name in begun):
            time.sleep(_LOOK)
        print(f"{', '.join(names)} were taken down", flush=True)
    except KeyboardInterrupt:
        if is_detached:
            raise
        kept = set()
    except AskedToEnd:
        kept = set(begun)
    finally:
        if not is_detached:
            with passed_on(begun):
                for name in [name for name in reversed(begun) if is_up(name, if_broken=True)]:
                    if name in kept:
                        end_and_keep(name)
                    else:
                        down([name], None)
    return 0


def check(sources: Sequence[Source], on: str = AUTO) -> int:
    recipes = [_checked(source, on) for source in sources]
    for line in shared_memory.described(recipes):
        print(line)
    return 0


def _checked(source: Source, on: str) -> Recipe:
    """The recipe of a file; prints what it would do here."""
    recipe, engine = fitted(source, on)
    spec = recipe.spec
    most = "as many as fit" if spec.max_replicas is None else str(spec.max_replicas)
    if most == str(spec.min_replicas):
        count = "1 replica" if most == "1" else f"{most} replicas"
    else:
        count = f"{spec.min_replicas} to {most} replicas"
    print(f"{spec.name}: {count}, {recipe.resources} each, readiness {recipe.readiness_probe.path}")
    print(f"policy: {spec.policy or 'round_robin'}")
    if recipe.launch is None:
        where = f"port {recipe.fixed_port}" if recipe.fixed_port else "a free port each, in GROUNDSERVE_PORT"
        print(f"run: as it is, with bash, on {where}")
    else:
        print(f"run: SGLang serves {recipe.launch.model}" + "".join(f" {flag}" for flag in masked(recipe.launch.flags)))
    for line in engine.placement(recipe):
        print(line)
    return recipe


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
    return _followed(name, request)


def abort(name: str) -> int:
    print(_ask(name, {"do": "abort"}))
    return 0


def rollback(name: str, version: int | None, mode: str) -> int:
    """Back to this version's file, or to the one before the current version's."""
    return _followed(name, {"do": "rollback", "version": version, "mode": mode})


def restart(name: str, replica_id: int | None) -> int:
    """Replaces all replicas, one after the other, or only the one with this id."""
    return _replace(name, replica_id) if replica_id is not None else _followed(name, {"do": "restart"})


def _followed(name: str, request: Mapping[str, Any]) -> int:
    """Asks for an update, and shows how it goes."""
    try:
        print(_ask(name, request, timeout=None))
    except KeyboardInterrupt:
        print(f"\nit goes on: groundserve status {name} shows how far it is, groundserve update {name} --abort ends it")
        return 130
    return 0


def _replace(name: str, replica_id: int) -> int:
    _ask(name, {"do": "replace", "id": replica_id})
    print(f"{name}: replica {replica_id} finishes what it has and ends; another takes its place")
    return 0


def down(names: Sequence[str], replica_id: int | None, is_balancer: bool = False) -> int:
    """Takes down these services, or all if none is named; or replaces one replica, or the balancer, of the first."""
    if is_balancer:
        _ask(names[0], {"do": "replace balancer"})
        print(f"{names[0]}: its balancer finishes what it has and ends; another takes its place")
        return 0
    if replica_id is not None:
        return _replace(names[0], replica_id)
    found, failures = up_folders(names, with_meant=True)
    if not found and not failures:
        print("No existing services.")
    gone: set[str] = set()
    # The one with the endpoint goes after those that share it.
    hosts = {host for folder in found if (host := _host_of(folder)) is not None}
    for folder in sorted(found, key=lambda folder: folder.name in hosts):
        # A service that cannot be taken down is reported, and does not keep the others up.
        try:
            again = said_of(folder.name)
            _take_down(folder)
            print(f"{folder.name} is down{again}")
            gone.add(folder.name)
        except ConfigError as failure:
            failures.append(failure)
    for name, host in _without_endpoint(gone):
        print(f"{name} shares the endpoint of {host}, and has none until {host} is up again")
    warn(failures)
    return 1 if failures else 0


def _without_endpoint(gone: Collection[str]) -> Iterator[tuple[str, str]]:
    """The services that are still up and shared the endpoint of one that is gone, each with that one."""
    for folder in up_folders([])[0]:
        if (host := _host_of(folder)) is not None and host in gone:
            yield folder.name, host


def _host_of(folder: ServiceFolder) -> str | None:
    """The service whose endpoint it shares; None if it has one of its own, or that cannot be found out."""
    try:
        desired = folder.desired
    except BrokenState:
        return None
    return None if desired is None else desired.join


def _take_down(folder: ServiceFolder) -> None:
    if not folder.is_up():
        _forget(folder)
        return
    if not _asked_to_end(folder):
        # It is starting, or it hangs. Its children end with it, however it ends.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not _is_ended(folder, number):
                _wait_until(lambda: not folder.is_up(), _PATIENCE)
    _wait_until(lambda: not folder.is_up(), _PATIENCE)
    if folder.is_up():
        raise ConfigError(f"{folder.name} does not end: see who has {folder.path / 'lock'} open")
    _forget(folder)


def _forget(folder: ServiceFolder) -> None:
    """Whatever its controller could not stop goes too."""
    try:
        stays = folder.desired if is_enabled(folder.name) else None
    except BrokenState:
        stays = None
    if folder.is_detached:
        take_down_detached(folder)
    if stays is None:
        folder.remove_desired()
    else:
        folder.write_desired(replace(stays, is_left=False))


def _asked_to_end(folder: ServiceFolder) -> bool:
    """Asks the controller to end, and waits for as long as it answers other questions; returns whether it ended so.

    Raises ConfigError if it refuses.
    """
    answers: list[bool] = []
    refusals: list[ConfigError] = []

    def ask() -> None:
        with contextlib.suppress(control_socket.NotUp):
            try:
                control_socket.ask(folder.socket, {"do": "down"}, timeout=None)
                answers.append(True)
            except ConfigError as refusal:
                refusals.append(refusal)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive():
        asking.join(_LOOK)
        try:
            if asking.is_alive():
                control_socket.ask(folder.socket, {"do": "status"}, timeout=_SILENCE)
        except control_socket.NotUp:
            continue  # it no longer takes questions: it is about to end
        except ConfigError:
            return False
    if refusals:
        raise refusals[0]
    return bool(answers)


def _is_ended(folder: ServiceFolder, number: signal.Signals) -> bool:
    """Has its controller ended? If not, signals it. Raises ConfigError if it cannot be signalled from here."""
    holder = folder.holder()
    if holder is None:
        return not folder.is_up()
    check_host(folder)
    try:
        holder.signal(number)
    except PermissionError:
        raise ConfigError(f"{folder.name}: process {holder.pid} is another user's: it is not ours to end") from None
    return False


def _ask(name: str, request: Mapping[str, Any], timeout: float | None = 10) -> Any:
    folder = ServiceFolder(state_root(), name)
    if folder.is_detached:
        raise ConfigError(f"{name} serves on, but its controller is gone: groundserve up {name} takes it up again")
    if not folder.is_up():
        raise ConfigError(no_such_service(name))
    try:
        return control_socket.ask(folder.socket, request, say=print, timeout=timeout)
    except control_socket.NotUp:
        check_host(folder)
        raise ConfigError(f"{name} is just starting or ending: try again in a moment") from None


def _wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not is_so() and time.monotonic() < give_up:
        time.sleep(0.02)
