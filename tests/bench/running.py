"""Starting what is measured, and what measures, as processes of their own; stopping all of it again."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import messages
from tests.bench.exchange import address
from tests.bench.install import Unavailable
from tests.bench.peers import ROOT, Launch
from tests.bench.replica import COUNTS

START_LIMIT = 60.0  # seconds to the first right answer; SkyServe's first look for replicas comes after five


@dataclass(frozen=True)
class Running:
    """A program that answers at `url`; pid None: the replica itself, with nothing in between."""

    url: str
    pid: int | None = None


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now; for programs that cannot be told 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def replicas() -> Iterator[tuple[str, str]]:
    """The URLs of two replicas, served by a process of their own."""
    command = [sys.executable, "-m", "tests.bench.replica"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            first, second = json.loads(process.stdout.readline())["replicas"]
            yield first, second
        finally:
            process.stdin.close()


def counts(replica: str) -> list[int]:
    """How many chat requests each of the replicas has seen."""
    connection = http.client.HTTPConnection(*address(replica), timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", COUNTS)
        return json.loads(connection.getresponse().read())


def load(mode: str, target: Running, count: int, seconds: float, warmup: float, seed: int = 0) -> dict:
    """What one run of the load generator measured, with what went wrong under "errors"."""
    command = [sys.executable, "-m", "tests.bench.load", mode, target.url, "--count", str(count)]
    command += ["--seconds", str(seconds), "--warmup", str(warmup), "--seed", str(seed)]
    if target.pid is not None:
        command += ["--pid", str(target.pid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 180, check=False)
    if done.returncode:
        return {"errors": {f"the load generator gave up: {done.stderr.strip().splitlines()[-1]}": 1}}
    return json.loads(done.stdout)


@contextlib.contextmanager
def running(name: str, launch: Launch, port: int, log: Path) -> Iterator[Running]:
    """The program once it answers as it should; Unavailable, with the end of its log, when it does not."""
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                launch.command,
                cwd=ROOT,
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that its children are stopped with it
            )
        except OSError as error:
            raise Unavailable(f"{name} does not start: {error}") from error
    try:
        _wait_until_right(name, process, port, log)
        yield Running(f"http://127.0.0.1:{port}", process.pid)
    finally:
        _stop(process)


def _wait_until_right(name: str, process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    last = "no answer yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Unavailable(f"{name} ended with {process.returncode}: {said[-1]}; all of it is in {log}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", messages.CHAT_PATH, messages.small_request(), headers)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                last = repr(error)
            else:
                if answer.status == 200 and body == messages.small_answer():
                    return
                last = f"{answer.status} {body[:120]!r}"
        time.sleep(0.1)
    raise Unavailable(f"{name} did not answer rightly in {START_LIMIT:.0f} s, last: {last}; its log is {log}")


def _stop(process: subprocess.Popen) -> None:
    # Our balancer drains for some seconds after the first signal and ends at the second.
    for request, seconds in ((signal.SIGTERM, 0.2), (signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return
