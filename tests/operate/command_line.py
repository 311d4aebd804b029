"""groundserve as a person types it: real processes, with a state folder and free ports of its own for each test."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from balancer.operate.state import control_socket
from tests.support.program import ROOT, Program, printed
from tests.support.until import wait_until

# A replica from the lab that starts at once and ends at once.
LAB = f"exec {sys.executable} -m tests.lab.replica --exit-look 0.02 --port $GROUNDSERVE_PORT"
ANY_PORT = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
PATIENCE = 60.0


class Groundserve:
    """The command in a folder of its own. `stop_all` ends whatever a failed test left running."""

    module = "balancer.cli"  # what runs as the command

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONPATH": str(ROOT),
            # Nobody listens there: services of other people on this machine are not ours to see.
            "GROUNDSERVE_ADMIN": "http://127.0.0.1:9",
        }
        self._ups: list[Up] = []

    def service(
        self, name: str, run: str = LAB, replicas: int | dict[str, float] = 2, more: str = "", **ours: object
    ) -> Path:
        """A service file whose replicas are looked at often; `replicas` may be a replica_policy, `ours` settings."""
        path = self.folder / f"{name}.yaml"
        service = {"readiness_probe": {"path": "/health", "endpoint_probe_interval_seconds": 0.2}}
        count = {"replicas": replicas} if isinstance(replicas, int) else {"replica_policy": replicas}
        settings = {"ready_interval": 0.1, "restart_backoff": 0.1, "min_ready": 0, **ours}
        script = "".join(f"\n  {line}" for line in run.splitlines())
        path.write_text(
            f"service: {json.dumps(service | count)}\nx-groundserve: {json.dumps(settings)}\n{more}\nrun: |{script}\n"
        )
        return path

    def __call__(self, *arguments: str | Path, code: int = 0, folder: Path = ROOT) -> str:
        """What the command prints, typed in that folder; asserts its exit code. Standard error comes last."""
        words = ("-m", self.module, *map(str, arguments))
        return printed(*words, environ=self.environ, folder=folder, code=code, within=PATIENCE)

    def up(self, *arguments: str | Path, ports: Sequence[str] = ANY_PORT) -> "Up":
        """`groundserve up` in the foreground, still starting."""
        self._ups.append(Up(self, [*map(str, arguments), *ports]))
        return self._ups[-1]

    def status(self, name: str) -> dict[str, Any]:
        """What `groundserve status --json` shows of it, without starting a process to ask."""
        socket = self.folder / "state/groundserve" / name / "control.sock"
        shown: dict[str, Any] = control_socket.ask(socket, {"do": "status"})
        return shown

    def until(self, name: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of a service that fits."""
        return wait_until(lambda: self.status(name), fits=is_so)

    def processes(self) -> dict[int, str]:
        """Everything alive that was started below this test, by the state folder in its environment."""
        mark = f"XDG_STATE_HOME={self.environ['XDG_STATE_HOME']}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode()
            except OSError:
                continue
        return found

    def until_nothing_runs(self) -> None:
        wait_until(self.processes, fits=lambda processes: not processes)

    def stop_all(self) -> None:
        for up in self._ups:
            up.close()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


class Up(Program):
    """A `groundserve up` in the foreground."""

    def __init__(self, groundserve: Groundserve, arguments: list[str]) -> None:
        super().__init__("-m", "balancer.cli", "up", *arguments, name="groundserve up", environ=groundserve.environ)

    def until_up(self, patience: float = PATIENCE) -> "Up":
        self.until("stop   groundserve down", patience)
        return self

    def end(self, number: signal.Signals) -> int:
        """Its exit code after this signal."""
        self.signal(number)
        return self.wait()
