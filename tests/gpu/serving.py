"""Replicas, a balancer and a load generator as processes of their own, with logs, for the proof."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from balancer.operate.engines.ports import free_ports
from tests.bench.peers import Place, rust_router_flags


@dataclass
class Process:
    """A started program; `url` is where it serves."""

    name: str
    url: str
    popen: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, how: int = signal.SIGTERM, patience: float = 60.0) -> int:
        """Ends it; returns the exit status. A child of its own session dies with it."""
        if self.popen.poll() is None:
            os.kill(self.popen.pid, how)
        try:
            return self.popen.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            return self.popen.wait(10)


def start(name: str, argv: Sequence[str], url: str, folder: Path, **environ: str) -> Process:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        popen = subprocess.Popen(
            argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environ}
        )
    return Process(name, url, popen, log)


def replica(name: str, model: str, folder: Path, flags: Sequence[str] = (), **environ: str) -> Process:
    """`python -m replica` with a lease of its own."""
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", "replica", "--model", model, "--port", str(port), "--", *flags]
    environ = {"LEASE_DIR": str(folder / f"leases-{name}")} | environ
    return start(name, argv, f"http://127.0.0.1:{port}", folder, **environ)


def wait_ready(process: Process, limit: float) -> float:
    """Seconds until it answers /health with 200. Raises RuntimeError with its log."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        if process.popen.poll() is not None:
            raise RuntimeError(f"{process.name} ended with {process.popen.returncode}:\n{process.tail()}")
        try:
            if httpx.get(process.url + "/health", timeout=20, trust_env=False).status_code == 200:
                return time.monotonic() - began
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{process.name} was not ready within {limit:g} s:\n{process.tail()}")


def balancer(folder: Path, policy: str, replicas: Sequence[Process], workers: int = 1) -> Process:
    """`python -m balancer` in front of them; ready when all of them are."""
    flags = [part for one in replicas for part in ("--replica", one.url)]
    flags += ["--policy", policy, "--workers", str(workers)]
    return _balancer(folder, f"balancer-{policy}-{workers}", flags, len(replicas))


def services(folder: Path, models: Mapping[str, Process]) -> Process:
    """`python -m balancer` in front of a service for each model; ready when one of them is, as the others may doze."""
    flags = [part for name, one in models.items() for part in ("--replica", f"{name}={one.url}")]
    return _balancer(folder, "balancer-services", flags, 1)


def _balancer(folder: Path, name: str, flags: Sequence[str], ready: int) -> Process:
    port, admin = free_ports(2)
    argv = [sys.executable, "-m", "balancer", "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}", *flags]
    process = start(name, argv, f"http://127.0.0.1:{port}", folder)
    began, last = time.monotonic(), ""
    while time.monotonic() - began < 60:
        try:
            answer = httpx.get(f"http://127.0.0.1:{admin}/status", trust_env=False)
            last = answer.text
            if answer.json()["service"]["ready"] >= ready:
                return process
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    process.stop()
    raise RuntimeError(f"the balancer did not find its replicas ready: {last[:2000]}\n{process.tail()}")


def router(folder: Path, replicas: Sequence[Process], environ: Mapping[str, str]) -> Process:
    """smg, routing by prefix as published, in front of the replicas. `environ`: how many threads it may use."""
    place = Place(*free_ports(2), tuple(one.url for one in replicas), folder, folder)
    argv = [sys.executable, "-m", "smg.cli", "launch", *rust_router_flags(place, "cache_aware")]
    process = start("smg", argv, f"http://127.0.0.1:{place.port}", folder, **environ)
    began = time.monotonic()
    while time.monotonic() - began < 60 and process.popen.poll() is None:
        try:
            workers = httpx.get(process.url + "/workers", timeout=5, trust_env=False).json()["workers"]
            if sum(worker["is_healthy"] for worker in workers) == len(replicas):
                return process
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    process.stop()
    raise RuntimeError(f"smg did not find its replicas healthy:\n{process.tail()}")


def flush(one: Process) -> None:
    """Empties its prefix cache. Raises RuntimeError when it will not, as while requests run."""
    began = time.monotonic()
    while True:
        answer = httpx.post(one.url + "/flush_cache", timeout=30, trust_env=False)
        if answer.status_code == 200:
            return
        if time.monotonic() - began > 20:
            raise RuntimeError(f"{one.name} does not flush its cache: {answer.status_code} {answer.text[:200]}")
        time.sleep(0.2)


def cpu_seconds(process: Process) -> float:
    """User and system time that the process has used."""
    fields = Path(f"/proc/{process.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(folder: Path, *, within: float = 240.0, **job: Any) -> dict[str, Any]:
    """Runs the load generator to its end, which must come `within` so many seconds, and returns its figures."""
    return finish(begin_load(folder, **job), within)


def begin_load(folder: Path, **job: Any) -> subprocess.Popen[bytes]:
    path = folder / f"job-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(job))
    return subprocess.Popen([sys.executable, "-m", "tests.gpu.load", str(path)], stdout=subprocess.PIPE)


def finish(running: subprocess.Popen[bytes], limit: float = 240.0) -> dict[str, Any]:
    try:
        out, _ = running.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    figures: dict[str, Any] = json.loads(out)
    return figures
