"""Debian 13 with its own Python, 3.13: make install, a service with simulated replicas, a restart that loses no stream.

Its root is made from packages and kept in one's cache folder. What runs in it has mounts, processes and a loopback of
its own, so nothing of this machine is written to, and nothing outlives the test.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.needed import lacking

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "groundserve-tests"
PACKAGES = "python3,python3-venv,make"
# Seconds. Making the root takes a minute where the mirror is fast.
PATIENCE = 600.0

# Mounts are seen by this process and its children alone. $0: the root, $1: the checkout, $2: wheels.
ENTER = """
set -e
for folder in tmp root run; do mount -t tmpfs tmpfs "$0/$folder"; done
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
mkdir "$0/root/groundserve" "$0/root/wheels"
mount --bind "$2" "$0/root/wheels"
tar -x -C "$0/root/groundserve" -f "$1"
ip link set lo up
exec chroot "$0" /usr/bin/env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 \\
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels sh /root/groundserve/install.sh
"""

INSTALL = """
set -e
cd /root/groundserve
make install
make install
make up && exit 1
.venv/bin/python serve.py
"""

# Under Debian's Python.
SERVE = """
import sys
from pathlib import Path
from tests.operate.command_line import Groundserve
from tests.operate.streaming import streaming

print(f"python {sys.version_info.major}.{sys.version_info.minor}")
there = Groundserve(Path("/root"))
there.up(there.service("lab")).until_up(300)
with streaming(there.status("lab")["service"]["endpoint"]) as seen:
    there("restart", "lab")
    there("scale", "lab", "3")
    there.until("lab", lambda status: status["service"]["ready"] == 3)
assert seen.failed == [], seen.failed
there("status", code=0)
there("down", "lab")
there.until_nothing_runs()
print(f"{len(set(seen.replicas))} replicas answered, nothing was lost")
"""


def _need(is_here: bool, what: str) -> None:
    if not is_here:
        lacking(f"a root of Debian 13 wants {what}")


def _ran(*command: str | Path) -> str:
    nothing = subprocess.DEVNULL
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=nothing)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


@pytest.fixture
def debian() -> Path:
    """A folder with Debian 13, whose /usr is not written to again."""
    _need(os.geteuid() == 0, "root")
    for program in ("mmdebstrap", "unshare", "chroot", "ip"):
        _need(shutil.which(program) is not None, program)
    root = KEPT / "debian-13"
    if not (root / "usr/bin/python3.13").exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        fresh = Path(f"{root}.{os.getpid()}")
        try:
            _ran("mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", "trixie", fresh)
            shutil.rmtree(root, ignore_errors=True)
            fresh.rename(root)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return root


@pytest.fixture
def wheels() -> Path:
    """What make install fetches there, fetched with this machine's pip and its settings."""
    folder = KEPT / "wheels-3.13"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", folder)
    there = ("--only-binary", ":all:", "--python-version", "3.13")
    _ran(*pip, *there, "--no-deps", "--require-hashes", "-r", ROOT / "balancer/requirements.lock")
    _ran(*pip, *there, "--no-deps", "setuptools>=77")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An archive of what is in the repository, changes that are not committed included, and of what is run there."""
    listed = _ran("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    with tarfile.open(tmp_path / "checkout.tar", "w") as packed:
        for name in filter(None, listed):
            if (ROOT / name).exists():
                packed.add(ROOT / name, name, recursive=False)
        for name, text in (("install.sh", INSTALL), ("serve.py", SERVE)):
            (tmp_path / name).write_text(text)
            packed.add(tmp_path / name, name)
    return tmp_path / "checkout.tar"


@pytest.mark.timeout(PATIENCE * 3)
def test_python_3_13_serves(debian: Path, wheels: Path, checkout: Path) -> None:
    own = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts")
    said = _ran(*own, "sh", "-c", ENTER, debian, checkout, wheels)
    assert "[3/4] no SGLang with Python 3.13" in said
    assert said.count("[4/4]") == 1, "the second make install had nothing to do"
    assert "make up: this Python has no SGLang" in said
    assert "python 3.13" in said
    assert "nothing was lost" in said
