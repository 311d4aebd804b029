"""Whether this machine has enough GPUs, memory and cores for a service's replicas. Checked before any is started."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from balancer.errors import ConfigError
from balancer.operate.engines import limits
from balancer.operate.recipe.recipe import GPU_SHARE, Recipe, check_one_machine, for_kind, python, with_packages
from balancer.spec.service_file import NOTHING, Spec

# Seconds that `python -m replica` may take to look at this machine; nvidia-smi alone has a minute of them.
_ANSWER = 180.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as `python -m replica --list-gpus` lists it; memory in MiB, 0 if unknown.

    `kinds` are those of the wanted kinds that it matches. `seat` is the rank of its group in the order in which
    replicas get them, groups in use included; None if no replica of the service can get it. `problem` is the driver's
    message if the GPU has failed.
    """

    name: str
    is_split: bool = False
    held_by: str | None = None
    index: int = 0
    memory_total: int = 0
    memory_used: int = 0
    kinds: tuple[str, ...] = ()
    seat: int | None = None
    problem: str = ""


def gpus(
    each: int = 1,
    kinds: Iterable[str] = (),
    model: str | None = None,
    *,
    share: bool = False,
    envs: Mapping[str, str] = NOTHING,
) -> tuple[Gpu, ...]:
    """This machine's GPUs, with seats for replicas of this model that take `each` GPUs of these kinds.

    share: the replicas share GPUs, so others that share do not count as holders. `envs`: the replicas' own; only
    CUDA_VISIBLE_DEVICES and the lease folder matter. Raises ConfigError if `python -m replica` fails.
    """
    flags = ["--gpus", str(each), "--gpu-kinds", ",".join(kinds), *(("--model", model) if model else ())]
    if share:
        flags.append("--gpu-share")
    theirs = {name: envs[name] for name in ("CUDA_VISIBLE_DEVICES", "LEASE_DIR") if name in envs}
    return tuple(
        Gpu(row["name"], index=row["index"], problem=row["problem"])
        if "problem" in row
        else Gpu(
            row["name"],
            bool(row["mig"]),
            row["held_by"],
            row["index"],
            row["memory_total"],
            row["memory_used"],
            tuple(row["kinds"]),
            row["seat"],
        )
        for row in json.loads(_replica("--list-gpus", *flags, envs=theirs))
    )


async def failed_gpus() -> Mapping[int | None, str]:
    """What the driver says of each GPU of this machine that has failed, by its index; of all of them under None.

    Raises OSError and TimeoutError.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *python("replica"),
        "--list-gpus",
        env={**os.environ, **with_packages({})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
    )
    try:
        said, complaint = await asyncio.wait_for(process.communicate(), _ANSWER)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = complaint.decode(errors="replace").split("\n")
        return {None: next((line for line in reversed(lines) if line.strip()), "").removeprefix("replica: ")}
    return {row["index"]: row["problem"] for row in json.loads(said) if "problem" in row}


def seated_for(recipe: Recipe) -> tuple[Gpu, ...]:
    """This machine's GPUs, with seats for the replicas of a recipe."""
    spec = recipe.spec
    return gpus(recipe.gpus or 1, spec.accelerators, recipe.model, share=spec.operation.gpu_share, envs=spec.envs)


def check_model(recipe: Recipe) -> None:
    """Checks model and flags with `python -m replica --dry-run`; raises ConfigError with its message."""
    if recipe.launch is not None:
        argv = recipe.invocation(1, 8000).argv
        flags = argv[len(python("replica")) :]
        # On the CPU, because this must not lease GPUs: those being replaced may still use them.
        share = {GPU_SHARE: "yes"} if recipe.spec.operation.gpu_share else {}
        _replica("--device", "cpu", "--dry-run", *flags, envs=share)


def weight(recipe: Recipe) -> tuple[int | None, int]:
    """Bytes of the model's weights (None if they are not on this machine) and of KV cache per token (0 if unknown)."""
    assert recipe.launch is not None
    model = recipe.arguments(0)[1]
    theirs = {name: recipe.spec.envs[name] for name in ("HF_HOME", "HF_HUB_CACHE") if name in recipe.spec.envs}
    said = json.loads(_replica("--weigh", "--model", model, "--", *recipe.launch.flags, envs=theirs))
    return said["weights"], said["kv_per_token"] or 0


def seats(there: tuple[Gpu, ...]) -> list[tuple[Gpu, ...]]:
    """The groups of GPUs that replicas may lease, in the order in which they get them; includes those in use."""
    groups: dict[int, list[Gpu]] = {}
    for gpu in there:
        if gpu.seat is not None:
            groups.setdefault(gpu.seat, []).append(gpu)
    return [tuple(groups[seat]) for seat in sorted(groups)]


def _free(groups: list[tuple[Gpu, ...]]) -> list[tuple[Gpu, ...]]:
    return [group for group in groups if all(gpu.held_by is None for gpu in group)]


def placement(recipe: Recipe) -> list[str]:
    """A line for each GPU of this machine, for a fitted recipe; none if its replicas are not SGLang or take no GPU."""
    return placed(recipe, seated_for(recipe)) if recipe.launch is not None and recipe.gpus else []


def placed(recipe: Recipe, there: tuple[Gpu, ...]) -> list[str]:
    """A line for each GPU: what it is, and who holds it or gets it when the service comes up."""
    most = recipe.spec.max_replicas
    lines = []
    order = [gpu for group in _free(seats(there)) for gpu in group]
    for gpu in there:
        if gpu.problem:
            use = f"cannot be used: {gpu.problem}"
        elif gpu.is_split:
            use = "split by MIG, which no replica takes"
        elif gpu.held_by is not None:
            use = f"held by {gpu.held_by}"
        elif gpu in order:
            number = order.index(gpu) // recipe.gpus + 1
            if number <= recipe.spec.min_replicas:
                use = f"for replica {number}"
            else:
                use = "stays free" if most is not None and number > most else "for when the load asks for more"
        elif gpu.seat is None and recipe.spec.accelerators and not gpu.kinds:
            use = f"stays free: it is no {' or '.join(recipe.spec.accelerators)}"
        else:
            use = f"stays free: a replica takes {recipe.gpus} that lie side by side"
        free = gpu.memory_total - gpu.memory_used
        memory = f", {free / 1024:.0f} of {gpu.memory_total / 1024:.0f} GiB free" if gpu.memory_total else ""
        lines.append(f"GPU {gpu.index} ({gpu.name}{memory}): {use}")
    return lines


def fit(recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
    """The recipe fitted to this machine, and all warnings; raises ConfigError if it cannot run here."""
    check_one_machine(recipe.spec)
    if not os.path.isdir(recipe.workdir):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        what = "run: cd" if recipe.launch and recipe.launch.folder else "workdir"
        raise ConfigError(f"{recipe.spec.source}: {what}: there is no folder {recipe.workdir}")
    there: tuple[Gpu, ...] = ()
    if recipe.launch is not None or recipe.gpus:
        recipe = _of_a_kind(recipe)
        there = seated_for(recipe)
    made, warnings = fitted(recipe, recipe.spec.min_replicas, there, limits.memory() / 1e9, running)
    check_model(made)
    return made, [*recipe.spec.warnings, *recipe.notes, *warnings]


def on_gpus(recipe: Recipe) -> Recipe:
    """The recipe with the GPUs that one replica takes here, whatever else may be missing. Raises ConfigError."""
    recipe = _of_a_kind(recipe)
    return replace(recipe, gpus=_each(recipe, _candidates(recipe.spec, seated_for(recipe))[0]))


def _of_a_kind(recipe: Recipe) -> Recipe:
    """The recipe for one kind of GPUs. With one in the file there is no choice, and nvidia-smi may take seconds."""
    if len(recipe.spec.accelerators) < 2:
        return recipe
    return of_kind(recipe, gpus(kinds=recipe.spec.accelerators, envs=recipe.spec.envs))


def _candidates(spec: Spec, there: tuple[Gpu, ...]) -> tuple[list[Gpu], list[str]]:
    """The GPUs that replicas may take, and which of the wanted kinds are here."""
    usable = [gpu for gpu in there if not gpu.is_split and not gpu.problem]
    known = [kind for kind in spec.accelerators if any(kind in gpu.kinds for gpu in usable)]
    return [gpu for gpu in usable if not known or gpu.kinds], known


def _each(recipe: Recipe, mine: list[Gpu]) -> int:
    """How many GPUs a replica takes: SGLang uses one if there is one, requested or not."""
    return recipe.gpus or (1 if mine and recipe.launch else 0)


def of_kind(recipe: Recipe, there: tuple[Gpu, ...]) -> Recipe:
    """The recipe for the first kind in the file with enough GPUs here, else the first with any; else unchanged."""
    whole = [gpu for gpu in there if not gpu.is_split and not gpu.problem]
    here = {kind: sum(kind in gpu.kinds for gpu in whole) for kind in recipe.spec.accelerators}
    enough = [kind for kind, count in here.items() if count >= recipe.spec.accelerators[kind]]
    known = enough or [kind for kind, count in here.items() if count]
    return for_kind(recipe, known[0]) if known else recipe


def fitted(
    recipe: Recipe, count: int, there: tuple[Gpu, ...], memory: float, running: int = 0
) -> tuple[Recipe, list[str]]:
    """The recipe with what one replica gets here, and warnings; raises ConfigError if `count` replicas do not fit.

    `memory` is the free memory in GB, while `running` replicas of the service already use theirs.
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
    mine, known = _candidates(spec, there)
    each = _each(recipe, mine)
    groups = seats(there)
    if each and len(groups) < count:
        why = _too_few(there, mine, known, spec, len(groups))
        raise ConfigError(f"{_replicas(count)} of {spec.name} want {_gpus(each)} each{why}")
    if each:
        fits = len(groups) if fits is None else min(fits, len(groups))
        if not running and (free := len(_free(groups))) < count:
            warnings.append(
                f"{spec.source}: others hold GPUs, so that {free} of {_replicas(count)} can start now: "
                f"groundserve check {spec.source} says who holds them"
            )
    if each and mine and spec.accelerators and not known:
        kinds = ", ".join(spec.accelerators)
        warnings.append(f"{spec.source}: resources.accelerators: none of {kinds} is here; {mine[0].name} is used")
    kind = known[0] if known else mine[0].name.removeprefix("NVIDIA ") if mine else "GPU"
    resources = f"{each}x {kind}" if each else "1x CPU"
    return replace(recipe, gpus=each, resources=resources, fits=fits), warnings


def _too_few(there: tuple[Gpu, ...], mine: list[Gpu], known: list[str], spec: Spec, seats: int) -> str:
    """The rest of the error message: what is wanted, what this machine has, and what to do about it."""
    wanted = f" ({', '.join(spec.accelerators)})" if spec.accelerators else ""
    has = f"this machine has {len(mine) or 'none'}{f' of {known[0]}' if known and len(mine) < len(there) else ''}"
    if split := sum(gpu.is_split for gpu in there):
        has += f" and {split} split by MIG"
    if failed := [f"GPU {gpu.index} ({gpu.problem})" for gpu in there if gpu.problem]:
        has += f", and {', '.join(failed)} cannot be used"
    if seats:
        advice = "run fewer replicas"
    else:
        advice = "give each replica fewer GPUs" if mine else "smollm2 and tiny-llava run without"
    return f"{wanted}; {has}: {advice}"


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _replica(*flags: str, envs: Mapping[str, str] = NOTHING) -> str:
    try:
        answer = subprocess.run(
            [*python("replica"), *flags],
            env={**os.environ, **with_packages({}), **envs},
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"this machine's GPUs are not listed within {_ANSWER:.0f} s: the NVIDIA driver hangs; a reboot mostly helps"
        ) from None
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines() or ["python -m replica failed and said nothing"]
        raise ConfigError(said[-1].removeprefix("replica: "))
    return answer.stdout
