"""replica/gpu.py against a program that answers as nvidia-smi does."""

from pathlib import Path

import pytest

from replica.gpu import PRETEND, Gpu, GpuError, GpuProcess, list_gpus, list_processes

FOUR = "\n".join(f"{i}, GPU-{i}a, NVIDIA L4, 23034, {i}, [N/A]" for i in range(4))


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only program on PATH; a test writes what it does."""
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    program.touch(mode=0o755)
    return program


def answers(program: Path, text: str, status: int = 0) -> None:
    program.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <<'END'\n{text}\nEND\nexit {status}\n")


def test_gpus_are_read_in_bus_order(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "0, GPU-a, NVIDIA H200, 143771, 4, Disabled\n1, GPU-b, NVIDIA H200, 143771, 9, Enabled")
    assert list_gpus({}) == [
        Gpu(0, "GPU-a", "NVIDIA H200", 143771, 4, mig=False),
        Gpu(1, "GPU-b", "NVIDIA H200", 143771, 9, mig=True),
    ]


def test_memory_that_the_driver_does_not_tell_is_zero(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "0, GPU-a, NVIDIA GB10, [N/A], [N/A], [N/A]")
    assert list_gpus({}) == [Gpu(0, "GPU-a", "NVIDIA GB10", 0, 0)]


def test_no_nvidia_smi_and_no_devices_mean_no_gpus(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "No devices were found", status=6)
    assert list_gpus({}) == []
    nvidia_smi.unlink()
    assert list_gpus({}) == []


def test_a_broken_driver_is_an_error_and_not_a_machine_without_gpus(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", status=9)
    with pytest.raises(GpuError, match="couldn't communicate with the NVIDIA driver"):
        list_gpus({})


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [("2,3", [2, 3]), ("3,1", [1, 3]), ("GPU-1a", [1]), ("GPU-2, 0", [0, 2]), ("", []), ("-1", [])],
)
def test_cuda_visible_devices_limits_what_may_be_leased(nvidia_smi: Path, chosen: str, indices: list[int]) -> None:
    answers(nvidia_smi, FOUR)
    assert [gpu.index for gpu in list_gpus({"CUDA_VISIBLE_DEVICES": chosen})] == indices


@pytest.mark.parametrize("chosen", ["4", "GPU-x", "GPU-"])
def test_cuda_visible_devices_that_names_no_single_gpu_is_refused(nvidia_smi: Path, chosen: str) -> None:
    answers(nvidia_smi, FOUR)
    with pytest.raises(GpuError, match=f"CUDA_VISIBLE_DEVICES={chosen}"):
        list_gpus({"CUDA_VISIBLE_DEVICES": chosen})


def test_processes_on_the_gpus_are_listed_with_their_names(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "GPU-a, 4242, 1024, /usr/bin/python, -m thing\nGPU-b, 7, [N/A], [Not Found]")
    assert list_processes() == [
        GpuProcess("GPU-a", 4242, "/usr/bin/python, -m thing", 1024),
        GpuProcess("GPU-b", 7, "[Not Found]", 0),
    ]


def test_gpus_can_be_pretended_for_tests() -> None:
    assert [gpu.uuid for gpu in list_gpus({PRETEND: "2"})] == ["GPU-pretended-0", "GPU-pretended-1"]
    with pytest.raises(GpuError, match="REPLICA_PRETEND_GPUS=many"):
        list_gpus({PRETEND: "many"})
