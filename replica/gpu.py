"""The NVIDIA GPUs of this machine, their memory use and their users, as reported by nvidia-smi.

nvidia-smi rather than a binding: it comes with every driver and with the NVIDIA container toolkit, and SGLang calls it
as well.
"""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

# Simulates this many GPUs, to test leases on machines without any. Only the lease uses them: with --device auto SGLang
# still runs on the CPU.
PRETEND = "REPLICA_PRETEND_GPUS"


# The fields to query of each GPU, in this order, and one more that older drivers do not know.
_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "mig.mode.current")
_HEALTH = "remapped_rows.failure"
# The driver's entry for each GPU; a lost GPU keeps its entry.
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


class GpuError(Exception):
    """The machine's GPUs cannot be listed; the message says why and what to do."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. index: its position in PCI bus order, as in nvidia-smi; memory in MiB."""

    index: int
    uuid: str
    name: str
    memory_total: int
    memory_used: int
    mig: bool = False
    # Why it cannot be used, in the driver's words; empty if it can.
    problem: str = ""
    # Is it certain that CUDA knows it by the same index?
    has_cuda_index: bool = True

    @property
    def memory_free(self) -> int:
        return self.memory_total - self.memory_used


# Takes the place of a GPU for replicas on the CPU that share, so that one of them serves at a time.
CPU_SEAT = Gpu(0, "cpu-0", "CPU", 0, 0)


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses memory of a GPU. memory in MiB, 0 if the driver does not say."""

    gpu: str
    pid: int
    name: str
    memory: int


def list_gpus(
    environ: Mapping[str, str], warn: Callable[[str], None] | None = None, driver: Path = _DRIVER_GPUS
) -> list[Gpu]:
    """The GPUs that this process may use, in PCI bus order; if CUDA_VISIBLE_DEVICES is set, only those that it names.

    A failed GPU is listed with its `problem`, or left out if the driver gives it no number; `warn` gets a line about
    either, and about everything else that nvidia-smi complains of. Raises GpuError if no GPU answers, or if
    CUDA_VISIBLE_DEVICES names a GPU that does not exist.
    """
    pretended = environ.get(PRETEND, "")
    if pretended:
        if not pretended.isdigit():
            raise GpuError(f"{PRETEND}={pretended} is not a number of GPUs")
        found = [Gpu(i, f"GPU-pretended-{i}", "pretended GPU", 81920, 0) for i in range(int(pretended))]
    else:
        found, complaints = _all_gpus(driver)
        if warn is not None:
            for complaint in complaints:
                warn(complaint)
    return _visible(found, environ.get("CUDA_VISIBLE_DEVICES"))


def _all_gpus(driver: Path) -> tuple[list[Gpu], list[str]]:
    answers = [_ask_for_gpus()]
    if answers[0].failed and not answers[0].gpus:
        # If one GPU has fallen off the bus, nvidia-smi may report only that one and give up. Queried by bus address,
        # each GPU answers for itself.
        answers += [_ask_for_gpus("-i", bus_id) for bus_id in _bus_ids(driver)]
    found = sorted((gpu for answer in answers for gpu in answer.gpus), key=lambda gpu: gpu.index)
    if answers[0].failed and not found:
        raise GpuError(f"nvidia-smi failed: {answers[0].said} (repair the NVIDIA driver, or use --device cpu)")
    complaints = [f"nvidia-smi: {line}" for answer in answers for line in answer.complaints]
    complaints += [f"GPU {gpu.index} is not used: {gpu.problem}" for gpu in found if gpu.problem]
    # CUDA does not count GPUs that it cannot open, and counts the parts of one that is split by MIG.
    if any(gpu.problem or gpu.mig or gpu.index != number for number, gpu in enumerate(found)):
        found = [replace(gpu, has_cuda_index=False) for gpu in found]
    return found, list(dict.fromkeys(complaints))


def _ask_for_gpus(*which: str) -> "_Answer":
    answer = _nvidia_smi("gpu", (*_FIELDS, _HEALTH), *which)
    if answer.failed and "not a valid field" in answer.said.lower():
        return _nvidia_smi("gpu", _FIELDS, *which)
    return answer


def _bus_ids(driver: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in driver.iterdir())
    except OSError:
        return []


def list_processes() -> list[GpuProcess]:
    """The processes with memory on the machine's GPUs, as far as visible (a container sees only its own)."""
    processes = []
    for row in _nvidia_smi("compute-apps", ("gpu_uuid", "pid", "used_memory", "process_name")).rows:
        parts = [part.strip() for part in row.split(",", 3)]
        if len(parts) == 4 and parts[1].isdigit():
            processes.append(GpuProcess(parts[0], int(parts[1]), parts[3], _mib(parts[2])))
    return processes


def parse_gpu(row: str) -> Gpu | None:
    """One line of nvidia-smi's CSV; None for a line that does not describe a numbered GPU, such as a warning.

    nvidia-smi puts [Unknown Error], [GPU requires reset] and the like into the fields of a failed GPU.
    """
    index, *fields = (part.strip() for part in row.split(","))
    if not index.isdigit() or len(fields) < len(_FIELDS) - 1:
        return None
    uuid, name, total, used, mig, *health = fields
    problem = next((field.strip("[]") for field in (uuid, name, total, used) if _FAILED.fullmatch(field)), "")
    if health and health[0] == "Yes":
        problem = problem or "a memory row could not be remapped"
    if not uuid.startswith(("GPU-", "MIG-")):
        uuid, problem = "", problem or uuid
    return Gpu(int(index), uuid, name, _mib(total), _mib(used), mig == "Enabled", problem)


# Healthy GPUs also answer [N/A] and [Not Supported].
_FAILED = re.compile(r"\[(?!N/A|Not Supported|Insufficient Permissions).*\]", re.IGNORECASE)


def _mib(text: str) -> int:
    # A GPU that shares the system's memory answers [N/A].
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class _Answer:
    """nvidia-smi's output lines; `failed`: its exit status is not 0; `said`: its output in one line."""

    rows: list[str]
    failed: bool
    said: str

    @property
    def gpus(self) -> list[Gpu]:
        return [gpu for row in self.rows if (gpu := parse_gpu(row)) is not None]

    @property
    def complaints(self) -> list[str]:
        return [row.strip() for row in self.rows if parse_gpu(row) is None]


def _nvidia_smi(what: str, fields: tuple[str, ...], *which: str) -> _Answer:
    command = ["nvidia-smi", *which, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except FileNotFoundError:
        return _Answer([], False, "")
    except OSError as error:
        return _Answer([], True, f"{error.filename or 'nvidia-smi'}: {error.strerror}")
    except subprocess.TimeoutExpired:
        raise GpuError(
            "nvidia-smi does not answer within 60 s: the NVIDIA driver hangs; a reboot usually helps"
        ) from None
    if "No devices were found" in answer.stdout:
        return _Answer([], False, "")
    said = " ".join((answer.stdout + answer.stderr).split()) or f"exit status {answer.returncode}"
    return _Answer([line for line in answer.stdout.splitlines() if line.strip()], answer.returncode != 0, said)


def _visible(found: list[Gpu], chosen: str | None) -> list[Gpu]:
    """Applies CUDA_VISIBLE_DEVICES as CUDA does (indices, or beginnings of UUIDs), but strictly, in PCI bus order."""
    if chosen is None:
        return found
    kept = []
    for part in (part.strip() for part in chosen.split(",")):
        if part in ("", "-1", "NoDevFiles"):
            continue
        fits = [gpu for gpu in found if (gpu.index == int(part) if part.isdigit() else gpu.uuid.startswith(part))]
        if len(fits) != 1:
            raise GpuError(f"CUDA_VISIBLE_DEVICES={chosen}: {part} is not one of this machine's {len(found)} GPUs")
        kept += fits
    return sorted(set(kept), key=lambda gpu: gpu.index)
