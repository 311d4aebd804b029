"""Checks whether this machine can serve the model: SGLang, port, memory, token. Errors say what to do."""

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from replica import gpu
from replica.memory import available_gib
from replica.options import Options
from replica.presets import Preset
from replica.store.cache import Cache

MEMORY_WAIT = 30.0  # seconds to wait for GPU memory that others hold still, and again whenever they gave some back


class MachineError(Exception):
    """The machine cannot serve the model as it is; the message says why and what to do."""


def check_sglang() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise MachineError(
            f"sglang is not installed in {sys.prefix}: run make install and use .venv/bin/python "
            "(on a GPU: pip install '.[replica]', or the replica image)"
        )


def detects_parsers() -> bool:
    """Does the SGLang that is installed choose parsers for tool calls and reasoning by the model's chat template?"""
    found = importlib.util.find_spec("sglang")
    folders = (found.submodule_search_locations if found else None) or ()
    return any(Path(folder, "srt/parser/template_detection.py").is_file() for folder in folders)


def check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise MachineError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): give another --host or --port"
        ) from None


def check_token(preset: Preset, options: Options, environ: Mapping[str, str]) -> None:
    """A gated model needs a token unless it has been downloaded before."""
    if not preset.gated or options.hf_token or preset.model is None:
        return
    home = Path(environ.get("HF_HOME") or Path(environ.get("HOME") or "~", ".cache/huggingface").expanduser())
    cached = Cache.of(environ).of_repo(preset.model) / "snapshots"
    if not cached.is_dir() and not (home / "token").is_file():
        raise MachineError(
            f"{preset.model} is gated: accept its licence on its Hugging Face page, then set HF_TOKEN (or "
            "HF_TOKEN_FILE) to a token of your account"
        )


def check_memory(preset: Preset, available: float | None = None) -> None:
    """available: free memory in GiB; None: read from the machine."""
    if available is None:
        available = available_gib()
    if available < preset.cpu_gib:
        raise MachineError(
            f"{preset.name} takes about {preset.cpu_gib:.0f} GiB of memory and {available:.1f} GiB are free: "
            "stop something, run fewer replicas, or serve a smaller model"
        )


def cpu_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The type that this CPU multiplies fastest, for SGLang's --dtype.

    A CPU without bfloat16 instructions widens each number first: SmolLM2's prompts then take five times as long as in
    float32 (27 s against 5 s for 1,027 tokens on one thread of a Zen 3).
    """
    try:
        known = set(cpuinfo.read_text().split())
    except OSError:
        known = set()
    return "bfloat16" if known & {"avx512_bf16", "amx_bf16"} else "float32"


def wait_for_memory(
    held: Sequence[gpu.Gpu],
    need: float,
    *,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    tell: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> None:
    """Waits until each leased GPU has `need` GiB free. After 30 s without any progress it says on stderr who uses the
    rest, and goes on.

    need 0, unknown: nine tenths of the GPU. The previous holder's memory may take a moment to be freed, and other
    programs may use the GPU without a lease. `tell` is called after each look with the UUIDs of the GPUs that were
    short, and when the look began, in seconds since the epoch.
    """
    uuids = {one.uuid for one in held}
    give_up, most = clock() + MEMORY_WAIT, 0.0
    while True:
        looked_at = time.time()
        wanted = {
            one: need * 1024 or 0.9 * one.memory_total
            for one in gpu.list_gpus(environ)
            if one.uuid in uuids and one.memory_total
        }
        short = [one for one, least in wanted.items() if one.memory_free < least]
        tell({one.uuid: looked_at for one in short})
        if not short:
            return
        if (there := sum(min(one.memory_free, least) for one, least in wanted.items())) > most:
            give_up, most = clock() + MEMORY_WAIT, there
        if clock() >= give_up:
            break
        pause(1.0)
    processes = gpu.list_processes()
    for one in short:
        users = [f"{user.name} ({user.pid}, {user.memory} MiB)" for user in processes if user.gpu == one.uuid]
        print(
            f"replica: GPU {one.index} has {one.memory_free} of {one.memory_total} MiB free, which may not be enough; "
            f"it is used by {', '.join(users) or 'processes that cannot be seen from here'}",
            file=sys.stderr,
            flush=True,
        )
