"""A service of simulated replicas on the lab's cluster, brought up as a person does."""

import json
import os
from pathlib import Path
from typing import Any

import httpx

from balancer.operate.state import control_socket
from tests.lab.hosts import ROOT
from tests.lab.kubernetes.control_plane import ControlPlane
from tests.support.program import Program, printed
from tests.support.until import wait_until

NAME = "lab"
# A simulated replica that answers with 40 events in two seconds.
FLAGS = "--tokens 40 --token-interval 0.05 --drain-grace 0.5"
PATIENCE = 300.0


class Served:
    """The service, its controller in the foreground of this machine."""

    def __init__(self, cluster: ControlPlane, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.environ = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "KUBECONFIG": str(cluster.kubeconfig),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{cluster.programs}:{os.environ['PATH']}",
        }
        self._up: Program | None = None

    def file(self, replicas: int = 2, flags: str = FLAGS, nodes: int = 1, gpus: int = 1, **ours: object) -> Path:
        """The service file; `nodes` are those of each replica, which has `gpus` on each; `ours` are settings."""
        section = {
            "image": "lab/replica-cpu:1",
            "balancer_image": "lab/balancer:1",
            "controller_image": "lab/controller:1",
        }
        settings = {"ready_interval": 0.2, "restart_backoff": 0.2, "min_ready": 0, "drain_timeout": 30, **ours}
        task = {
            "name": NAME,
            "service": {
                "readiness_probe": {"path": "/health", "endpoint_probe_interval_seconds": 0.5},
                "replicas": replicas,
            },
            "resources": {"accelerators": f"L4:{gpus}"},
            "num_nodes": nodes,
            "envs": {"LAB_FLAGS": flags},
            "x-groundserve": {**settings, "kubernetes": section},
            "run": "python -m replica --model smollm2-135m",
        }
        path = self.folder / "lab.yaml"
        path.write_text(json.dumps(task))
        return path

    def up(self, *arguments: str | Path) -> Program:
        """The controller, once the service is up."""
        words = ("-m", "balancer.cli", "up", *map(str, arguments or (self.file(),)), "--on", "kubernetes", "--open")
        self._up = Program(*words, environ=self.environ)
        self._up.until("stop   groundserve down", PATIENCE)
        wait_until(self.endpoints, within=PATIENCE, fits=lambda urls: len(urls) == 2)
        return self._up

    def up_in_the_cluster(self) -> None:
        """Applies what `groundserve manifests` prints; returns when two replicas are ready."""
        self.cluster.kubectl("apply", "-f", str(self.manifests(self.file())))
        wait_until(self.endpoints, within=PATIENCE, fits=lambda urls: len(urls) == 2)
        self.balancers_know(2)

    def manifests(self, file: Path) -> Path:
        """The file with all objects of a service."""
        path = self.folder / "objects.yaml"
        path.write_text(self("manifests", file, "--open", "--kubernetes", "1.20"))
        return path

    def balancers_know(self, count: int) -> None:
        """Waits until each balancer has so many replicas, all of them ready, of which a controller told it."""

        def rows() -> list[list[dict[str, Any]]]:
            admins = [url.replace(":30001", ":30002") for url in self.endpoints()]
            try:
                return [httpx.get(f"{admin}/status", timeout=10).json()["replicas"] for admin in admins]
            except (httpx.HTTPError, ValueError):  # it is not there yet
                return [[]]

        wait_until(
            rows,
            within=PATIENCE,
            fits=lambda said: (
                all(len(rows) == count for rows in said)
                and all(row["status"] == "READY" and row["infra"] == "kubernetes" for rows in said for row in rows)
            ),
        )

    def in_the_pod(self, *arguments: str, code: int = 0) -> str:
        """What the command prints in the pod of the cluster's controller."""
        return self.cluster.kubectl("exec", f"deploy/{NAME}-controller", "--", "groundserve", *arguments, code=code)

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """What the command prints."""
        words = ("-m", "balancer.cli", *map(str, arguments))
        return printed(*words, environ=self.environ, code=code, within=PATIENCE)

    def status(self) -> dict[str, Any]:
        socket = self.folder / "state/groundserve" / NAME / "control.sock"
        shown: dict[str, Any] = control_socket.ask(socket, {"do": "status"}, timeout=60)
        return shown

    def ready(self) -> list[dict[str, Any]]:
        return [row for row in self.status()["replicas"] if row["status"] == "READY"]

    def until_ready(self, count: int) -> list[dict[str, Any]]:
        """The rows of its replicas, once there are so many and all are ready."""
        wait_until(
            self.status,
            within=PATIENCE,
            fits=lambda s: len(s["replicas"]) == count and all(r["status"] == "READY" for r in s["replicas"]),
        )
        return self.ready()

    def endpoints(self) -> list[str]:
        """Of each balancer's pod, for clients beside the control plane."""
        pods = [pod["status"] for pod in self.cluster.pods("balancer")]
        return [f"http://{status['podIP']}:30001" for status in pods if status["phase"] == "Running"]

    def close(self) -> None:
        """Takes it down, whatever a failed test left."""
        if self._up is not None:
            self._up.close()
        kinds = "deployment,service,configmap,secret,pod,poddisruptionbudget,role,rolebinding,serviceaccount"
        selector = "app.kubernetes.io/name=groundserve"
        self.cluster.kubectl("delete", kinds, "-l", selector, "--force", "--grace-period=0", "--wait=false")
        wait_until(lambda: self.cluster.pods("replica") + self.cluster.pods("balancer"), fits=lambda pods: not pods)
