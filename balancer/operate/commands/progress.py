"""What the user sees while a service starts: a line for each change, or on a terminal a table that is redrawn."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from balancer.contract.status import ReplicaRow, Snapshot
from balancer.contract.words import Phase, Status
from balancer.inherited import nobody_looks, tell

COLOURS = {Phase.READY: "green", Phase.UNAVAILABLE: "yellow", Phase.LEAVING: "yellow", Phase.FAILED: "red"}


class Lines:
    """Progress as plain lines, for logs and pipes: one for each change of a replica's status."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()
        self._statuses: dict[str, Status] = {}

    def say(self, text: str) -> None:
        tell(self._out, text)

    def show(self, snapshot: Snapshot) -> None:
        rows = {row.name: row for row in snapshot.replicas}
        for name, row in rows.items():
            if self._statuses.get(name) != row.status:
                seconds = time.monotonic() - self._began
                why = f"  {row.reason}" if row.reason and row.status.phase in (Phase.FAILED, Phase.PENDING) else ""
                self.say(f"{name}  {row.status:<13} {seconds:6.1f} s{why}")
        for name in self._statuses.keys() - rows.keys():
            self.say(f"{name}  gone")
        self._statuses = {name: row.status for name, row in rows.items()}

    def finish(self) -> None:
        """Call it once the service is up: from then on, every change is a line."""


class Told(Lines):
    """The same for somebody who has asked for a change and is told how it goes: no line for what was so before."""

    def __init__(self, before: Snapshot, say: Callable[[str], None]) -> None:
        super().__init__(sys.stdout)
        self._statuses = {row.name: row.status for row in before.replicas}
        self._tell = say

    def say(self, text: str) -> None:
        self._tell(text)


class Moving(Lines):
    """Progress on a terminal, until the service is up: a row per replica with its age and the last line of its log."""

    def __init__(self, console: Console, last_line: Callable[[int], str]) -> None:
        super().__init__(sys.stdout)
        self._last_line = last_line
        self._console = console
        self._snapshot: Snapshot | None = None
        self._spinner = Spinner("dots")
        self._live: Live | None = Live(self, console=console, refresh_per_second=8)
        self._live.start()

    def say(self, text: str) -> None:
        # Printed above the table, without markup because rich would interpret [brackets].
        with self._while_anyone_looks():
            self._console.print(text, markup=False, highlight=False)

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        if self._live is None:
            super().show(snapshot)

    def finish(self) -> None:
        if self._live is not None:
            with self._while_anyone_looks():
                self._live.stop()
            self._live = None
            if self._snapshot is not None:
                self._statuses = {row.name: row.status for row in self._snapshot.replicas}

    @contextlib.contextmanager
    def _while_anyone_looks(self) -> Iterator[None]:
        """Goes on if the terminal is gone; rich would end the program if its output was a pipe."""
        try:
            yield
        except (OSError, ValueError, SystemExit):
            nobody_looks(self._out)

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        if self._snapshot is None:
            table.add_row(self._spinner, Text("starting the balancer"))
        for row in self._snapshot.replicas if self._snapshot else ():
            colour = COLOURS.get(row.status.phase, "cyan")
            mark = Text("●", colour) if _is_settled(row) else self._spinner
            age = Text(f"{row.launched_seconds:.0f} s", justify="right")
            # While the model loads, the log is more useful than the reason, which is that probes do not pass yet.
            detail = self._last_line(row.id) if row.status is Status.STARTING else ""
            detail = "" if row.status.phase is Phase.READY else detail or row.reason or self._last_line(row.id)
            last = Text(detail, "dim", overflow="ellipsis", no_wrap=True)
            table.add_row(mark, Text(row.name), Text(row.status, colour), age, last)
        return Group(table)


def _is_settled(row: ReplicaRow) -> bool:
    return row.status.phase in (Phase.READY, Phase.FAILED)
