"""python -m replica.announce FILE: what a job of `groundserve up --on slurm` runs on its node.

It takes a free port there, tells it in its job's comment, and becomes the replica's command. FILE says all about the
replica; it lies on the shared file system, and only its owner can read it, because it may hold keys.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from replica import node_copy

# What stands for the port in command and variables until there is one.
PORT_MARK = "@GROUNDSERVE_PORT@"
# The same for a replica on several nodes: which of them this is, and the address at which they meet.
RANK_MARK = "@GROUNDSERVE_RANK@"
MEETING_MARK = "@GROUNDSERVE_MEETING@"
# Ports to choose from: below those that the kernel gives to outgoing connections.
_PORTS = range(20000, 30000)
# Variables that the job has from Slurm, and that go before those of FILE.
_SLURMS = (
    "SLURM",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "TMPDIR",
)
# Seconds that scontrol may take, and between two tries while the controller of Slurm does not answer.
_ANSWER = 30.0
_AGAIN = 3.0
# Seconds between two looks whether the other nodes of a replica are there.
_LOOK = 1.0


class AnnounceError(Exception):
    """The replica cannot be started on this node; the message is one line."""


@dataclass(frozen=True)
class Job:
    """What FILE says. `mark` is the comment of the job as long as it has no address."""

    argv: tuple[str, ...]
    workdir: str
    mark: str
    envs: Mapping[str, str] = field(repr=False)
    local_models: str = ""
    nodes: int = 1

    @classmethod
    def read(cls, file: Path) -> "Job":
        try:
            said: Any = json.loads(file.read_bytes())
            argv, envs = tuple(said["argv"]), dict(said["envs"])
            models, nodes = said.get("local_models") or "", int(said.get("nodes", 1))
            return cls(argv, said["workdir"], said["mark"], envs, models, nodes)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise AnnounceError(f"{file} does not say what to start here: {error}") from None

    def filled(self, values: Mapping[str, str]) -> "Job":
        """With these values in the place of the marks."""

        def filled(text: str) -> str:
            for mark, value in values.items():
                text = text.replace(mark, value)
            return text

        envs = {name: filled(value) for name, value in self.envs.items()}
        return replace(self, argv=tuple(map(filled, self.argv)), envs=envs)


def main(file: Path, environ: Mapping[str, str]) -> None:
    """Becomes the replica's command. Raises AnnounceError."""
    job = Job.read(file)
    if job.local_models:
        copied = node_copy.on_this_node(job.argv, job.envs, job.local_models, say)
        job = replace(job, argv=copied.argv, envs=copied.envs)
    address = own_address(environ)
    port = free_port(address)
    job = job.filled({PORT_MARK: str(port)})
    rank = int(environ.get("SLURM_PROCID", "0")) if job.nodes > 1 else 0
    if job.nodes > 1:
        job = _together(job, file, rank, address, port, environ)
    envs = {**job.envs, **{name: value for name, value in environ.items() if name.startswith(_SLURMS)}}
    envs.setdefault("REPLICA_HOST", address)
    if rank == 0:
        announce(f"{job.mark},at=http://{_in_url(address)}:{port}", environ)
    try:
        os.chdir(job.workdir)
        os.execvpe(job.argv[0], job.argv, envs)
    except OSError as error:
        raise AnnounceError(f"{error.filename or job.argv[0]}: {error.strerror}") from None


def _together(job: Job, file: Path, rank: int, address: str, port: int, environ: Mapping[str, str]) -> Job:
    """The job of one of several nodes, once all are there: SGLang's first node waits for the others only so long."""
    here = {"node": environ.get("SLURMD_NODENAME", ""), "address": address, "port": port}
    here["meeting"] = f"{_in_url(address)}:{free_port(address)}"
    all_of_them = meet(file, rank, job.nodes, here)
    told = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "\n".join(str(one["address"]) for one in all_of_them),
    }
    meeting = str(all_of_them[0]["meeting"])
    return replace(job, envs={**job.envs, **told}).filled({RANK_MARK: str(rank), MEETING_MARK: meeting})


def meet(
    file: Path, rank: int, count: int, here: Mapping[str, object], pause: Callable[[float], None] = time.sleep
) -> list[dict[str, Any]]:
    """Writes `here` beside FILE, for the others, and returns what each of them wrote once all have, by rank."""
    ours = file.with_name(f"{file.name}.{rank}")
    fresh = file.with_name(f".{ours.name}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
            json.dump(here, opened)
        fresh.replace(ours)
    except OSError as error:
        raise AnnounceError(f"{ours}: {error.strerror}") from None
    found: dict[int, dict[str, Any]] = {}
    while True:
        for other in set(range(count)) - found.keys():
            with contextlib.suppress(OSError, ValueError):
                found[other] = json.loads(file.with_name(f"{file.name}.{other}").read_bytes())
        if len(found) == count:
            return [found[other] for other in range(count)]
        pause(_LOOK)


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def own_address(environ: Mapping[str, str]) -> str:
    """The address by which the host that submitted the job reaches this node; of its name, if there is no route."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((environ.get("SLURM_SUBMIT_HOST", ""), 9))  # sends nothing
                if not (address := probe.getsockname()[0]).startswith("127."):
                    return str(address)
        except OSError:
            continue
    try:
        return str(socket.getaddrinfo(environ.get("SLURMD_NODENAME") or socket.gethostname(), None)[0][4][0])
    except OSError:
        raise AnnounceError(f"{socket.gethostname()} does not know an address of its own") from None


def free_port(address: str, tries: int = 200) -> int:
    """A port that no other job on this node chooses while ours loads, and does not listen there yet.

    What keeps it is a name that, as a port, belongs to a network and may be held by one; the command inherits it.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in random.sample(_PORTS, tries):
        with socket.socket(family) as trial, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
            try:
                trial.bind((address, port))
                name.bind(f"\0groundserve port {port}")
            except OSError:
                continue
            os.set_inheritable(name.detach(), True)
            return port
    raise AnnounceError(f"no port is free on {address}")


def announce(comment: str, environ: Mapping[str, str], pause: Callable[[float], None] = time.sleep) -> None:
    """Rewrites the comment of this job; waits for as long as Slurm's controller does not answer."""
    command = ["scontrol", "update", f"JobId={environ.get('SLURM_JOB_ID', '')}", f"Comment={comment}"]
    last = ""
    while (why := _failure_of(command)) is not None:
        if why != last:
            say(f"waits for Slurm to take its address: {why}")
        last = why
        pause(_AGAIN)


def _failure_of(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_ANSWER
        )
    except subprocess.TimeoutExpired:
        return "it does not answer"
    except OSError as error:
        raise AnnounceError(f"{command[0]}: {error.strerror}: it has to be on each node's PATH") from None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"scontrol ended with {done.returncode}"


def say(line: str) -> None:
    print(f"replica: {line}", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), os.environ)
    except AnnounceError as error:
        print(f"replica: {error}", file=sys.stderr)
        sys.exit(os.EX_CONFIG)
