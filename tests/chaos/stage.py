"""The setting of a chaos run: some replicas, a balancer process in front of them, and what it reports about them."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer.operate.engines.ports import REPLICA_PORTS, free_ports, is_free
from tests.chaos.client import Wish, ask
from tests.chaos.replica import Replica
from tests.chaos.stopwatch import Stopwatch
from tests.support.program import Program
from tests.support.until import until

# The balancer's timeouts and intervals in seconds, so short that a fault takes a second instead of a minute.
SETTINGS: dict[str, Any] = {
    "ready_interval": 0.1,
    "ready_timeout": 0.4,
    "connect_timeout": 0.5,
    "first_byte_timeout": 3.0,
    "idle_timeout": 2.0,
    "upstream_keep_alive": 0.5,
    "silence_timeout": 5.0,
    "ejection_time": 0.3,
    "max_ejection_time": 0.6,
    "drain_grace": 0.1,
    "drain_timeout": 5.0,
    "start_wait": 10.0,
    "max_in_flight": 3,  # low, so that requests wait when replicas are missing
}
# Seconds by which replicas that all were gone may have been back before a request that waited for them was told no.
SLACK = 3.0
# States of a TCP socket, as /proc/net/tcp numbers them; the others are short.
STATES = {"01": "established", "08": "closed by the other end", "0A": "listening"}
READINESS: dict[str, Any] = {"endpoint_probe_interval_seconds": 0.3, "timeout_seconds": 0.5}


class Violation(AssertionError):
    """A promise of the balancer was broken."""


@dataclass(slots=True)
class Stage:
    """`is_dns`: the balancer finds the replicas by a DNS name, otherwise by --replica and `PUT /replicas`."""

    folder: Path
    replicas: list[Replica]
    is_dns: bool
    settings: dict[str, Any]
    readiness: dict[str, Any]
    port: int = 0
    admin_port: int = 0
    program: Program | None = None

    @property
    def log(self) -> Path:
        return self.folder / "requests.log"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def name_of(self, replica: Replica) -> str:
        return replica.address if self.is_dns else f"replica-{replica.number}"

    # The balancer

    async def start(self) -> None:
        await asyncio.gather(*(replica.start() for replica in self.replicas))
        (self.folder / "names").write_text(json.dumps({"addresses": [replica.host for replica in self.replicas]}))
        config = self.folder / "config.json"
        if self.is_dns:
            said = {
                "names": str(self.folder / "names"),
                "discover": f"dns://replica:{self.replicas[0].port}",
                "settings": self.settings,
                "readiness": self.readiness,
            }
            config.write_text(json.dumps(said))
            command = ["-m", "tests.chaos.names", str(config)]
        else:
            service = {"service": {"replicas": 1, "readiness_probe": {"path": "/health", **self.readiness}}}
            service |= {"resources": {"ports": 8000}, "run": "sglang serve", "x-groundserve": self.settings}
            config.write_text(json.dumps(service))  # JSON is YAML
            command = ["-m", "balancer", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json"]
            command += ["--service", str(config)]
            command += [word for replica in self.replicas for word in ("--replica", replica.url)]
        self.program = program = Program(*command, name="the balancer", log=self.log, has_own_errors=True)
        await until(lambda: program.check_alive() and program.said("admin on "), "the balancer listens", 120)
        self.port, self.admin_port = (
            int(program.said(start).rpartition(":")[2]) for start in ("listening on ", "admin on ")
        )

    @property
    def complaints(self) -> list[str]:
        """The balancer's lines on standard error, except for those on where it listens, what it merely notes, and
        unresolved names.
        """
        assert self.program is not None
        expected = re.compile(r"(listening|admin) on |groundserve: INFO: |.*WARNING: DNS ")
        return [line for line in self.program.errors.read_text().splitlines() if not expected.match(line)]

    async def stop(self) -> None:
        """Stops the balancer as an operator would; raises Violation if it does not end cleanly."""
        assert self.program is not None
        if self.program.process.poll() is None:
            self.program.signal(signal.SIGTERM)
        try:
            code = await self.program.ended(15)
        except AssertionError:
            raise Violation("the balancer does not end within 15 s of SIGTERM") from None
        if code:
            raise Violation(f"the balancer ended with {code}: {self.complaints[-5:]}")

    def stopwatch(self) -> Stopwatch:
        """Started now. Limits do not count what other programs on a busy machine add to them."""
        assert self.program is not None
        replicas = [replica.process.pid for replica in self.replicas if replica.process is not None]
        return Stopwatch(self.program.pid, *replicas)

    # What it reports

    async def status(self) -> dict[str, Any]:
        got = await ask(self.admin_port, Wish("", "GET", "/status"))
        if got.status != 200 or got.end != "whole":
            raise Violation(f"/status: {got}")
        said: dict[str, Any] = json.loads(got.body)
        return said

    async def statuses(self) -> dict[str, str]:
        """Each replica's status by its name."""
        return {row["name"]: row["status"] for row in (await self.status())["replicas"]}

    async def probes_of(self, replica: Replica) -> str:
        """The results of the replica's probes from /metrics, to find out why it is not ready."""
        lines = (await ask(self.admin_port, Wish("", "GET", "/metrics"))).body.decode().splitlines()
        label = f'replica="{self.name_of(replica)}"'
        return "; ".join(line for line in lines if line.startswith("groundserve_probes_total") and label in line)

    async def post(self, path: str) -> None:
        got = await ask(self.admin_port, Wish("", "POST", path))
        if got.status != 200:
            raise Violation(f"POST {path}: {got.status} {got.body!r}")

    async def id_of(self, replica: Replica) -> int:
        rows = (await self.status())["replicas"]
        return next(int(row["id"]) for row in rows if row["name"] == self.name_of(replica))

    async def list_replicas(self, replicas: list[Replica]) -> None:
        """Makes these the service's replicas, by this balancer's way of discovery."""
        if self.is_dns:
            self.answer_names(addresses=[replica.host for replica in replicas])
            return
        body = [{"id": r.number, "name": self.name_of(r), "endpoint": r.url} for r in replicas]
        got = await ask(self.admin_port, Wish("", "PUT", "/replicas", json.dumps({"replicas": body}).encode()))
        if got.status != 200:
            raise Violation(f"PUT /replicas: {got.status} {got.body!r}")

    def answer_names(self, **answer: Any) -> None:
        spare = self.folder / "names.next"
        spare.write_text(json.dumps(answer))
        spare.replace(self.folder / "names")

    def descriptors(self) -> list[str]:
        """What each of the balancer's descriptors is; a TCP socket by its two ends and its state."""
        assert self.program is not None
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        sockets = {
            f"socket:[{row[9]}]": f"{_address(row[1])} to {_address(row[2])}, {STATES.get(row[3], row[3])}"
            for row in rows
        }
        pairs = (line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        sockets |= {f"socket:[{inode}]": "a Unix socket" for inode in pairs}
        found = []
        for link in Path(f"/proc/{self.program.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                what = str(link.readlink())
                found.append(sockets.get(what, what))
        return sorted(found)

    async def tasks(self) -> list[str]:
        """What each task in its event loop runs; only with `is_dns`, because only that balancer writes it."""
        assert self.program is not None
        told = self.folder / "names.tasks"
        told.unlink(missing_ok=True)
        self.program.signal(signal.SIGUSR1)
        await until(told.exists, "the balancer tells its tasks")
        return sorted(json.loads(told.read_text()))


def _address(told: str) -> str:
    """An address as /proc/net/tcp has it, of a machine that stores the lowest byte first."""
    host, port = told.split(":")
    return f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}"


def free_port(hosts: list[str]) -> int:
    """A port that is free on all of these addresses."""
    return free_ports(1, [port for port in REPLICA_PORTS if all(is_free(host, port) for host in hosts)])[0]


@contextlib.asynccontextmanager
async def stage(
    count: int, is_dns: bool, has_defaults: bool = False, kind: type[Stage] = Stage
) -> AsyncIterator[Stage]:
    """A balancer in front of `count` replicas, each at its own address; all are stopped at the end of the block.

    `has_defaults`: the balancer's default settings instead of the short ones. `kind`: another stage than ours.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        hosts = [f"127.0.0.{number + 1}" for number in range(1, count + 1)]
        port = free_port(hosts)
        knobs = {"token_interval": 0.01}
        replicas = [Replica(n, host, port, folder / "journal", knobs) for n, host in enumerate(hosts, 1)]
        short = ({}, {}) if has_defaults else (SETTINGS, READINESS)
        here = kind(folder, replicas, is_dns, *short)
        try:
            await here.start()
            yield here
        finally:
            if here.program is not None:
                here.program.close()
            for replica in replicas:
                await replica.kill()
