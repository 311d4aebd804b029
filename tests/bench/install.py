"""The peers' own environments, made on first use in a cache folder: nothing of them enters the project's."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).with_name("pins")


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/groundserve-bench, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundserve-bench"


def environment(name: str, cache: Path, pinned: Path = PINS) -> Path:
    """The virtual environment with exactly what NAME.txt in `pinned` lists; a change there makes another one.

    Raises Unavailable when it cannot be made; what is half made is removed.
    """
    pins = pinned / f"{name}.txt"
    folder = cache / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    if (folder / "complete").exists():
        return folder
    print(f"  installing {name} into {folder} (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    python = folder / "bin/python"
    try:
        call([sys.executable, "-m", "venv", str(folder)])
        call(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "-r",
                str(pins),
            ]
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / "complete").touch()
    return folder


def pinned_version(name: str) -> str:
    """The version of NAME itself in pins/NAME.txt."""
    lines = (PINS / f"{name}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def debian_nginx(cache: Path) -> Path:
    """The nginx on this machine, else Debian's package unpacked in the cache, so that no service is started."""
    if present := shutil.which("nginx"):
        return Path(present)
    program = cache / "nginx/usr/sbin/nginx"
    if program.exists():
        return program
    if not shutil.which("apt-get"):
        raise Unavailable("there is neither an nginx on this machine nor apt-get to fetch Debian's: install nginx")
    print(f"  fetching Debian's nginx into {cache} (once)", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            call(["apt-get", "download", "nginx"], cwd=folder)
        except Unavailable:
            if os.geteuid() != 0:
                raise
            call(["apt-get", "update"])  # a fresh container has no package lists yet
            call(["apt-get", "download", "nginx"], cwd=folder)
        (package,) = Path(folder).glob("nginx_*.deb")
        call(["dpkg-deb", "--extract", str(package), str(Path(folder) / "nginx")])
        (Path(folder) / "nginx").rename(cache / "nginx")
    return program


def call(command: list[str], cwd: str | None = None) -> str:
    """Runs an installer quietly; Unavailable with its last line of complaint when it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{' '.join(command[:3])}: {error}") from error
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no output"]
        complaint = next((line for line in said if line.lower().startswith(("error", "e:"))), said[-1])
        raise Unavailable(f"{' '.join(command[:4])} failed: {complaint.strip()}")
    return done.stdout + done.stderr
