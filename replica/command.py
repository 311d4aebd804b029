"""Settings, preset and lease to SGLang's command line and environment; nothing here touches the machine."""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from replica.gpu import Gpu
from replica.presets import Preset
from replica.settings import Settings

# Where the plug-in finds a key's file in SGLang's arguments, and puts the key itself: argv is everyone's to
# read in the process list. Without the plug-in SGLang would take the path for the key and nobody would get
# in.
KEY_FILE_MARK = "@file:"

# The plug-in takes it out again. An SGLang that could not load the plug-in only logs that, and would serve without what
# it holds in; this flag it does not know, so it ends.
PLUGIN_MARK = "--with-groundserve-plugin"
_PLUGIN = "groundserve"  # its name among SGLang's entry points

# A plain CPU has neither AMX kernels nor memory to spare: torch's own attention, one thread (replicas share
# the cores, and more threads than cores make each slower), a KV pool of 16,384 tokens, and no busy loop while
# idle.
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--max-total-tokens", "16384", "--sleep-on-idle"),
)
# Memory that can be given back, and no core kept busy meanwhile.
_SHARE_FLAGS = ("--enable-memory-saver", "--enable-weights-cpu-backup", "--sleep-on-idle")
_SECRET_FLAG = re.compile(r"--(.*-)?(key|keys|password|passphrase|secret|hf-token|auth-token)$")


@dataclass(frozen=True)
class Command:
    """argv, and the variables that are set for it on top of the environment."""

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        """The command as a person would type it, with secrets masked."""
        return shlex.join(masked(self.argv))


def build(
    settings: Settings,
    preset: Preset,
    gpus: Sequence[Gpu],
    *,
    seed: int,
    environ: Mapping[str, str],
    cpu_dtype: str = "float32",
    has_flashinfer: bool = True,
    detects_parsers: bool = True,
) -> Command:
    """SGLang's command for `preset` on the leased `gpus`; on the CPU when there are none.

    seed: drawn anew at each start, it is how a balancer tells a restarted replica from the one before. What
    the user gives comes last, so that it wins. cpu_dtype: what the CPU multiplies fastest; only the models of
    our own making are small enough to be widened to it. Without FlashInfer, CUDA runs on Triton's and torch's
    own kernels. detects_parsers: this SGLang finds out by itself how the model writes its tool calls and its thoughts.
    """
    folder = str(settings.models_dir / preset.name) if preset.model is None else preset.model
    flags = [
        *("--model-path", folder, "--served-model-name", preset.served_name),
        *("--host", settings.host, "--port", str(settings.port)),
        *("--random-seed", str(seed), "--enable-metrics", "--enable-cache-report"),
        PLUGIN_MARK,
        *preset.flags,
    ]
    if preset.overrides:
        overrides = {key: value.format(folder=folder) for key, value in preset.overrides.items()}
        flags += ["--json-model-override-args", json.dumps(overrides)]
    if detects_parsers and not preset.is_embedded:
        # Without a parser an agent's tool calls come back as plain text.
        flags += ["--tool-call-parser", "auto", "--reasoning-parser", "auto"]
    if not gpus:
        flags += [*_CPU_FLAGS, *preset.cpu_flags]
        if preset.is_embedded:
            flags += ["--dtype", cpu_dtype]
    elif len(gpus) > 1:
        flags += ["--tp-size", str(len(gpus))]
    if gpus and not has_flashinfer:
        flags += ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
    if settings.gpu_share and gpus:
        flags += _SHARE_FLAGS
    if settings.api_key_file is not None:
        flags += ["--api-key", f"{KEY_FILE_MARK}{settings.api_key_file}"]
    argv = (sys.executable, "-m", "sglang.launch_server", *flags, *settings.sglang_args)
    return Command(argv, _environ(settings, preset, gpus, environ))


def _environ(settings: Settings, preset: Preset, gpus: Sequence[Gpu], environ: Mapping[str, str]) -> dict[str, str]:
    defaults = {
        # A balancer asks /health_generate with 60 s to tell a hung scheduler from a long prefill. SGLang's
        # own 20 s would call a long prefill unhealthy, and from then on /ready says 503.
        "SGLANG_HEALTH_CHECK_TIMEOUT": "60",
        # Longer than any balancer keeps an idle connection: the server must not be the one to close it.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "75",
    }
    if not gpus:
        defaults |= {"OMP_NUM_THREADS": "1", "SGLANG_CPU_WORKERS": "1"}
    made = {name: value for name, value in defaults.items() if name not in environ}
    if gpus:
        made |= visible(gpus)
        if "SGLANG_USE_CPU_ENGINE" in environ:
            made["SGLANG_USE_CPU_ENGINE"] = "0"
    else:
        # SGLang warns of each kernel that a CPU lacks, in each of its processes, at each start; where the surroundings
        # make an error of a warning, it would not start.
        made |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore::UserWarning"}
    if preset.is_embedded or (preset.model and Path(preset.model).is_absolute()):
        made["HF_HUB_OFFLINE"] = "1"
    made |= settings.media.environ()  # read by the plug-in, in each of SGLang's processes
    plugins = environ.get("SGLANG_PLUGINS")
    if plugins:
        made["SGLANG_PLUGINS"] = f"{plugins},{_PLUGIN}"
    if settings.hf_token:
        made["HF_TOKEN"] = settings.hf_token
    return made


def visible(gpus: Sequence[Gpu]) -> dict[str, str]:
    """The variables by which CUDA sees these GPUs and no others.

    Indices, not UUIDs: SGLang 0.5.23 reads each as an int for tensor parallelism (custom all-reduce, VMM fabric). An
    index means nvidia-smi's GPU only in PCI bus order; CUDA's own order is by speed.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus),
    }


def masked(argv: Sequence[str]) -> list[str]:
    """argv with the value of each flag that carries a secret replaced by ***."""
    shown: list[str] = []
    hide_next = False
    for part in argv:
        flag, equals, value = part.partition("=")
        if hide_next and not part.startswith(KEY_FILE_MARK):
            shown.append("***")
        elif equals and _SECRET_FLAG.fullmatch(flag) and not value.startswith(KEY_FILE_MARK):
            shown.append(f"{flag}=***")
        else:
            shown.append(part)
        hide_next = _SECRET_FLAG.fullmatch(part) is not None
    return shown
