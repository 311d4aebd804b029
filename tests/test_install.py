"""make install's script: what it refuses, and that it leaves nothing half installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make install reads, in a folder of its own."""
    for name in (".ci/install.py", "pyproject.toml", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*/requirements*"):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.parent.name)
    return tmp_path


def install(checkout: Path, *before: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the script; before: statements that are run first."""
    code = "; ".join([*before, "import runpy", f"runpy.run_path('{checkout}/.ci/install.py', run_name='__main__')"])
    environ = {**os.environ, **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 14)])
def test_a_python_that_cannot_serve_is_refused_in_one_line(checkout: Path, version: tuple[int, int]) -> None:
    answer = install(checkout, "import sys", f"sys.version_info = {(*version, 0, 'final', 0)}")
    assert answer.returncode == 1
    assert f"found Python {version[0]}.{version[1]}" in answer.stderr
    assert "but 3.11 or 3.12 is needed (3.13 without SGLang)" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_unreachable_package_index(checkout: Path) -> None:
    """If the package index cannot be reached, nothing is left installed."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv/left by a killed install").touch()
    nowhere = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    answer = install(checkout, **nowhere, PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    assert answer.returncode == 1
    assert "the package index cannot be reached: check the network" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_what_is_up_to_date_is_left_alone(checkout: Path) -> None:
    code = f"import runpy; print(runpy.run_path('{checkout}/.ci/install.py')['wanted']())"
    stamp = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.installed").write_text(stamp)
    answer = install(checkout)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    (checkout / "pyproject.toml").write_text("changed")
    answer = install(checkout, PIP_CONFIG_FILE="/dev/null", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert answer.returncode == 1  # it went to work, on a .venv without an interpreter
