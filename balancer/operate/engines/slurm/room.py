"""Whether a service's replicas fit into a partition, and what there is: asked of Slurm before anything is started."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from balancer.errors import ConfigError
from balancer.operate.engines import capacity
from balancer.operate.engines.slurm.cluster import Node, answered, nodes
from balancer.operate.recipe.recipe import Recipe, for_kind
from balancer.spec.local_disk import network_type
from balancer.spec.schema import Slurm

# Nodes that `check` lists one by one.
_LISTED = 16


def fit(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with what a replica gets in its partition and how many have room there, and all warnings.

    Whether they are free now is not asked: Slurm queues what is not. Raises ConfigError if it can never run.
    """
    spec = recipe.spec
    answered("sbatch", "--version")
    if spec.operation.gpu_share:
        raise ConfigError(
            f"{spec.source}: x-groundserve.gpu_share: Slurm gives a GPU to one job: --on local shares them"
        )
    if not os.path.isdir(recipe.workdir):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        raise ConfigError(f"{spec.source}: workdir: there is no folder {recipe.workdir}")
    there = _partition(recipe)
    warnings: list[str] = []
    if len(spec.accelerators) > 1 and (kind := _first_with_room(recipe, there)):
        recipe = for_kind(recipe, kind)
    kind = next(iter(spec.accelerators), "")
    asked = spec.operation.slurm or Slurm()
    gres = asked.gres
    if gres is None and recipe.gpus:
        kinds = _of_kind(kind, there)
        if not kinds and any(name for node in there for name in node.gpus):
            warnings.append(f"{spec.source}: resources.accelerators: no GPU here is called {kind}: any is taken")
        gres = f"gpu:{kinds[0]}:{recipe.gpus}" if kinds else f"gpu:{recipe.gpus}"
        room = _room([_gpus(node, kinds) // recipe.gpus for node in there], spec.num_nodes)
        if room < spec.min_replicas:
            raise ConfigError(
                f"{spec.min_replicas} replicas of {spec.name} want {recipe.gpus} GPU{'s' * (recipe.gpus > 1)} each"
                f"{f' ({kind})' if kind else ''}{f' on {spec.num_nodes} nodes' if spec.num_nodes > 1 else ''}; "
                f"partition {there[0].partition} has room for {room}: run fewer replicas, or name another with "
                "x-groundserve.slurm.partition"
            )
        recipe = replace(recipe, fits=room)
    resources = f"{recipe.gpus}x {kind or 'GPU'}" if recipe.gpus else "1x CPU"
    if spec.num_nodes > 1:
        resources = f"{spec.num_nodes}x ({resources})"
    asking = asked.model_copy(update={"gres": gres})
    made = replace(
        recipe,
        resources=resources,
        spec=replace(recipe.spec, operation=recipe.spec.operation.model_copy(update={"slurm": asking})),
    )
    capacity.check_model(made)
    return made, [*spec.warnings, *recipe.notes, *warnings]


def _room(each: Sequence[int], nodes: int) -> int:
    """For how many replicas there is room, each of which has a part on so many nodes; `each` node has room for so many
    parts, of which no two are one replica's.
    """
    room = sum(each) // nodes
    while sum(min(parts, room) for parts in each) < room * nodes:
        room -= 1
    return room


def described(recipe: Recipe) -> list[str]:
    """For the user: a line for each node of the partition, or one for all if there are many."""
    there = _partition(recipe)
    asked = recipe.spec.operation.slurm or Slurm()
    wants = f"gres {asked.gres}" if asked.gres else "no GPU"
    nodes = f" of {recipe.spec.num_nodes} nodes" if recipe.spec.num_nodes > 1 else ""
    lines = [f"a job{nodes} for each replica in partition {there[0].partition}, {wants}"]
    if len(there) > _LISTED:
        free = sum(_free(node) for node in there if node.takes_jobs)
        return [*lines, f"{len(there)} nodes with {sum(sum(n.gpus.values()) for n in there)} GPUs, {free} of them free"]
    for node in there:
        count = sum(node.gpus.values())
        kinds = ", ".join(filter(None, node.gpus))
        gpus = f"{_free(node)} of {count} GPU{'s' * (count != 1)} free" if count else "no GPU"
        lines.append(f"node {node.name}{f' ({kinds})' if kinds else ''}, {node.state}: {gpus}")
    return lines


def is_shared(folder: os.PathLike[str]) -> bool:
    """Does the folder lie on a file system of a network, as far as can be seen?"""
    return bool(network_type(folder))  # type: ignore[arg-type]


def _partition(recipe: Recipe) -> list[Node]:
    """The nodes of the partition that the jobs go to. Raises ConfigError if there is none of that name."""
    asked = recipe.spec.operation.slurm or Slurm()
    everything = nodes()
    if asked.partition is None:
        found = [node for node in everything if node.is_default]
        if not found:
            raise ConfigError(
                f"{recipe.spec.source}: this cluster has no default partition: name one with "
                f"x-groundserve.slurm.partition ({_names(everything)})"
            )
        return found
    wanted = asked.partition.split(",")
    found = [node for node in everything if node.partition in wanted]
    if not found:
        raise ConfigError(
            f"{recipe.spec.source}: x-groundserve.slurm.partition: there is no partition {asked.partition}; there is "
            f"{_names(everything)}"
        )
    return list({node.name: node for node in found}.values())


def _names(everything: Sequence[Node]) -> str:
    return ", ".join(sorted({node.partition for node in everything})) or "none"


def _first_with_room(recipe: Recipe, there: Sequence[Node]) -> str:
    """Of several kinds in the file, the first that the partition has enough of; empty if types say nothing."""
    for kind, count in recipe.spec.accelerators.items():
        if (kinds := _of_kind(kind, there)) and any(_gpus(node, kinds) >= count for node in there):
            return kind
    return ""


def _of_kind(kind: str, there: Sequence[Node]) -> list[str]:
    """Slurm's names for GPUs of this kind, the most frequent first: `a100` and `nvidia_a100_80gb` for `A100`."""
    counts: dict[str, int] = {}
    for node in there:
        for name, count in node.gpus.items():
            if name and _plain(kind) and _plain(kind) in _plain(name):
                counts[name] = counts.get(name, 0) + count
    return sorted(counts, key=lambda name: -counts[name])


def _plain(kind: str) -> str:
    return re.sub(r"[^a-z0-9]", "", kind.lower())


def _gpus(node: Node, kinds: Sequence[str]) -> int:
    return sum(count for name, count in node.gpus.items() if not kinds or name == kinds[0])


def _free(node: Node) -> int:
    return max(0, sum(node.gpus.values()) - node.used) if node.takes_jobs else 0
