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
        Gpu(0, "GPU-a", "NVIDIA H200", 143771, 4, mig=False, has_cuda_index=False),
        Gpu(1, "GPU-b", "NVIDIA H200", 143771, 9, mig=True, has_cuda_index=False),
    ]


def test_memory_that_the_driver_does_not_tell_is_zero(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "0, GPU-a, NVIDIA GB10, [N/A], [N/A], [N/A]")
    assert list_gpus({}) == [Gpu(0, "GPU-a", "NVIDIA GB10", 0, 0)]


def test_no_nvidia_smi_and_no_devices_mean_no_gpus(nvidia_smi: Path) -> None:
    answers(nvidia_smi, "No devices were found", status=6)
    assert list_gpus({}) == []
    nvidia_smi.unlink()
    assert list_gpus({}) == []


def test_broken_driver_is_an_error(nvidia_smi: Path) -> None:
    """A broken driver is an error, and is not taken for a machine without GPUs."""
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
def test_bad_cuda_visible_devices(nvidia_smi: Path, chosen: str) -> None:
    """An entry of CUDA_VISIBLE_DEVICES that does not match exactly one GPU is refused."""
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


GOOD = "0, GPU-a, NVIDIA RTX 3090, 24576, 1, [N/A]\n1, GPU-b, NVIDIA RTX 3090, 24576, 1, [N/A]"


@pytest.mark.parametrize("status", [0, 14, 15])
@pytest.mark.parametrize(
    "odd", ["WARNING: infoROM is corrupted at gpu 0000:01:00.0", "Unable to determine the device handle: GPU is lost."]
)
def test_what_nvidia_smi_says_beside_its_rows_hides_no_gpu(nvidia_smi: Path, status: int, odd: str) -> None:
    answers(nvidia_smi, f"{GOOD}\n{odd}", status)
    warned: list[str] = []
    assert [gpu.uuid for gpu in list_gpus({}, warned.append)] == ["GPU-a", "GPU-b"]
    assert warned == [f"nvidia-smi: {odd}"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("2, [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error]", "Unknown Error"),
        ("2, GPU-c, NVIDIA RTX 3090, [GPU requires reset], [GPU requires reset], [N/A]", "GPU requires reset"),
        ("2, GPU-c, NVIDIA RTX 3090, 24576, 1, Disabled, Yes", "a memory row could not be remapped"),
    ],
)
def test_a_gpu_that_has_failed_is_listed_with_its_problem(nvidia_smi: Path, row: str, problem: str) -> None:
    answers(nvidia_smi, f"{GOOD}\n{row}")
    warned: list[str] = []
    assert [gpu.problem for gpu in list_gpus({}, warned.append)] == ["", "", problem]
    assert warned == [f"GPU 2 is not used: {problem}"]


@pytest.mark.parametrize(
    ("rows", "is_certain"),
    [
        (GOOD, True),
        (f"{GOOD}\n2, GPU-c, NVIDIA RTX 3090, [GPU requires reset], [GPU requires reset], [N/A]", False),
        (f"{GOOD}\n2, GPU-c, NVIDIA H100, 81559, 1, Enabled, No", False),
        (f"{GOOD}\n3, GPU-d, NVIDIA L4, 23034, 1, [N/A], No", False),  # there is a GPU 2, which it does not list
    ],
)
def test_whether_cuda_counts_the_gpus_alike(nvidia_smi: Path, rows: str, is_certain: bool) -> None:
    answers(nvidia_smi, rows)
    assert {gpu.has_cuda_index for gpu in list_gpus({})} == {is_certain}


def test_lost_gpu_leaves_the_others(nvidia_smi: Path, tmp_path: Path) -> None:
    """If nvidia-smi gives up because of one lost GPU, the other GPUs are still listed."""
    driver = tmp_path / "gpus"
    for bus_id in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (driver / bus_id).mkdir(parents=True)
    nvidia_smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*0000:01:00.0*) echo "0, GPU-a, NVIDIA L4, 23034, 1, [N/A], No";;\n'
        '*0000:03:00.0*) echo "2, GPU-c, NVIDIA L4, 23034, 1, [N/A], No";;\n'
        '*) echo "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost."; exit 15;;\n'
        "esac\n"
    )
    assert [gpu.uuid for gpu in list_gpus({}, driver=driver)] == ["GPU-a", "GPU-c"]


def test_an_older_driver_is_asked_for_the_fields_it_knows(nvidia_smi: Path) -> None:
    nvidia_smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*remapped*) echo 'Field \"remapped_rows.failure\" is not a valid field to query.'; exit 2;;\n"
        '*) echo "0, GPU-a, Tesla V100, 16160, 1, [N/A]";;\n'
        "esac\n"
    )
    assert list_gpus({}) == [Gpu(0, "GPU-a", "Tesla V100", 16160, 1)]


def test_an_nvidia_smi_that_cannot_be_run_is_an_error(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/no/such/interpreter\n")
    nvidia_smi.chmod(0o644)
    with pytest.raises(GpuError, match=r"nvidia-smi failed: .*Permission denied"):
        list_gpus({})
