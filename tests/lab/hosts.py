"""Hosts of one lab, made of namespaces (network, mount, uts, pid, ipc) over one Debian root. Needs root.

    python -m tests.lab.hosts [--for MODULE] COMMAND...
                                             # runs it where hosts can be made: in namespaces of its own, which have no
                                             # network; so a root with the PACKAGES of MODULE is made before

    with Hosts(root_with(PACKAGES), ["h1", "h2"], folder) as hosts:      # inside of such a command
        hosts["h1"].run("hostname")          # output of a command there, as root
        hosts["h1"].run("id", user="ada")    # as that user, who has the shared folder as home
        hosts["h1"].power_off()              # as when the cable of its power supply is pulled

All that is mounted lies in the mount namespace of COMMAND, and vanishes with it; so do the networks. Each host has the
address 10.77.0.11, .12, ... ; COMMAND has 10.77.0.1. The checkout with its .venv, Python, and the folder `shared` lie
on each host under the same paths as here: that is the lab's shared file system.
"""

import contextlib
import fcntl
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
# Which Debian it is; `make slurm-test DEBIAN=trixie` sets it.
SUITE = os.environ.get("LAB_DEBIAN", "bookworm")
INSIDE = "GROUNDSERVE_LAB_OF_HOSTS"  # set for COMMAND
HERE = "10.77.0.1"
# The one ordinary user of the lab.
USER, UID = "ada", 1700
# What Python and SGLang need of the system.
LIBRARIES = (
    "iproute2 libbz2-1.0 libffi8 libgomp1 liblzma5 libnuma1 libreadline8 libsqlite3-0 libssl3 libstdc++6 procps zlib1g"
)
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
# A host's first process, which reaps all others: it ignores SIGCHLD, so the kernel does.
_INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"
_PYTHON = str(Path(sys.base_prefix) / "bin/python3")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def obstacle() -> str:
    """Why hosts cannot be made on this machine; empty if they can."""
    if os.geteuid() != 0:
        return "namespaces want root"
    if missing := [tool for tool in ("mmdebstrap", "unshare", "nsenter", "ip") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} is not installed"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "mount", "-t", "proc", "proc", "/proc"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if tried.returncode == 0 else f"root may not make namespaces here: {tried.stderr.strip()}"


def root_with(packages: Sequence[str]) -> Path:
    """A Debian root with these packages and LIBRARIES, made once (a minute) and kept in the user's cache."""
    wanted = sorted({*packages, *LIBRARIES.split()})
    digest = hashlib.sha256(" ".join([SUITE, *wanted]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundserve-hosts"
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"{SUITE}-{digest}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.is_dir():
            return root
        making = cache / "making"
        shutil.rmtree(making, ignore_errors=True)
        left_out = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
        include = f"--include={','.join(wanted)}"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", *left_out, include, SUITE, str(making)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        making.rename(root)
    return root


class Host:
    """One host, which runs from the start."""

    def __init__(
        self, name: str, address: str, root: Path, addresses: dict[str, str], folder: Path, shared: Path
    ) -> None:
        self.name = name
        self.address = address
        self.files = folder / name / "root"  # its own files, as seen from here
        self._link = f"v-{name}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._started: list[subprocess.Popen[bytes]] = []
        for part in ("root", "upper", "work"):
            (folder / name / part).mkdir(parents=True)
        layers = f"lowerdir={root},upperdir={folder / name / 'upper'},workdir={folder / name / 'work'}"
        _run("mount", "-t", "overlay", f"host-{name}", "-o", layers, str(self.files))
        self._shared = shared
        (self.files / "root").chmod(0o755)  # Python may lie below it
        self.write("/etc/hostname", f"{name}\n")
        hosts = [f"{address} {other}" for other, address in addresses.items()]
        self.write("/etc/hosts", "\n".join(["127.0.0.1 localhost", *hosts, ""]))
        with (self.files / "etc/passwd").open("a") as users, (self.files / "etc/group").open("a") as groups:
            users.write(f"{USER}:x:{UID}:{UID}::{shared}:/bin/bash\n")
            groups.write(f"{USER}:x:{UID}:\n")
        self.power_on()

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> None:
        file = self.files / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        file.chmod(mode)

    def power_on(self) -> None:
        """Starts it; what was on its disk is still there, and no process runs."""
        shown = [ROOT, Path(sys.base_prefix), self._shared]
        script = ["set -e", f"hostname {self.name}", f"cd {self.files}"]
        script += ["mount -t proc proc proc", "mount -t sysfs -o ro sysfs sys"]
        script += ["mount -t tmpfs -o mode=755 run run", "mount -t tmpfs -o mode=1777 tmp tmp"]
        script += [
            "mount -t tmpfs -o mode=755 dev dev",
            "mkdir dev/pts dev/shm run/lock",
            "chmod 1777 dev/shm run/lock",
        ]
        script += [
            f"mknod -m 666 dev/{name} c {major} {minor}"
            for name, major, minor in (
                ("null", 1, 3),
                ("zero", 1, 5),
                ("full", 1, 7),
                ("random", 1, 8),
                ("urandom", 1, 9),
                ("tty", 5, 0),
            )
        ]
        script += ["mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts", "ln -s pts/ptmx dev/ptmx"]
        script += ["ln -s /proc/self/fd dev/fd"]
        for path in shown:
            script += [f"mkdir -p .{path}", f"mount --rbind {path} .{path}"]
        # A mere chroot would not hold: whoever joins a mount namespace, as `docker exec` does, is at its root.
        script += ["mkdir -p .before", "pivot_root . .before"]
        script += [f"exec chroot . sh -c 'umount -l /.before && exec {_PYTHON} -c \"{_INIT}\"'"]
        apart = ["--mount", "--propagation", "private", "--uts", "--pid", "--ipc", "--net", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *apart, "sh", "-c", "\n".join(script)], stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._pid = self._wait_for_init()
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        _run("ip", "link", "set", self._link, "master", "br0", "up")
        for words in ("addr add {}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _run("nsenter", "-t", str(self._pid), "-n", "ip", *words.format(self.address).split())

    def _wait_for_init(self) -> int:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and self._process.poll() is None:
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(_PYTHON.encode()):
                        return int(pid)
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} does not start")

    def power_off(self) -> None:
        """It is gone from one moment to the next, and says no word to anybody: no connection is closed."""
        assert self._process is not None
        subprocess.run(["ip", "link", "delete", self._link], check=False, capture_output=True)
        self._process.kill()
        for process in (self._process, *self._started):
            process.wait()
        self._started.clear()

    def command(self, *words: str, user: str = "root", **environ: str) -> list[str]:
        """The command line that runs these words there, with nothing but these variables beside the usual ones."""
        inside = ["nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p"]
        inside += [f"--root=/proc/{self._pid}/root", f"--wd=/proc/{self._pid}/root"]
        home = str(self._shared) if user == USER else "/root"
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"] if user == USER else []
        clean = ["/usr/bin/env", "-i", f"PATH={_PATH}", f"HOME={home}", f"USER={user}", f"LOGNAME={user}"]
        clean += [f"{name}={value}" for name, value in environ.items()]
        return [*inside, *become, *clean, *words]

    def run(self, *words: str, user: str = "root", code: int | None = 0, within: float = 120.0, **environ: str) -> str:
        """What it prints there; asserts its exit code unless that is None."""
        done = subprocess.run(
            self.command(*words, user=user, **environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        assert code in (None, done.returncode), f"{' '.join(words)} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, *words: str, log: Path, user: str = "root") -> "subprocess.Popen[bytes]":
        """Starts a program there, with its output in `log`. It ends with the host at the latest."""
        with log.open("ab") as output:
            program = subprocess.Popen(
                self.command(*words, user=user),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(program)
        return program


class Hosts:
    """The hosts of one lab by their names. `shared` is a folder that all of them and this process see."""

    def __init__(self, root: Path, names: Sequence[str], folder: Path) -> None:
        assert INSIDE in os.environ, "python -m tests.lab.hosts COMMAND... makes the place for hosts"
        self._folder = folder / "hosts"
        self._folder.mkdir(parents=True)
        # In memory, because an overlay cannot lie on another.
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "hosts", str(self._folder))
        self.shared = folder / "shared"
        self.shared.mkdir(mode=0o755)
        os.chown(self.shared, UID, UID)
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 11)}
        self._hosts: dict[str, Host] = {}
        for name, address in addresses.items():
            self._hosts[name] = Host(name, address, root, addresses, self._folder, self.shared)

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for host in self._hosts.values():
            host.power_off()
            _run("umount", "--lazy", str(host.files))
        _run("umount", "--lazy", str(self._folder))


def _run(*words: str) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def main(command: Sequence[str]) -> int:
    """Runs the command in a network and a mount namespace of its own, and returns its exit code."""
    if why := obstacle():
        print(f"no hosts can be made here: {why}", file=sys.stderr)
        return 1
    # Without a hardware address of its own, a bridge has another whenever a host comes or goes.
    steps = ["link set lo up", "link add br0 address 02:00:0a:4d:00:01 type bridge", f"addr add {HERE}/24 dev br0"]
    network = " && ".join(f"ip {step}" for step in [*steps, "link set br0 up"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it, too
    apart = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    script = f'{network} && exec "$@"'
    return subprocess.run(
        [*apart, "sh", "-c", script, "sh", *command], env={**os.environ, INSIDE: "yes"}, check=False
    ).returncode


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--for"]:
        if not obstacle():
            root_with(importlib.import_module(words[1]).PACKAGES)
        words = words[2:]
    sys.exit(main(words))
