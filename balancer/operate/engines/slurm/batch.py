"""What a replica's job is made of: sbatch's flags, the batch script, and the file that says how to start it."""

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

# As replica/announce.py has it: what stands for the port until there is one.
PORT_MARK = "@GROUNDSERVE_PORT@"
# Seconds that a replica waits for the GPU that Slurm gave it, if a process outside of Slurm has it.
_LEASE_WAIT_THERE = "60"
# Variables of our own session, which mean nothing on another host, and choices of GPUs, which are Slurm's.
_OURS_ALONE = ("SLURM", "SBATCH_", "SSH_", "XDG_", "DBUS_", "CUDA_VISIBLE_DEVICES", "DISPLAY", "TMPDIR", "HOSTNAME")


@dataclass(frozen=True, slots=True)
class Batch:
    """One replica's job, ready to be submitted. `file` holds its command and variables, which may be secrets."""

    mark: Mark
    file: Path
    flags: tuple[str, ...]

    @property
    def script(self) -> str:
        return f"#!/bin/sh\nexec {' '.join(map(shlex.quote, self._command))}\n"

    @property
    def _command(self) -> tuple[str, ...]:
        envs = with_packages({})
        return ("env", f"PYTHONPATH={envs['PYTHONPATH']}", *python("replica.announce"), str(self.file))

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


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
        "argv": [*shlex.split(asked.container or ""), *invocation.argv],
        "workdir": str(invocation.workdir),
        "mark": mark.text,
        "envs": envs,
        "local_models": asked.local_models,
    }
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_whole(file, json.dumps(said))
    return Batch(mark, file, tuple(_flags(recipe, asked, log)))


def _flags(recipe: Recipe, asked: Slurm, log: Path) -> list[str]:
    flags = ["--nodes=1", "--ntasks=1", f"--output={str(log).replace('%', '%%')}", "--open-mode=append"]
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
