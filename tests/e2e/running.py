"""The real programs that tests start on loopback: python -m replica on the CPU, python -m balancer in front of it."""

from pathlib import Path

import httpx

from tests.support.program import BalancerProgram, Program
from tests.support.until import wait_until

START = 480.0  # seconds a replica may take on a busy machine; alone it takes about 30


def is_running(pid: int) -> bool:
    """Not so of a process that has ended and whose parent has not asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Replica(Program):
    """python -m replica on the CPU, with variables as in `environ`."""

    def __init__(self, model: str, port: int, log: Path, **environ: str) -> None:
        self.model = model
        self.port = port
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ("-m", "replica", "--device", "cpu", "--model", model, "--port", str(self.port))
        super().__init__(*flags, name=f"{model} on {self.port}", log=log, environ=environ)

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


class Balancer(BalancerProgram):
    """python -m balancer in front of such replicas, listening."""

    def __init__(self, log: Path, replicas: list[Replica], *flags: str) -> None:
        super().__init__([replica.url for replica in replicas], *flags, log=log)
        wait_until(self.is_listening, "the balancer listens", 30)

    def statuses(self) -> list[str]:
        """The displayed status of each replica, in the order they were given."""
        replicas = httpx.get(f"{self.admin_url}/status", timeout=10).json()["replicas"]
        return [replica["status"] for replica in replicas]

    def wait_all_ready(self) -> None:
        wait_until(lambda: self.check_alive() and set(self.statuses()) == {"READY"}, "all replicas are READY")
