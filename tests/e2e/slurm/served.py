"""groundserve on the lab's Slurm, typed by an ordinary user on the host of Slurm's controller."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from balancer.operate.state import control_socket
from tests.lab.hosts import ROOT, USER
from tests.lab.slurm import SlurmLab
from tests.support.until import wait_until

# A replica of the lab that is ready at once, and streams for two seconds.
LAB = f"exec {sys.executable} -m tests.lab.replica --host $REPLICA_HOST --port $GROUNDSERVE_PORT --exit-look 0.05"
STREAMS = f"{LAB} --tokens 40 --token-interval 0.05 --drain-plugin --drain-grace 0.5"
ENDPOINT = "http://10.77.0.11:30001"


class Served:
    """One service called `name`. Its files lie in `home`, on the shared file system."""

    def __init__(self, slurm: SlurmLab, name: str) -> None:
        self.slurm = slurm
        self.name = name
        self.home = slurm.shared / name
        self.state = self.home / "state/groundserve" / name
        self.at("mkdir", "-p", str(self.home))

    def at(self, *words: str, code: int | None = 0, within: float = 120.0, **environ: str) -> str:
        """A command on that host, which has so many seconds."""
        variables = {"XDG_STATE_HOME": str(self.home / "state"), "PYTHONPATH": str(ROOT), **environ}
        return self.slurm.ctl.run(*words, user=USER, code=code, within=within, **variables)

    def __call__(self, *words: str, code: int | None = 0, within: float = 120.0, **environ: str) -> str:
        """What the command prints, standard error last."""
        return self.at(sys.executable, "-m", "balancer.cli", *words, code=code, within=within, **environ)

    def file(
        self,
        run: str = STREAMS,
        replicas: int = 2,
        slurm: Mapping[str, object] | None = None,
        nodes: int = 1,
        gpus: int = 1,
        **ours: object,
    ) -> str:
        """The path of a service file. Its replicas take `gpus` of each of their nodes, and are looked at often."""
        service = {"replicas": replicas, "readiness_probe": {"path": "/health", "endpoint_probe_interval_seconds": 0.5}}
        settings = {"min_ready": 0, "restart_backoff": 0.2, "stop_grace": 10, **ours}
        if slurm:
            settings["slurm"] = slurm
        text = f"name: {self.name}\nservice: {json.dumps(service)}\nresources: {{accelerators: 'L4:{gpus}'}}\n"
        text += f"envs: {{REPLICA_PRETEND_GPUS: '3'}}\nnum_nodes: {nodes}\n"
        path = self.slurm.shared / self.name / f"{self.name}.yaml"
        path.write_text(f"{text}x-groundserve: {json.dumps(settings)}\nworkdir: {ROOT}\nrun: |\n  {run}\n")
        path.chmod(0o644)
        return str(path)

    def up(self, file: str, *flags: str, code: int = 0, within: float = 120.0, **environ: str) -> str:
        ports = ("--listen", "0.0.0.0:30001", "--admin", "127.0.0.1:30002", "--open")
        return self("up", file, "--on", "slurm", "-d", *ports, *flags, code=code, within=within, **environ)

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = control_socket.ask(self.state / "control.sock", {"do": "status"})
        return shown

    def until(self, is_so: Callable[[dict[str, Any]], object], within: float = 60.0) -> dict[str, Any]:
        return wait_until(self.status, lambda: f"{self.queue()}\n{self.log()}", within, is_so)

    def until_ready(self, count: int, within: float = 60.0) -> dict[str, Any]:
        """Waits until there are this many replicas, all of them ready."""
        return self.until(
            lambda status: [row["status"] for row in status["replicas"]] == ["READY"] * count, within=within
        )

    def log(self) -> str:
        log = self.state / "controller.log"
        return log.read_text()[-3000:] if log.exists() else ""

    def queue(self) -> str:
        return self.slurm.ctl.run("squeue", "--format=%i|%j|%T|%r|%N|%k", code=None)

    def hosts(self, row: Mapping[str, Any]) -> list[str]:
        """The nodes of a replica, which `status` has as Slurm's pattern."""
        return self.slurm.ctl.run("scontrol", "show", "hostnames", row["node"]).split()

    def jobs(self) -> list[str]:
        """The ids of all jobs that are there."""
        return self.slurm.ctl.run("squeue", "--noheader", "--format=%i").split()
