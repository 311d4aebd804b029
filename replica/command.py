"""Builds SGLang's command line and environment from options, preset and lease. Pure."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from replica.families import AUTO
from replica.gpu import Gpu
from replica.options import Options
from replica.presets import Preset

# Marks the path of a key file in SGLang's arguments, which the plug-in replaces by the key: everybody can read argv in
# the process list. Without the plug-in SGLang would take the path for the key, and no client would get in.
KEY_FILE_MARK = "@file:"
# Likewise a variable that has the value of a flag: here, or in groundserve's command line for a replica.
VARIABLE = re.compile(r"@env:((?:GROUNDSERVE|REPLICA)_SECRET_\d+)")

# A flag that only the plug-in knows, and removes. SGLang merely logs that a plug-in failed to load, and would serve
# without its protections; because of this unknown flag it exits instead.
PLUGIN_MARK = "--with-groundserve-plugin"
_PLUGIN = "groundserve"  # its name among SGLang's entry points

# A plain CPU has neither AMX kernels nor memory to spare: torch's own attention, one thread (replicas share the cores,
# and more threads than cores slow down all of them), a KV pool of 16,384 tokens, and no busy loop while idle.
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--max-total-tokens", "16384", "--sleep-on-idle"),
)
# Makes memory releasable, and keeps no core busy while it is released.
_SHARE_FLAGS = ("--enable-memory-saver", "--enable-weights-cpu-backup", "--sleep-on-idle")
_SECRET_FLAG = re.compile(r"--(.*-)?(key|keys|password|passphrase|secret|hf-token|auth-token)$")


@dataclass(frozen=True)
class Command:
    """argv, and the variables to add to the environment."""

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        """The command as one would type it, with secrets masked."""
        return shlex.join(masked(self.argv))


def build(
    options: Options,
    preset: Preset,
    gpus: Sequence[Gpu],
    *,
    seed: int,
    environ: Mapping[str, str],
    cpu_dtype: str = "float32",
    has_flashinfer: bool = True,
    parsers: tuple[str, str] | None = (AUTO, AUTO),
    context: int = 0,
) -> Command:
    """SGLang's command for `preset` on the leased `gpus`; without GPUs, on the CPU.

    seed: a new random number for each start, by which the balancer distinguishes a restarted replica from its
    predecessor. The user's flags come last, so that they win. cpu_dtype: the type that the CPU multiplies fastest; only
    the embedded models are small enough to be converted to it. Without FlashInfer, CUDA uses Triton's and torch's own
    kernels. parsers: how the model writes tool calls and reasoning; None for an SGLang that knows no `auto`. context:
    the longest conversation in tokens, where the memory sets a limit; 0 where the model does.
    """
    folder = str(options.models_dir / preset.name) if preset.model is None else preset.model
    flags = [
        *("--model-path", folder, "--served-model-name", preset.served_name),
        *("--host", options.host, "--port", str(options.port)),
        *("--random-seed", str(seed), "--enable-metrics", "--enable-cache-report"),
        PLUGIN_MARK,
        *preset.flags,
    ]
    if preset.overrides:
        overrides = {key: value.format(folder=folder) for key, value in preset.overrides.items()}
        flags += ["--json-model-override-args", json.dumps(overrides)]
    if parsers and not preset.is_embedded:
        # Without a parser an agent's tool calls come back as plain text.
        flags += ["--tool-call-parser", parsers[0], "--reasoning-parser", parsers[1]]
    if context:
        flags += ["--context-length", str(context)]
    if not gpus:
        flags += [*_CPU_FLAGS, *preset.cpu_flags]
        if preset.is_embedded:
            flags += ["--dtype", cpu_dtype]
    else:
        flags += preset.gpu_flags
        if len(gpus) > 1:
            flags += ["--tp-size", str(len(gpus))]
    if gpus and not has_flashinfer:
        flags += ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
    if options.gpu_share and gpus:
        flags += _SHARE_FLAGS
    if options.api_key_file is not None:
        flags += ["--api-key", f"{KEY_FILE_MARK}{options.api_key_file}"]
    given, secrets = _hidden(options.sglang_args)
    argv = (sys.executable, "-m", "sglang.launch_server", *flags, *given)
    return Command(argv, {**_environ(options, preset, gpus, environ), **secrets})


def _hidden(flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The user's flags without keys and the like, and the variables that have these instead."""
    variables: dict[str, str] = {}

    def moved(value: str) -> str:
        if value.startswith(KEY_FILE_MARK) or VARIABLE.fullmatch(value):
            return value
        name = f"REPLICA_SECRET_{len(variables) + 1}"
        variables[name] = value
        return f"@env:{name}"

    return _with_secrets_as(flags, moved), variables


def _environ(options: Options, preset: Preset, gpus: Sequence[Gpu], environ: Mapping[str, str]) -> dict[str, str]:
    defaults = {
        # The balancer allows /health_generate 60 s, to distinguish a hung scheduler from a long prefill. With SGLang's
        # own 20 s a long prefill would count as unhealthy, and /ready would be 503 from then on.
        "SGLANG_HEALTH_CHECK_TIMEOUT": "60",
        # Longer than the balancer keeps an idle connection, so that the server is never the one to close it.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "75",
    }
    if not gpus:
        defaults |= {"OMP_NUM_THREADS": "1", "SGLANG_CPU_WORKERS": "1"}
    variables = {name: value for name, value in defaults.items() if name not in environ}
    if gpus:
        variables |= visible(gpus)
        if "SGLANG_USE_CPU_ENGINE" in environ:
            variables["SGLANG_USE_CPU_ENGINE"] = "0"
    else:
        # At each start, each of SGLang's processes warns of every kernel that a CPU lacks; where the environment turns
        # warnings into errors, it would not start.
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore::UserWarning"}
    if preset.is_embedded or (preset.model and Path(preset.model).is_absolute()):
        variables["HF_HUB_OFFLINE"] = "1"
    variables |= options.media.environ()  # read by the plug-in, in each of SGLang's processes
    plugins = environ.get("SGLANG_PLUGINS")
    if plugins:
        variables["SGLANG_PLUGINS"] = f"{plugins},{_PLUGIN}"
    if options.hf_token:
        variables["HF_TOKEN"] = options.hf_token
    return variables


def visible(gpus: Sequence[Gpu]) -> dict[str, str]:
    """The variables that make CUDA see these GPUs and no others.

    Indices, not UUIDs: SGLang 0.5.23 parses each as an int for tensor parallelism (custom all-reduce, VMM fabric).
    Indices match nvidia-smi's only in PCI bus order; CUDA's own order is by speed. Where they may not match even so,
    a single GPU is given by its UUID: an index could be that of a GPU which another replica has leased.
    """
    by_index = len(gpus) > 1 or gpus[0].has_cuda_index
    names = [str(gpu.index) if by_index else gpu.uuid for gpu in gpus]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


def masked(argv: Sequence[str]) -> list[str]:
    """argv, with the values of flags that carry secrets replaced by ***."""
    return _with_secrets_as(argv, lambda value: value if value.startswith(KEY_FILE_MARK) else "***")


def _with_secrets_as(argv: Sequence[str], put: Callable[[str], str]) -> list[str]:
    """argv, with the value of each flag that carries a secret replaced by what `put` makes of it."""
    made: list[str] = []
    is_next = False
    for part in argv:
        flag, equals, value = part.partition("=")
        if is_next:
            made.append(put(part))
        else:
            made.append(f"{flag}={put(value)}" if equals and _SECRET_FLAG.fullmatch(flag) else part)
        is_next = not is_next and _SECRET_FLAG.fullmatch(part) is not None
    return made
