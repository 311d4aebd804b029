"""python -m replica, up to what it becomes: tests/e2e serves with it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Neither torch nor sglang can be imported: what does not start SGLang must not need them.
WITHOUT = """
import runpy, sys
sys.modules["torch"] = sys.modules["sglang"] = sys.modules["transformers"] = None
sys.argv = ["replica", *sys.argv[1:]]
runpy.run_module("replica", run_name="__main__", alter_sys=False)
"""


def replica(*arguments: str, path: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """python -m replica where there is no GPU, and neither torch nor sglang."""
    keep = {"HOME": os.environ.get("HOME", "/"), "PATH": str(path) if path else "/nowhere"}
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**keep, **environ}, check=False)


def test_help_tells_flags_and_variables() -> None:
    answer = replica("--help")
    assert answer.returncode == 0
    for name in ("--model", "--port", "--gpus", "--dry-run", "--list-gpus", "LEASE_DIR", "MODELS_DIR", "SGLANG_ARGS"):
        assert name in answer.stdout


def test_dry_run_on_a_cpu() -> None:
    """A dry run without a GPU prints the CPU command and starts nothing."""
    answer = replica("--dry-run")
    assert answer.returncode == 0, answer.stderr
    (line,) = answer.stdout.splitlines()
    assert line.startswith("replica: CPU: ")
    assert "--served-model-name smollm2-135m" in line
    assert "--device cpu" in line


def test_a_dry_run_on_gpus_prints_lease_and_command(tmp_path: Path) -> None:
    answer = replica(
        *("--device", "cuda", "--dry-run", "--", "--mem-fraction-static", "0.8"),
        REPLICA_PRETEND_GPUS="4",
        GPUS_PER_REPLICA="2",
        LEASE_DIR=str(tmp_path),
    )
    assert answer.returncode == 0, answer.stderr
    (line,) = answer.stdout.splitlines()
    assert line.startswith("replica: GPU 0 (pretended GPU, GPU-pretended-0), GPU 1 (pretended GPU, GPU-pretended-1): ")
    assert "--model-path liuhaotian/llava-v1.6-vicuna-7b" in line
    assert line.endswith("--tp-size 2 --mem-fraction-static 0.8")


def test_each_start_draws_a_seed_of_its_own() -> None:
    seeds = {replica("--dry-run").stdout.partition("--random-seed ")[2].split()[0] for _ in range(3)}
    assert len(seeds) == 3


def test_list_gpus_is_json_with_who_holds_them(tmp_path: Path) -> None:
    answer = replica("--list-gpus", REPLICA_PRETEND_GPUS="2", LEASE_DIR=str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert [(one["index"], one["uuid"], one["held_by"]) for one in told] == [
        (0, "GPU-pretended-0", None),
        (1, "GPU-pretended-1", None),
    ]
    assert json.loads(replica("--list-gpus").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--model", "smollm3"], {}, "replica: unknown model smollm3: did you mean smollm2-135m?"),
        (["--model", "./nowhere"], {}, "replica: there is no folder ./nowhere"),
        (["--model", "smollm2-135m"], {}, "replica: sglang is not installed"),
        (["--port", "0"], {}, "replica: --port 0: use a whole number from 1 to 65535"),
        (["--device", "cuda"], {}, "0 NVIDIA GPUs can be leased here, but this replica needs 1"),
        (["--gpus", "2"], {"REPLICA_PRETEND_GPUS": "1"}, "1 NVIDIA GPU can be leased here, but this replica needs 2"),
    ],
)
def test_a_failure_is_one_line_and_status_1(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], says: str
) -> None:
    dry = [] if "sglang" in says else ["--dry-run"]
    answer = replica(*arguments, *dry, LEASE_DIR=str(tmp_path), **environ)
    assert answer.returncode == 1
    assert says in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stdout == ""


def test_a_broken_driver_stops_the_start(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    answer = replica("--dry-run", path=tmp_path)
    assert answer.returncode == 1
    assert "Driver/library version mismatch (repair the NVIDIA driver, or use --device cpu)" in answer.stderr


def test_a_port_in_use_and_a_missing_token_stop_the_real_thing() -> None:
    command = [sys.executable, "-m", "replica", "--model", "llama-2-7b-chat", "--device", "cpu"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        busy = subprocess.run([*command, "--port", port], capture_output=True, text=True, cwd=ROOT, check=False)
    assert busy.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in busy.stderr
    environ = {"HOME": "/nowhere", "PATH": os.environ["PATH"]}
    gated = subprocess.run(
        [*command, "--port", port], capture_output=True, text=True, cwd=ROOT, env=environ, check=False
    )
    assert gated.returncode == 1
    assert "meta-llama/Llama-2-7b-chat-hf is gated" in gated.stderr


def test_an_old_python_is_told_so() -> None:
    # An older interpreter than 3.11 is not at hand everywhere: the check is run with a version that says it is one.
    code = "import sys; sys.version_info = (3, 9, 0, 'final', 0); import runpy; runpy.run_module('replica')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 1
    assert "Python 3.9 is too old: Python 3.11 is needed" in answer.stderr


def test_exec_gets_a_lease(tmp_path: Path) -> None:
    """A program other than SGLang gets a lease and sees only its GPUs."""
    show = "echo $CUDA_DEVICE_ORDER $CUDA_VISIBLE_DEVICES; ls /proc/$$/fd -l | grep -c GPU-pretended"
    answer = replica(
        *("--gpus", "2", "--exec", "--", "/bin/bash", "-c", show),
        REPLICA_PRETEND_GPUS="4",
        LEASE_DIR=str(tmp_path),
        PATH=os.environ["PATH"],
        path=Path(os.environ["PATH"].split(os.pathsep)[0]),
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[1:] == ["PCI_BUS_ID 0,1", "2"]


def test_another_program_sees_no_gpu_where_there_is_none() -> None:
    answer = replica("--exec", "--", "/bin/sh", "-c", 'echo "<$CUDA_VISIBLE_DEVICES>"')
    assert (answer.returncode, answer.stdout) == (0, "<>\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--exec",), "--exec runs the command that follows --"), (("--exec", "--", "/no/such"), "No such file")],
)
def test_a_command_that_cannot_be_run_is_refused(arguments: tuple[str, ...], says: str) -> None:
    answer = replica(*arguments)
    assert answer.returncode == 1
    assert says in answer.stderr


def test_list_of_gpus_has_their_order(tmp_path: Path) -> None:
    """The list of GPUs shows in which order replicas get them."""
    rows = json.loads(replica("--list-gpus", "--gpus", "2", REPLICA_PRETEND_GPUS="5", LEASE_DIR=str(tmp_path)).stdout)
    assert [row["seat"] for row in rows] == [0, 0, 1, 1, None]
    assert [row["kinds"] for row in rows] == [[]] * 5
    rows = json.loads(
        replica("--list-gpus", "--gpu-kinds", "pretended,L4", REPLICA_PRETEND_GPUS="1", LEASE_DIR=str(tmp_path)).stdout
    )
    assert rows[0]["kinds"] == ["pretended"]
