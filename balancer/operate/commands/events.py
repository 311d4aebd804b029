"""`groundserve events`: what happened to the services, in one order of time."""

import argparse
import contextlib
import fnmatch
import heapq
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime

from balancer.contract.moment import since
from balancer.errors import ConfigError
from balancer.operate.commands.log_reader import LogReader
from balancer.operate.commands.show import warn
from balancer.operate.engines import rotation
from balancer.operate.state.event_log import Line, What
from balancer.operate.state.service_folder import ServiceFolder, folders, state_root

_LOOK = 0.2  # seconds between two looks for new events

# An event, and the name of the service that it happened to.
Told = tuple[str, Line]


def start(text: str) -> float:
    """For argparse: an age or a time, of this machine's zone as the times in the table; seconds since 1970."""
    try:
        return since(text, time.time(), zone=None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def events(patterns: Sequence[str], follow: bool, began: float, as_json: bool) -> int:
    """Prints the events of these services, or of all that ever ran here; raises ConfigError if a pattern fits none."""
    chosen = _chosen(patterns)
    table = _Table([folder.name for folder in chosen])
    readers: dict[str, LogReader] = {}
    failures: list[ConfigError] = []
    with contextlib.ExitStack() as opened:
        for folder in chosen:
            try:
                reader = LogReader(folder.event_log, rotation.files(folder.event_log))
            except OSError as failure:
                failures.append(ConfigError(f"{folder.name}: {folder.event_log}: {failure.strerror}"))
            else:
                readers[folder.name] = opened.enter_context(reader)
        warn(failures)

        def show(of: Callable[[LogReader], Iterable[str]]) -> None:
            each = [_told(name, of(reader), began) for name, reader in readers.items()]
            for service, line in heapq.merge(*each, key=lambda told: told[1].time):
                as_text = json.dumps({"service": service, **line.to_json()}) if as_json else table.row(service, line)
                print(as_text, flush=follow)

        if not as_json:
            print(table.head, flush=follow)
        show(LogReader.all)
        while follow:
            time.sleep(_LOOK)
            show(LogReader.more)
    return 1 if failures else 0


def _chosen(patterns: Sequence[str]) -> list[ServiceFolder]:
    known = folders(state_root())
    for pattern in patterns:
        if not fnmatch.filter([folder.name for folder in known], pattern):
            names = ", ".join(folder.name for folder in known) or "none"
            raise ConfigError(f"no service {pattern} ever ran here; those that did: {names}")
    return [f for f in known if not patterns or any(fnmatch.fnmatchcase(f.name, pattern) for pattern in patterns)]


def _told(service: str, lines: Iterable[str], began: float) -> Iterator[Told]:
    for text in lines:
        line = Line.of(text)
        if line is not None and line.time >= began:
            yield service, line


class _Table:
    """Rows one at a time, so the columns are as wide as what may come."""

    def __init__(self, services: Sequence[str]) -> None:
        self._widths = (19, max(map(len, ("SERVICE", *services))), len("replica 999"), max(map(len, What)))
        self.head = self._aligned("TIME", "SERVICE", "OBJECT", "EVENT", "MESSAGE")

    def row(self, service: str, line: Line) -> str:
        if line.replica is not None:
            about = f"replica {line.replica}"
        else:
            about = "balancer" if line.what.startswith("balancer_") else "service"
        when = datetime.fromtimestamp(line.time).strftime("%Y-%m-%d %H:%M:%S")
        return self._aligned(when, service, about, line.what, line.message)

    def _aligned(self, *cells: str) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=False)]
        return "  ".join([*padded, *cells[len(padded) :]]).rstrip()
