"""Is this machine able to run that many replicas: GPUs, memory, cores. Says so before anything is started."""

import json
import os
import subprocess
from dataclasses import dataclass, replace

from balancer.errors import ConfigError
from balancer.operate.engines.local import limits
from balancer.operate.engines.local.kinds import is_of_kind
from balancer.operate.recipe.recipe import Recipe, python, with_packages


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as `python -m replica --list-gpus` lists it; memory in MiB, 0 where nobody knows."""

    name: str
    is_split: bool
    held_by: str | None
    index: int = 0
    memory_total: int = 0
    memory_used: int = 0


def gpus() -> tuple[Gpu, ...]:
    """Raises ConfigError when the driver does not answer."""
    rows = json.loads(_replica("--list-gpus"))
    return tuple(
        Gpu(row["name"], bool(row["mig"]), row["held_by"], row["index"], row["memory_total"], row["memory_used"])
        for row in rows
        if "problem" not in row
    )


def check_model(recipe: Recipe) -> None:
    """Lets `python -m replica` look at model and flags without starting; raises ConfigError with its own words."""
    if recipe.launch is not None:
        argv = recipe.command(1, 8000).argv
        flags = argv[len(python("replica")) :]
        # On the CPU: a lease is not what is asked here, and GPUs may be in use by the replicas that these replace.
        _replica("--device", "cpu", "--dry-run", *flags)


def seats(there: tuple[Gpu, ...], each: int) -> list[tuple[Gpu, ...]]:
    """The groups of GPUs that replicas with `each` of them may lease now, in the order in which they are taken.

    Aligned, as `python -m replica` leases them: 0-1, 2-3, ... for two.
    """
    whole = [gpu for gpu in there if not gpu.is_split]
    groups = [tuple(whole[start : start + each]) for start in range(0, len(whole) - each + 1, each)]
    return [group for group in groups if all(gpu.held_by is None for gpu in group)]


def placed(recipe: Recipe, there: tuple[Gpu, ...]) -> list[str]:
    """A line for each GPU: what it is, and who has it or gets it when the service comes up."""
    most = recipe.spec.max_replicas
    lines = []
    order = [gpu for group in seats(there, recipe.gpus) for gpu in group]
    for gpu in there:
        if gpu.is_split:
            use = "split by MIG, which no replica takes"
        elif gpu.held_by is not None:
            use = f"held by {gpu.held_by}"
        elif gpu in order:
            number = order.index(gpu) // recipe.gpus + 1
            if number <= recipe.spec.min_replicas:
                use = f"for replica {number}"
            else:
                use = "stays free" if most is not None and number > most else "for when the load asks for more"
        else:
            use = f"stays free: a replica takes {recipe.gpus} that lie side by side"
        free = gpu.memory_total - gpu.memory_used
        memory = f", {free / 1024:.0f} of {gpu.memory_total / 1024:.0f} GiB free" if gpu.memory_total else ""
        lines.append(f"GPU {gpu.index} ({gpu.name}{memory}): {use}")
    return lines


def fitted_here(recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
    """The recipe fitted to this machine, and all there is to warn of; raises ConfigError when it cannot run here."""
    if not os.path.isdir(recipe.workdir):  # noqa: PTH112 - the path's own method raises for names that are too long
        what = "run: cd" if recipe.launch and recipe.launch.folder else "workdir"
        raise ConfigError(f"{recipe.spec.source}: {what}: there is no folder {recipe.workdir}")
    there = gpus() if recipe.launch is not None or recipe.gpus else ()
    made, warnings = fitted(recipe, recipe.spec.min_replicas, there, limits.memory() / 1e9, running)
    check_model(made)
    return made, [*recipe.spec.warnings, *recipe.notes, *warnings]


def fitted(
    recipe: Recipe, count: int, there: tuple[Gpu, ...], memory: float, running: int = 0
) -> tuple[Recipe, list[str]]:
    """The recipe with what one replica gets here, and warnings; raises ConfigError when `count` replicas do not fit.

    `memory` is what is free, in GB, beside the service's own `running` replicas.
    """
    spec, warnings = recipe.spec, []
    fits = None if not spec.memory else running + int(memory / spec.memory)
    if spec.memory is not None and spec.memory * (count - running) > memory:
        raise ConfigError(
            f"{_replicas(count)} of {spec.name} want {spec.memory * count:g} GB of memory, {memory:.1f} GB are free: "
            "stop something, or run fewer replicas"
        )
    if spec.cpus is not None and spec.cpus * count > limits.cores():
        warnings.append(
            f"{_replicas(count)} of {spec.name} want {spec.cpus * count:g} cores; here are {limits.cores():g}"
        )
    whole = [gpu for gpu in there if not gpu.is_split]
    # SGLang takes a GPU where there is one, asked for or not.
    each = recipe.gpus or (1 if whole and recipe.launch else 0)
    if recipe.launch is None:
        if each and count > 1:
            warnings.append(f"{spec.source}: run: starts no SGLang that is known, so nothing keeps its GPUs apart")
    elif each * count > len(whole):
        wanted = f" ({', '.join(spec.accelerators)})" if spec.accelerators else ""
        has = f"this machine has {len(whole) or 'none'}"
        if len(there) > len(whole):
            has += f" and {len(there) - len(whole)} split by MIG"
        what = "run fewer replicas" if len(whole) >= each else "smollm2 and tiny-llava run without"
        raise ConfigError(f"{_replicas(count)} of {spec.name} want {_gpus(each)} each{wanted}; {has}: {what}")
    elif each:
        fits = len(whole) // each if fits is None else min(fits, len(whole) // each)
        if not running and (free := len(seats(there, each))) < count:
            warnings.append(
                f"{spec.source}: others hold GPUs, so that {free} of {_replicas(count)} can start now: "
                f"groundserve check {spec.source} says who holds them"
            )
    known = [kind for kind in spec.accelerators if any(is_of_kind(gpu.name, kind, gpu.memory_total) for gpu in whole)]
    if each and whole and spec.accelerators and not known:
        kinds = ", ".join(spec.accelerators)
        warnings.append(f"{spec.source}: resources.accelerators: none of {kinds} is here; {whole[0].name} is used")
    kind = known[0] if known else whole[0].name.removeprefix("NVIDIA ") if whole else "GPU"
    resources = f"{each}x {kind}" if each else "1x CPU"
    return replace(recipe, gpus=each, resources=resources, fits=fits), warnings


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _replica(*flags: str) -> str:
    answer = subprocess.run(
        [*python("replica"), *flags],
        env={**os.environ, **with_packages({})},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines() or ["python -m replica failed and said nothing"]
        raise ConfigError(said[-1].removeprefix("replica: "))
    return answer.stdout
