"""Real programs that tests start on loopback: python -m replica on the CPU, python -m balancer in front of it."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support.until import wait_until

ROOT = Path(__file__).resolve().parents[2]
START = 480.0  # seconds a replica may take on a busy machine; alone it takes about 30
_LIBC = ctypes.CDLL(None)


def is_running(pid: int) -> bool:
    """Not so of a process that has ended and whose parent has not asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _die_with_pytest() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed test run leaves nothing behind


class Program:
    """A child process whose output goes to a file, which is shown when a test fails."""

    def __init__(self, name: str, log: Path, *arguments: str, **environ: str) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self._environ = environ
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **self._environ},
                preexec_fn=_die_with_pytest,
            )

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(line[:300] for line in text)

    def check_alive(self) -> bool:
        """True, so that it can stand in a condition that is waited for; an early end fails the test at once."""
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.tail()}"
        return True

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)


class Replica(Program):
    """python -m replica on the CPU, with variables as in `environ`."""

    def __init__(self, model: str, port: int, log: Path, **environ: str) -> None:
        self.model = model
        self.port = port
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ("-m", "replica", "--device", "cpu", "--model", model, "--port", str(self.port))
        super().__init__(f"{model} on {self.port}", log, *flags, **environ)

    def restart(self) -> None:
        """A dead replica again, on the same port."""
        self.process = self._start()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self) -> None:
        wait_until(lambda: self.is_ready() or not self.check_alive(), f"{self.name} is ready", START)

    def offspring(self) -> list[int]:
        """Its children, and theirs."""
        found = [self.process.pid]
        for pid in found:
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in file.read_text().split()]
        return found[1:]

    def scheduler(self) -> int:
        """The process that generates: it holds the model, and so the most memory. (Its title is not always set.)"""

        def resident(pid: int) -> int:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

        return max(self.offspring(), key=resident)

    def figure(self, name: str) -> float:
        """The sum of one of SGLang's metrics over its labels; 0 before it first appears."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))


class Balancer(Program):
    """python -m balancer in front of replicas."""

    def __init__(self, log: Path, replicas: list[Replica], *flags: str) -> None:
        listed = [part for replica in replicas for part in ("--replica", replica.url)]
        ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        super().__init__("balancer", log, "-m", "balancer", *ports, *flags, *listed)
        wait_until(lambda: self.check_alive() and self._said("admin on "), "the balancer listens", 30)
        self.url = self._said("listening on ")
        self.admin = self._said("admin on ")

    def _said(self, before: str) -> str:
        lines = self.log.read_text().splitlines()
        return next((line.removeprefix(before) for line in lines if line.startswith(before)), "")

    def statuses(self) -> list[str]:
        """The displayed status of each replica, in the order they were given."""
        replicas = httpx.get(f"{self.admin}/status", timeout=10).json()["replicas"]
        return [replica["status"] for replica in replicas]

    def wait_all_ready(self) -> None:
        wait_until(lambda: self.check_alive() and set(self.statuses()) == {"READY"}, "all replicas are READY")
