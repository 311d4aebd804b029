"""python -m replica: settings, lease, command, exec."""

import sys

if sys.version_info < (3, 11):
    sys.exit("replica: Python %d.%d is too old: Python 3.11 is needed" % sys.version_info[:2])

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from replica import command, gpu, lease, machine, models, placement, presets, settings, sharing, surroundings
from replica.kinds import is_of_kind
from replica.store.cache import Cache
from replica.store.errors import StoreError
from replica.store.pull import pull


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Does not return when all goes well: the process becomes SGLang."""
    told = settings.read(arguments, environ)
    if told.list_gpus:
        print(describe_gpus(told, environ))
        return
    there = [] if told.device == "cpu" else gpu.list_gpus(environ, warn)
    pretended = bool(environ.get(gpu.PRETEND))
    if told.command:
        become(told, there, environ)
        return
    on_gpu = told.device == "cuda" or (told.device == "auto" and bool(there) and not pretended)
    preset = presets.resolve(told.model or ("llava-v1.6-vicuna-7b" if on_gpu else "smollm2-135m"))
    if not told.dry_run:
        machine.check_sglang()
        machine.check_port(told.host, told.port)
        machine.check_token(preset, told, environ)
        if not on_gpu:
            machine.check_memory(preset)
        if preset.is_embedded:
            models.ensure(preset.name, told.models_dir)
        else:
            fetch(preset, told, environ)

    held = None
    if told.gpu_share and not there and not told.dry_run:
        there = [gpu.CPU_SEAT]
    if on_gpu or there:
        note = f"{preset.name} on port {told.port}"
        want = placement.Want(1 if there == [gpu.CPU_SEAT] else told.gpus, told.gpu_kinds, preset.gpu_gib / told.gpus)
        held = lease.take(there, want, told.lease_dir, wait=told.lease_wait, note=note, is_shared=told.gpu_share)
        if on_gpu and not told.dry_run and not pretended:
            share = sharing.share_gib(told.sglang_args, held.gpus[0].memory_total) if told.gpu_share else 0.0
            machine.wait_for_memory(held.gpus, share or preset.gpu_gib)
        if on_gpu and told.gpu_share:
            told = replace(told, sglang_args=tuple(_of_what_is_free(told.sglang_args, held.gpus, environ)))
    becomes = command.build(
        told,
        preset,
        held.gpus if held and on_gpu else (),
        seed=secrets.randbelow(2**31),
        environ=environ,
        cpu_dtype=machine.cpu_dtype(),
        has_flashinfer=importlib.util.find_spec("flashinfer") is not None or told.dry_run,
        detects_parsers=machine.detects_parsers() or told.dry_run,
    )
    where = ", ".join(f"GPU {one.index} ({one.uuid})" for one in held.gpus) if held else "CPU"
    print(f"replica: {where}: {becomes}", flush=True)
    if not told.dry_run:
        around = surroundings.with_scratch(environ, told.host)
        turn = held.turn.environ() if held and held.turn else {}
        os.execve(becomes.argv[0], becomes.argv, {**around, **becomes.environ, **turn})


def _of_what_is_free(flags: Sequence[str], held: Sequence[gpu.Gpu], environ: Mapping[str, str]) -> list[str]:
    """SGLang's flags with the share of the card as a share of what is free on it now."""
    uuids = {one.uuid for one in held}
    now = [one for one in gpu.list_gpus(environ) if one.uuid in uuids]
    return sharing.with_share(flags, min(one.memory_total for one in now), min(one.memory_free for one in now))


def fetch(preset: presets.Preset, told: settings.Settings, environ: Mapping[str, str]) -> None:
    """Brings a model from the hub before a GPU is leased for it; of several replicas one does.

    Where SGLang was told to take it from elsewhere, or not to load it, that is SGLang's own affair.
    """
    flags = dict(zip(told.sglang_args, (*told.sglang_args[1:], ""), strict=False))
    elsewhere = {"--download-dir", "--load-format", "--model-path", "--model"} & flags.keys()
    has_client = importlib.util.find_spec("huggingface_hub") is not None  # SGLang's own requirement
    if elsewhere or not has_client or is_on(environ, "HF_HUB_OFFLINE") or is_on(environ, "SGLANG_USE_MODELSCOPE"):
        return
    cache = Cache.of(environ)
    if not cache.is_writable:
        return
    for repo, with_weights in preset.hub_parts.items():
        revision = flags.get("--revision", "main") if repo == preset.model else "main"
        pull(repo, cache, told.hf_token, lambda line: print(f"replica: {line}", flush=True), revision, with_weights)


def is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")


def become(told: settings.Settings, there: Sequence[gpu.Gpu], environ: Mapping[str, str]) -> None:
    """Leases, shows the command its GPUs and no others, and becomes it; on a machine without GPUs it gets none."""
    visible = {"CUDA_VISIBLE_DEVICES": ""}
    if there:
        want = placement.Want(told.gpus, told.gpu_kinds)
        held = lease.take(
            there, want, told.lease_dir, wait=told.lease_wait, note=f"{told.command[0]} on port {told.port}"
        )
        visible = command.visible(held.gpus)
        print(
            f"replica: {', '.join(f'GPU {one.index} ({one.uuid})' for one in held.gpus)}: {told.command[0]}", flush=True
        )
    if told.dry_run:
        return
    try:
        os.execvpe(told.command[0], told.command, {**surroundings.set_right(environ, told.host), **visible})
    except OSError as error:
        raise machine.MachineError(f"--exec {told.command[0]}: {error.strerror}") from None


def describe_gpus(told: settings.Settings, environ: Mapping[str, str]) -> str:
    """A JSON list, one object a GPU, memory in MiB; held_by is null while nobody leases it.

    With --gpu-share those who share it do not hold it; shared_by names them in any case.

    kinds are those of --gpu-kinds that it is of; seat is the place of its group among those that replicas with --gpus
    of them would be given, held ones included, null where it is in none. A GPU that has failed has a `problem` instead,
    and the driver's words for it.
    """
    there = gpu.list_gpus(environ, warn)
    want = placement.Want(told.gpus, told.gpu_kinds, _gib(told))
    ranked = lease.best_first(there, want, told.lease_dir, time.time())
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
            "held_by": lease.holder(one, told.lease_dir, is_shared=told.gpu_share),
            "shared_by": lease.sharers(one, told.lease_dir),
            "kinds": [kind for kind in told.gpu_kinds if is_of_kind(one.name, kind, one.memory_total)],
            "seat": seats.get(one),
        }
        for one in there
    ]
    return "[" + ",".join(f"\n {json.dumps(row)}" for row in rows) + "\n]" if rows else "[]"


def _gib(told: settings.Settings) -> float:
    """What the model takes on each GPU, in GiB; 0 where nobody knows."""
    try:
        return presets.resolve(told.model).gpu_gib / told.gpus if told.model else 0.0
    except presets.ModelError:
        return 0.0


def warn(line: str) -> None:
    print(f"replica: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except lease.AllHeldError as error:
        print(f"replica: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (
        settings.SettingsError,
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
