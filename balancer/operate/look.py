"""What services there are and what they do: `groundserve status` and `groundserve logs`."""

import fnmatch
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import httpx
from rich.console import Console
from rich.text import Text

from balancer.errors import ConfigError
from balancer.operate import control
from balancer.operate.state import ServiceFolder, folders, state_root
from balancer.views.progress import COLOURS
from balancer.views.status import ServiceRow, Snapshot
from balancer.views.table import tables

# The admin port that is asked when no service of our own is known: Compose's, or one started by hand.
STRANGER = "GROUNDSERVE_ADMIN"
_DEFAULT_ADMIN = "http://127.0.0.1:30002"


LogOf = Literal["replicas", "balancer", "controller"]


@dataclass(frozen=True, slots=True)
class Display:
    """How `status` shows what it found."""

    endpoint_only: bool = False
    as_json: bool = False
    verbose: bool = False
    watch: bool = False


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
    snapshots = [snapshot_of(folder) for folder in up_folders(patterns)]
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


def logs(name: str, ids: Sequence[int], of: LogOf, follow: bool, tail: int | None) -> int:
    """`ids`: which replicas, none meaning all."""
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
    if not paths or not any(path.exists() for path in paths.values()):
        some = f"replica {' or '.join(map(str, ids))}" if ids else "any replica"
        what = some if of == "replicas" else f"the {of}"
        known_names = ", ".join(other.name for other in folders(state_root())) or "none"
        raise ConfigError(f"there is no log of {what} of {name}; services that ran here: {known_names}")
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


def up_folders(patterns: Iterable[str]) -> list[ServiceFolder]:
    """Services that are up and fit, those without their controller too; raises ConfigError for what fits none."""
    there = [folder for folder in folders(state_root()) if folder.is_up() or folder.left is not None]
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(folder.name, pattern) for folder in there):
            raise ConfigError(unknown(pattern))
    return [f for f in there if not patterns or any(fnmatch.fnmatchcase(f.name, pattern) for pattern in patterns)]


def unknown(name: str) -> str:
    """For a person who named a service that is not up."""
    there = ", ".join(folder.name for folder in folders(state_root()) if folder.is_up())
    return f"no service {name} is up here; {f'there is {there}' if there else 'none is'}"


def snapshot_of(folder: ServiceFolder) -> Snapshot:
    """What its controller says; without one, its balancer."""
    if (left := folder.left) is not None:
        return _answered(f"http://{left.admin}") or Snapshot(
            ServiceRow(folder.name, "-", "FAILED", None, "", "-", 0, 0, 0, 0)
        )
    try:
        return Snapshot.from_json(control.ask(folder.socket, {"do": "status"}))
    except (control.NotUp, ConfigError):
        # Up by its lock, but it does not answer: it begins, it ends, or it hangs.
        return Snapshot(ServiceRow(folder.name, "-", "CONTROLLER_INIT", None, "", "-", 0, 0, 0, 0))


def _of_a_stranger() -> list[Snapshot]:
    """The balancer at GROUNDSERVE_ADMIN or the default address, if one answers there."""
    snapshot = _answered(os.environ.get(STRANGER, _DEFAULT_ADMIN).rstrip("/"))
    return [] if snapshot is None else [snapshot]


def _answered(admin: str) -> Snapshot | None:
    """What the balancer at this admin port says; None where none answers."""
    try:
        answer = httpx.get(f"{admin}/status", timeout=5, trust_env=False)
        return Snapshot.from_json(answer.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
