"""What a replica's job is made of: sbatch's flags, the batch script, and the file that says how to start it."""

import contextlib
import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from balancer.operate.engines.slurm.cluster import Mark
from balancer.operate.recipe.recipe import LEASE_WAIT, Recipe, python, with_packages
from balancer.operate.state.state_file import write_whole
from balancer.spec.schema import Slurm

# As replica/announce.py has them: what stands for the port until there is one; for which of the nodes of one replica
# this is, and for the address where these meet.
PORT_MARK = "@GROUNDSERVE_PORT@"
RANK_MARK = "@GROUNDSERVE_RANK@"
MEETING_MARK = "@GROUNDSERVE_MEETING@"
# Seconds that a replica waits for the GPU that Slurm gave it, if a process outside of Slurm has it.
_LEASE_WAIT_THERE = "60"
# Variables of our own session, which mean nothing on another host, and choices of GPUs, which are Slurm's.
_OURS_ALONE = ("SLURM", "SBATCH_", "SSH_", "XDG_", "DBUS_", "CUDA_VISIBLE_DEVICES", "DISPLAY", "TMPDIR", "HOSTNAME")


@dataclass(frozen=True, slots=True)
class Batch:
    """One replica's job, ready to be submitted. `file` holds its command and variables, which may be secrets.

    `step` starts the same command on each of several nodes; empty for one.
    """

    mark: Mark
    file: Path
    flags: tuple[str, ...]
    step: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        return f"#!/bin/sh\nexec {' '.join(map(shlex.quote, (*self.step, *self._command)))}\n"

    @property
    def _command(self) -> tuple[str, ...]:
        envs = with_packages({})
        return ("env", f"PYTHONPATH={envs['PYTHONPATH']}", *python("replica.announce"), str(self.file))

    def remove(self) -> None:
        remove(self.file)


@dataclass(frozen=True, slots=True)
class Place:
    """One of several nodes of a replica: its name, and the port where the replica's process there may listen."""

    node: str
    address: str
    port: int


def places(file: Path) -> list[Place]:
    """Where the nodes of a replica are, as each has written beside its file; empty for a replica on one node."""
    found = []
    for one in sorted(file.parent.glob(f"{file.name}.*")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            said = json.loads(one.read_bytes())
            found.append(Place(said["node"], said["address"], int(said["port"])))
    return found


def remove(file: Path) -> None:
    """Removes a job's file, and what its nodes have written beside it."""
    for one in (file, *file.parent.glob(f"{file.name}.*")):
        one.unlink(missing_ok=True)


def batch(recipe: Recipe, mark: Mark, file: Path, log: Path, key: Mapping[str, str]) -> Batch:
    """Writes the file. `key` is the variable by which a replica finds its key. Raises BrokenState."""
    asked = recipe.spec.operation.slurm or Slurm()
    invocation = recipe.invocation(mark.id, PORT_MARK)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_OURS_ALONE)}
    envs = {**ours, **invocation.envs, **key}
    if LEASE_WAIT in invocation.envs and LEASE_WAIT not in os.environ:
        envs[LEASE_WAIT] = _LEASE_WAIT_THERE
    if not recipe.gpus and asked.gres is None:
        envs["CUDA_VISIBLE_DEVICES"] = ""  # the node may have GPUs, which then are others'
    said = {
        "argv": [*shlex.split(asked.container or ""), *invocation.argv, *recipe.among_nodes(RANK_MARK, MEETING_MARK)],
        "workdir": str(invocation.workdir),
        "mark": mark.text,
        "envs": envs,
        "local_models": asked.local_models,
        "nodes": recipe.spec.num_nodes,
    }
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_whole(file, json.dumps(said))
    return Batch(mark, file, tuple(_flags(recipe, asked, log)), _step(recipe))


def surroundings(recipe: Recipe) -> str:
    """What of the file goes into a job besides its command and variables: with another of these it is another job.

    Which nodes it avoids changes only where the next one runs. Defaults are left out: with another key that nobody has
    used yet it is the same job.
    """
    section = recipe.spec.operation.slurm or Slurm()
    asked = section.model_dump(mode="json", exclude={"exclude"}, exclude_defaults=True)
    spec = recipe.spec
    return json.dumps([dict(spec.accelerators), spec.cpus, spec.memory, asked], sort_keys=True)


def _step(recipe: Recipe) -> tuple[str, ...]:
    """srun on all nodes at once: where one part ends with an error, all end."""
    nodes, cpus = recipe.spec.num_nodes, recipe.spec.cpus
    if nodes == 1:
        return ()
    flags = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return ("srun", *flags, *([f"--cpus-per-task={math.ceil(cpus)}"] if cpus else []))


def _flags(recipe: Recipe, asked: Slurm, log: Path) -> list[str]:
    nodes = recipe.spec.num_nodes
    flags = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--open-mode=append"]
    flags.append(f"--output={str(log).replace('%', '%%')}")
    for name, value in (
        ("partition", asked.partition),
        ("account", asked.account),
        ("qos", asked.qos),
        ("time", asked.time),
        ("gres", asked.gres or (f"gpu:{recipe.gpus}" if recipe.gpus else None)),
        ("cpus-per-task", recipe.spec.cpus and math.ceil(recipe.spec.cpus)),
        ("mem", recipe.spec.memory and f"{math.ceil(recipe.spec.memory * 1024)}M"),
    ):
        if value is not None:
            flags.append(f"--{name}={value}")
    return flags


def excluding(asked: Slurm | None, shunned: list[str]) -> list[str]:
    """sbatch's flag for the nodes that the file excludes, and these."""
    nodes = [*filter(None, [asked.exclude if asked is not None else None]), *shunned]
    return [f"--exclude={','.join(nodes)}"] if nodes else []
