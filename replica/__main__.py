"""python -m replica: options, lease, command, exec."""

import sys

if sys.version_info < (3, 11):
    sys.exit("replica: Python %d.%d is too old: Python 3.11 is needed" % sys.version_info[:2])

import functools
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from replica import command, families, gpu, lease, machine, models, placement, presets, sharing, surroundings
from replica.kinds import is_of_kind
from replica.options import Options, OptionsError, read, with_secrets
from replica.store.cache import Cache
from replica.store.errors import StoreError
from replica.turn import Turn
from replica.weights import WeighError, config_of, longest_context, weigh

# The service whose replica it is and its priority, as groundserve tells them (balancer/operate/recipe/recipe.py).
SERVICE, PRIORITY = "GROUNDSERVE_SERVICE", "GROUNDSERVE_PRIORITY"


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Becomes SGLang; returns only for --list-gpus and --dry-run."""
    options = read(arguments, environ)
    if options.list_gpus:
        print(describe_gpus(options, environ))
        return
    if options.weigh:
        print(describe_weights(options, environ))
        return
    gpus = [] if options.device == "cpu" else gpu.list_gpus(environ, warn)
    pretended = bool(environ.get(gpu.PRETEND))
    if options.command:
        become(options, gpus, environ)
        return
    on_gpu = options.device == "cuda" or (options.device == "auto" and bool(gpus) and not pretended)
    preset = presets.resolve(options.model or ("llava-v1.6-vicuna-7b" if on_gpu else "smollm2-135m"))
    if not options.dry_run:
        machine.check_sglang()
        machine.check_port(options.host, options.port)
        machine.check_token(preset, options, environ)
        if not on_gpu:
            machine.check_memory(preset)
        if preset.is_embedded:
            models.ensure(preset.name, options.models_dir)
        else:
            fetch(preset, options, environ)

    held = None
    share = 0.0  # GiB
    if options.gpu_share and not gpus and not options.dry_run:
        gpus = [gpu.CPU_SEAT]
    if on_gpu or gpus:
        note = _note(preset.name, options, environ)
        count = 1 if gpus == [gpu.CPU_SEAT] else options.gpus
        want = placement.Want(count, options.gpu_kinds, preset.gpu_gib / options.gpus)
        held = lease.take(
            gpus, want, options.lease_dir, wait=options.lease_wait, note=note, is_shared=options.gpu_share, tell=say
        )
        if on_gpu and not options.dry_run and not pretended:
            if options.gpu_share:
                share = sharing.share_gib(options.sglang_args, held.gpus[0].memory_total)
            need = sharing.room_gib(share) or preset.gpu_gib
            machine.wait_for_memory(held.gpus, need, tell=functools.partial(_ask_for_memory, held.turn))
        if on_gpu and options.gpu_share:
            options = replace(
                options, sglang_args=tuple(_share_of_free_memory(options.sglang_args, held.gpus, environ))
            )
    folder = folder_of(preset, options, environ)
    family = families.family_of(preset.model or preset.name, config_of(folder) if folder else None)
    chosen = families.parsers(family) if machine.detects_parsers() or options.dry_run else None
    context = 0
    if folder and held and on_gpu and not options.gpu_share:
        memory = sum(one.memory_total for one in held.gpus) << 20
        context = longest_context(folder, options.sglang_args, memory)
    becomes = command.build(
        options,
        preset,
        held.gpus if held and on_gpu else (),
        seed=secrets.randbelow(2**31),
        environ=environ,
        cpu_dtype=machine.cpu_dtype(),
        has_flashinfer=importlib.util.find_spec("flashinfer") is not None or options.dry_run,
        parsers=chosen,
        context=context,
    )
    if chosen and not preset.is_embedded and not options.dry_run:
        tell_parsers(chosen, family, options)
    if context and not options.dry_run:
        say(f"the GPU has room for {context} tokens at the most: --context-length {context}")
    where = _leased(held, options) if held else "CPU"
    print(f"replica: {where}: {becomes}", flush=True)
    if not options.dry_run:
        around = surroundings.with_scratch(environ, options.host)
        turn = {**held.turn.environ(), sharing.SHARE: str(round(share * 2**30))} if held and held.turn else {}
        os.execve(becomes.argv[0], becomes.argv, {**around, **becomes.environ, **turn})


def _ask_for_memory(turn: Turn | None, short: Mapping[str, float]) -> None:
    """While its GPUs are short of memory, asks those that share them and doze for that of their weights."""
    if turn is not None:
        turn.say(time.time(), lacks=short)


def _share_of_free_memory(flags: Sequence[str], held: Sequence[gpu.Gpu], environ: Mapping[str, str]) -> list[str]:
    """SGLang's flags, with the share of the GPU converted to a share of its memory that is free now."""
    uuids = {one.uuid for one in held}
    now = [one for one in gpu.list_gpus(environ) if one.uuid in uuids]
    return sharing.with_share(flags, min(one.memory_total for one in now), min(one.memory_free for one in now))


def fetch(preset: presets.Preset, options: Options, environ: Mapping[str, str]) -> None:
    """Fetches a model from the hub before a GPU is leased for it; of several replicas only one does.

    If flags tell SGLang to take the model from elsewhere, or not to load it, SGLang handles that by itself.
    """
    flags = dict(zip(options.sglang_args, (*options.sglang_args[1:], ""), strict=False))
    elsewhere = {"--download-dir", "--load-format", "--model-path", "--model"} & flags.keys()
    has_client = importlib.util.find_spec("huggingface_hub") is not None  # SGLang's own requirement
    if elsewhere or not has_client or is_on(environ, "HF_HUB_OFFLINE") or is_on(environ, "SGLANG_USE_MODELSCOPE"):
        return
    from replica.store.pull import pull  # what it needs comes with SGLang alone

    cache = Cache.of(environ)
    if not cache.is_writable:
        return
    for repo, with_weights in preset.hub_parts.items():
        revision = flags.get("--revision", "main") if repo == preset.model else "main"
        pull(repo, cache, options.hf_token, say, revision, with_weights)


def is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")


def become(options: Options, gpus: Sequence[gpu.Gpu], environ: Mapping[str, str]) -> None:
    """Leases GPUs and becomes the command, which sees only these; on a machine without GPUs it sees none."""
    visible = {"CUDA_VISIBLE_DEVICES": ""}
    if gpus:
        want = placement.Want(options.gpus, options.gpu_kinds)
        note = _note(options.command[0], options, environ)
        held = lease.take(gpus, want, options.lease_dir, wait=options.lease_wait, note=note, tell=say)
        visible = command.visible(held.gpus)
        print(f"replica: {_leased(held, options)}: {options.command[0]}", flush=True)
    if options.dry_run:
        return
    try:
        os.execvpe(options.command[0], options.command, {**surroundings.set_right(environ, options.host), **visible})
    except OSError as error:
        raise machine.MachineError(f"--exec {options.command[0]}: {error.strerror}") from None


def describe_gpus(options: Options, environ: Mapping[str, str]) -> str:
    """A JSON list with one object per GPU, memory in MiB. held_by is null while no replica holds the lease.

    With --gpu-share, replicas that share a GPU do not hold it; shared_by always lists them.

    kinds: the kinds in --gpu-kinds that it belongs to. seat: the rank of its group in the order in which replicas with
    --gpus GPUs get them, groups that are held included; null if it is in no group. A failed GPU has a `problem`
    instead, in the driver's words.
    """
    gpus = gpu.list_gpus(environ, warn)
    want = placement.Want(options.gpus, options.gpu_kinds, _gib(options))
    ranked = lease.best_first(gpus, want, options.lease_dir, time.time())
    seats = {one: seat for seat, group in enumerate(ranked) for one in group}
    rows = [
        {"index": one.index, "name": one.name, "problem": one.problem}
        if one.problem
        else {
            "index": one.index,
            "uuid": one.uuid,
            "name": one.name,
            "memory_total": one.memory_total,
            "memory_used": one.memory_used,
            "mig": one.mig,
            "held_by": lease.holder(one, options.lease_dir, is_shared=options.gpu_share),
            "shared_by": lease.sharers(one, options.lease_dir),
            "kinds": [kind for kind in options.gpu_kinds if is_of_kind(one.name, kind, one.memory_total)],
            "seat": seats.get(one),
        }
        for one in gpus
    ]
    return "[" + ",".join(f"\n {json.dumps(row)}" for row in rows) + "\n]" if rows else "[]"


def describe_weights(options: Options, environ: Mapping[str, str]) -> str:
    """A JSON object: bytes of weights in total, and of KV cache per token; nulls and a `problem` if unknown."""
    preset = presets.resolve(options.model or "smollm2-135m")
    try:
        found = weigh(folder_of(preset, options, environ) or Path(preset.model or ""), options.sglang_args)
    except WeighError as error:
        return json.dumps({"weights": None, "kv_per_token": None, "problem": str(error)})
    return json.dumps({"weights": found.size, "kv_per_token": found.kv or None})


def folder_of(preset: presets.Preset, options: Options, environ: Mapping[str, str]) -> Path | None:
    """The folder that the model is loaded from; None for one that is not on this machine yet."""
    if preset.model is None:
        return options.models_dir / preset.name
    if Path(preset.model).is_absolute():
        return Path(preset.model)
    snapshots = Cache.of(environ).of_repo(preset.model) / "snapshots"
    return max(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, default=None)


def tell_parsers(chosen: tuple[str, str], family: families.Family | None, options: Options) -> None:
    """Says which parsers were chosen, and how to choose others, unless somebody did."""
    if any(flag.startswith(("--tool-call-parser", "--reasoning-parser")) for flag in options.sglang_args):
        return
    by = f"as a model of the family {family.title}" if family else "by its chat template"
    flags = f"--tool-call-parser {chosen[0]} --reasoning-parser {chosen[1]}"
    say(f"its answers are parsed {by} ({flags}); the same flags in SGLANG_ARGS choose others")


def _gib(options: Options) -> float:
    """The memory that the model takes on each GPU, in GiB; 0 if unknown."""
    try:
        return presets.resolve(options.model).gpu_gib / options.gpus if options.model else 0.0
    except presets.ModelError:
        return 0.0


def _note(what: str, options: Options, environ: Mapping[str, str]) -> str:
    """Who this is, for others that look for a GPU: its service with its priority, what it runs, and where."""
    priority = environ.get(PRIORITY, "0")
    service = environ.get(SERVICE, "") + (f" (priority {priority})" if priority != "0" else "")
    return f"{service}{': ' if service else ''}{what} on port {options.port}"


def _leased(held: lease.Lease, options: Options) -> str:
    """`GPU 0 (L4, GPU-...)`, by the wanted kind that it belongs to, else by the driver's name."""

    def kind(one: gpu.Gpu) -> str:
        fits = (kind for kind in options.gpu_kinds if is_of_kind(one.name, kind, one.memory_total))
        return next(fits, one.name.removeprefix("NVIDIA "))

    return ", ".join(f"GPU {one.index} ({kind(one)}, {one.uuid})" for one in held.gpus)


def say(line: str) -> None:
    print(f"replica: {line}", flush=True)


def warn(line: str) -> None:
    print(f"replica: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        # Libraries look into the environment, too.
        os.environ |= with_secrets(os.environ)
        main(sys.argv[1:], os.environ)
    except lease.AllHeldError as error:
        print(f"replica: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (
        OptionsError,
        sharing.ShareError,
        presets.ModelError,
        gpu.GpuError,
        lease.LeaseError,
        machine.MachineError,
        models.MakingError,
        StoreError,
    ) as error:
        sys.exit(f"replica: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
