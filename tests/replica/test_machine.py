"""replica/machine.py: each thing that can be wrong with a machine gets a line that says so."""

import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from replica.gpu import Gpu
from replica.machine import (
    MachineError,
    check_memory,
    check_port,
    check_token,
    cpu_dtype,
    detects_parsers,
    wait_for_memory,
)
from replica.options import Options
from replica.presets import PRESETS

LLAMA = PRESETS["llama-2-7b-chat"]


def test_a_port_in_use_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"cannot listen on 127.0.0.1 port {port} .*in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(MachineError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        check_port("192.0.2.1", 8000)


def test_gated_model_needs_a_token(tmp_path: Path) -> None:
    """A gated model needs a token unless it has been downloaded before."""
    nobody = {"HF_HOME": str(tmp_path)}
    with pytest.raises(MachineError, match=r"Llama-2-7b-chat-hf is gated: .*HF_TOKEN"):
        check_token(LLAMA, Options(), nobody)
    check_token(LLAMA, Options(hf_token="hf_x"), nobody)
    check_token(PRESETS["llava-v1.6-vicuna-7b"], Options(), nobody)
    (tmp_path / "hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots").mkdir(parents=True)
    check_token(LLAMA, Options(), nobody)


def test_a_login_of_the_hugging_face_command_counts_as_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_x")
    check_token(LLAMA, Options(), {"HF_HOME": str(tmp_path)})


def test_too_little_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(MachineError, match=r"takes about 16 GiB of memory and 3\.5 GiB are free"):
        check_memory(LLAMA, available=3.5)
    check_memory(LLAMA, available=16.0)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu sse2 avx2 fma", "float32"),
        ("fpu avx2 avx512f avx512bw", "float32"),
        ("fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("fpu avx2 amx_bf16 amx_tile", "bfloat16"),
    ],
)
def test_cpu_dtype(tmp_path: Path, flags: str, dtype: str) -> None:
    """A CPU computes in the number type that it has instructions for."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    assert cpu_dtype(tmp_path / "cpuinfo") == dtype


def test_an_unknown_cpu_computes_in_float32(tmp_path: Path) -> None:
    assert cpu_dtype(tmp_path / "cpuinfo") == "float32"


class Driver:
    """An nvidia-smi whose GPU has as much memory in use as the test says."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "nvidia-smi"
        self.program.touch(mode=0o755)
        self.now = 0.0

    def uses(self, mib: int, process: str) -> None:
        self.program.write_text(
            '#!/bin/sh\ncase "$1" in\n'
            f'*compute-apps*) echo "{process}" ;;\n'
            f'*) echo "0, GPU-a, NVIDIA L4, 23034, {mib}, [N/A]" ;;\nesac\n'
        )


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("PATH", str(tmp_path))
    return Driver(tmp_path)


def test_memory_that_a_dead_replica_left_is_waited_for(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.uses(20000, "GPU-a, 77, 20000, sglang")

    def pause(seconds: float) -> None:
        driver.now += seconds
        if driver.now >= 3:
            driver.uses(100, "")

    held = (Gpu(0, "GPU-a", "NVIDIA L4", 23034, 0),)
    wait_for_memory(held, 16, environ={}, clock=lambda: driver.now, pause=pause)
    assert driver.now == 3
    assert capsys.readouterr().err == ""


def test_memory_that_others_keep_is_warned_of_by_name(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.uses(20000, "GPU-a, 77, 20000, python train.py")

    def pause(seconds: float) -> None:
        driver.now += seconds

    held = (Gpu(0, "GPU-a", "NVIDIA L4", 23034, 0),)
    wait_for_memory(held, 16, environ={}, clock=lambda: driver.now, pause=pause)
    assert driver.now == 30
    assert "GPU 0 has 3034 of 23034 MiB free" in (said := capsys.readouterr().err)
    assert "python train.py (77, 20000 MiB)" in said


def test_memory_that_comes_bit_by_bit_is_waited_for(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """Others give it back one after the other, and are told for how long it lacks."""
    driver.uses(20000, "")

    def pause(seconds: float) -> None:
        driver.now += seconds
        if driver.now % 20 == 0:
            driver.uses(20000 - int(50 * driver.now), "")

    held = (Gpu(0, "GPU-a", "NVIDIA L4", 23034, 0),)
    told: list[Mapping[str, float]] = []
    began = time.time()
    wait_for_memory(held, 7, environ={}, clock=lambda: driver.now, pause=pause, tell=told.append)
    assert driver.now == 100
    assert [list(short) for short in told] == [["GPU-a"]] * 100 + [[]]
    assert began <= told[0]["GPU-a"] <= told[99]["GPU-a"] <= time.time()
    assert capsys.readouterr().err == ""


def test_progress_is_that_of_all_its_gpus(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU has enough at once, and what comes on the other is progress still."""
    held = tuple(Gpu(n, f"GPU-{n}", "NVIDIA L4", 23034, 0) for n in range(2))

    def pause(seconds: float) -> None:
        driver.now += seconds

    def listed(_: Mapping[str, str]) -> list[Gpu]:
        used = 20000 - 200 * int(driver.now // 20)
        return [replace(held[0], memory_used=0 if driver.now else 20000), replace(held[1], memory_used=used)]

    monkeypatch.setattr("replica.gpu.list_gpus", listed)
    wait_for_memory(held, 4, environ={}, clock=lambda: driver.now, pause=pause)
    assert driver.now == 120


def test_a_model_of_unknown_size_wants_nine_tenths_of_the_gpu(driver: Driver) -> None:
    driver.uses(2000, "")
    held = (Gpu(0, "GPU-a", "NVIDIA L4", 23034, 0),)
    wait_for_memory(held, 0, environ={}, clock=lambda: 0, pause=lambda _: pytest.fail("there is room"))


def test_sglang_chooses_parsers_itself() -> None:
    """The locked SGLang version chooses its parsers by the chat template."""
    assert detects_parsers()
