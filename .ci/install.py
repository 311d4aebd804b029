"""Makes .venv from the lock files when it is missing or stale (make install).

A stamp, written last, says what .venv holds: no stamp, and it is made anew; an old one, and it is brought up
to date.
Runs on the machine's own Python, so it keeps to what an old one can still parse.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
ERRORS = ROOT / ".venv.log"
LOCKS = ["balancer/requirements.lock", "tests/requirements.lock", "replica/requirements-cpu.lock"]
# SGLang's packages are locked for these. Elsewhere it is the balancer and the command alone.
WITH_SGLANG = ("3.11", "3.12")
WITHOUT_SGLANG = ("3.13",)
TORCH = "replica/requirements-torch.txt"
# pip's words, and what a person can do about each. The first that fits is said.
KNOWN = [
    (
        ("No space left on device",),
        "the disk is full: .venv needs up to 4 GB (10 GB with a CUDA build of torch)",
    ),
    (
        (
            "NewConnectionError",
            "Failed to establish",
            "NameResolutionError",
            "ConnectTimeout",
            "ProxyError",
            "Read timed out",
        ),
        "the package index cannot be reached: check the network, or pip's own settings, and try again",
    ),
    (
        ("DO NOT MATCH THE HASHES",),
        "a package differs from the one that was locked: nothing of it was installed",
    ),
    (
        ("No matching distribution", "Could not find a version"),
        "the package index has no build of a locked package for this Python and machine",
    ),
    (
        ("gcc", "x86_64-linux-gnu-gcc", "Python.h"),
        "a package had to be built and could not: install a C compiler and the Python headers",
    ),
]


def fail(message):
    sys.exit("make install: " + message)


def version_of_python():
    return "%d.%d" % sys.version_info[:2]


def check_python():
    version = version_of_python()
    if version not in WITH_SGLANG + WITHOUT_SGLANG:
        fail(
            "found Python %s (%s), but 3.11 or 3.12 is needed (3.13 without SGLang): install it, or say "
            "PYTHON=/path/to/python3.11" % (version, sys.executable)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as missing:
        fail(
            "Python %s lacks %s: install its venv package (Debian: apt install python%s-venv)"
            % (version, missing.name, version)
        )


def wanted():
    """What a finished .venv is stamped with: a digest of all that decides its content, and of its place."""
    digest = hashlib.sha256(("%s %s" % (sys.version, VENV)).encode())
    for name in [*LOCKS, TORCH, "pyproject.toml", ".ci/install.py"]:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pip(*arguments):
    """Runs .venv's pip: progress bars to the terminal, warnings to a file that is read when it fails."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [
        str(VENV / "bin/python"),
        "-m",
        "pip",
        "install",
        *quiet,
        "--disable-pip-version-check",
        *arguments,
    ]
    with ERRORS.open("wb") as errors:
        status = subprocess.run(command, cwd=str(ROOT), stderr=errors).returncode
    if status == 0:
        return
    said = ERRORS.read_text(errors="replace")
    for words, advice in KNOWN:
        if any(word in said for word in words):
            fail("%s (pip's own words are in %s)" % (advice, ERRORS.name))
    last = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines() or ["no reason given"]
    fail("pip failed: %s (more in %s)" % (last[-1], ERRORS.name))


def install():
    fresh = not STAMP.exists()
    STAMP.unlink(missing_ok=True)
    if fresh:
        shutil.rmtree(str(VENV), ignore_errors=True)
        print("[1/4] making .venv with Python %d.%d" % sys.version_info[:2], flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    print("[2/4] installing the locked packages" + (" (a minute or two)" if fresh else ""), flush=True)
    has_sglang = version_of_python() in WITH_SGLANG
    locks = LOCKS if has_sglang else LOCKS[:1]
    pip("--no-deps", "--require-hashes", *[part for name in locks for part in ("-r", name)])
    if has_sglang:
        print("[3/4] installing torch, the biggest of them", flush=True)
        pip("-r", TORCH)
    else:
        print(
            "[3/4] no SGLang with Python %s: this balancer and command serve replicas that `run:` starts by another "
            "program, that run in Docker, or elsewhere. For SGLang on this machine's CPU, and for the tests, install "
            "Python 3.11 or 3.12, remove .venv and try again" % version_of_python(),
            flush=True,
        )
    print("[4/4] installing groundserve itself", flush=True)
    # What builds it is among SGLang's packages; without them pip fetches it.
    pip("--no-deps", *(["--no-build-isolation"] if has_sglang else []), "--editable", ".")
    if has_sglang:
        fill_gaps()


def fill_gaps():
    """Has each Python of .venv know what a plain CPU lacks, by a line in a .pth file that it reads at its start."""
    (packages,) = VENV.glob("lib/python*/site-packages")
    (packages / "groundserve_cpu.pth").write_text("import replica.cpu_imports; replica.cpu_imports.prepare()\n")


def main():
    check_python()
    want = wanted()
    if STAMP.exists() and STAMP.read_text() == want:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("waiting for another make install in this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if STAMP.exists() and STAMP.read_text() == want:
            return
        done = False
        try:
            install()
            done = True
        except KeyboardInterrupt:
            fail("interrupted: nothing is left half installed, run it again when you like")
        finally:
            if not done:
                shutil.rmtree(str(VENV), ignore_errors=True)
        ERRORS.unlink()
        # Written beside and renamed, so that a stamp is whole or absent.
        part = STAMP.with_name(".installed.part")
        part.write_text(want)
        os.replace(str(part), str(STAMP))


if __name__ == "__main__":
    main()
