"""Which NVIDIA GPUs this machine has, how full they are and who uses them, as nvidia-smi tells.

nvidia-smi and not a binding: it comes with every driver and with the NVIDIA container toolkit, and SGLang
calls it too.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

# Pretends that many GPUs, for tests of the lease on machines that have none. Nothing but the lease believes
# in them: with --device auto SGLang still runs on the CPU.
PRETEND = "REPLICA_PRETEND_GPUS"


class GpuError(Exception):
    """The machine's GPUs cannot be told; the message says why and what to do."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. index: its place in PCI bus order, which is nvidia-smi's; memory in MiB."""

    index: int
    uuid: str
    name: str
    memory_total: int
    memory_used: int
    mig: bool = False

    @property
    def memory_free(self) -> int:
        return self.memory_total - self.memory_used


@dataclass(frozen=True)
class GpuProcess:
    """A process that has memory on a GPU. memory in MiB, 0 where the driver does not say."""

    gpu: str
    pid: int
    name: str
    memory: int


def list_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that this process may use, in PCI bus order; where it is set, those CUDA_VISIBLE_DEVICES names.

    Raises GpuError when the driver does not answer or CUDA_VISIBLE_DEVICES names a GPU that is not there.
    """
    pretended = environ.get(PRETEND, "")
    if pretended:
        if not pretended.isdigit():
            raise GpuError(f"{PRETEND}={pretended} is not a number of GPUs")
        found = [Gpu(i, f"GPU-pretended-{i}", "pretended GPU", 81920, 0) for i in range(int(pretended))]
    else:
        found = [
            parse_gpu(line) for line in _nvidia_smi("gpu", "index,uuid,name,memory.total,memory.used,mig.mode.current")
        ]
    return _visible(found, environ.get("CUDA_VISIBLE_DEVICES"))


def list_processes() -> list[GpuProcess]:
    """Who has memory on the machine's GPUs, as far as this process can see (a container sees its own)."""
    processes = []
    for line in _nvidia_smi("compute-apps", "gpu_uuid,pid,used_memory,process_name"):
        gpu, pid, memory, name = (part.strip() for part in line.split(",", 3))
        processes.append(GpuProcess(gpu, int(pid), name, _mib(memory)))
    return processes


def parse_gpu(line: str) -> Gpu:
    """One line of nvidia-smi's CSV."""
    index, uuid, name, total, used, mig = (part.strip() for part in line.split(","))
    return Gpu(int(index), uuid, name, _mib(total), _mib(used), mig == "Enabled")


def _mib(text: str) -> int:
    # Machines whose GPU shares the system's memory answer [N/A].
    return int(text) if text.isdigit() else 0


def _nvidia_smi(what: str, fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        raise GpuError(
            "nvidia-smi does not answer within 60 s: the NVIDIA driver hangs; a reboot usually helps"
        ) from None
    if "No devices were found" in answer.stdout:
        return []
    if answer.returncode != 0:
        said = " ".join((answer.stdout + answer.stderr).split()) or f"exit status {answer.returncode}"
        raise GpuError(f"nvidia-smi failed: {said} (mend the NVIDIA driver, or say --device cpu)")
    return [line for line in answer.stdout.splitlines() if line.strip()]


def _visible(found: list[Gpu], chosen: str | None) -> list[Gpu]:
    """CUDA's rule for CUDA_VISIBLE_DEVICES (indices, or beginnings of UUIDs), in PCI bus order and strict."""
    if chosen is None:
        return found
    kept = []
    for part in (part.strip() for part in chosen.split(",")):
        if part in ("", "-1", "NoDevFiles"):
            continue
        fits = [gpu for gpu in found if (gpu.index == int(part) if part.isdigit() else gpu.uuid.startswith(part))]
        if len(fits) != 1:
            raise GpuError(f"CUDA_VISIBLE_DEVICES={chosen}: {part} is none of this machine's {len(found)} GPUs")
        kept += fits
    return sorted(set(kept), key=lambda gpu: gpu.index)
