"""Starting what is measured, and what measures, as processes of their own; stopping all of it again."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import messages
from tests.bench.exchange import address
from tests.bench.install import Unavailable
from tests.bench.peers import ROOT, Launch
from tests.bench.replica import COUNTS

SMALL_REQUEST, SMALL_ANSWER = messages.small_request(), messages.small_answer()
START_LIMIT = 60.0  # seconds to the first right answer; SkyServe's first look for replicas comes after five


@dataclass(frozen=True)
class Running:
    """A program that answers at `url`; pid None: the replica itself, with nothing in between."""

    url: str
    pid: int | None = None


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
    return json.loads(fetch(replica + COUNTS)[1])


def load(mode: str, target: Running, count: int, seconds: float, warmup: float, seed: int = 0, *more: str) -> dict:
    """What one run of the load generator measured, with what went wrong under "errors"; `more` are its other flags."""
    command = [sys.executable, "-m", "tests.bench.load", mode, target.url, "--count", str(count)]
    command += ["--seconds", str(seconds), "--warmup", str(warmup), "--seed", str(seed), *more]
    if target.pid is not None:
        command += ["--pid", str(target.pid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 180, check=False)
    if done.returncode:
        return {"errors": {f"the load generator gave up: {done.stderr.strip().splitlines()[-1]}": 1}}
    return json.loads(done.stdout)


@contextlib.contextmanager
def started(name: str, launch: Launch, log: Path) -> Iterator[subprocess.Popen]:
    """The program with its output in `log`; all of its processes are stopped at the end."""
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                launch.command,
                cwd=ROOT,
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"{name} does not start: {error}") from error
    try:
        yield process
    finally:
        _stop(process)


@contextlib.contextmanager
def running(
    name: str,
    launch: Launch,
    port: int,
    log: Path,
    body: bytes = SMALL_REQUEST,
    expected: bytes | None = SMALL_ANSWER,
    key: str = "",
) -> Iterator[Running]:
    """A balancer once it answers `body` as `expected` (None: with anything) and, if it tells, has both replicas ready.

    Raises Unavailable, with the end of its log, when it does not come to that.
    """
    url = f"http://127.0.0.1:{port}"

    def trouble() -> str | None:
        if launch.census is not None:
            status, census = fetch(launch.census.url)
            if status != 200 or launch.census.ready(json.loads(census)) < 2:
                return f"it has not found both replicas ready yet: {census[:300]!r}"
        status, answer = fetch(url + messages.CHAT_PATH, body, key)
        return None if status == 200 and expected in (None, answer) else f"{status} {answer[:120]!r}"

    with started(name, launch, log) as process:
        wait(name, process, log, trouble, START_LIMIT)
        yield Running(url, process.pid)


def wait(name: str, process: subprocess.Popen, log: Path, trouble: Callable[[], str | None], limit: float) -> None:
    """Until there is no trouble any more. Raises Unavailable after `limit` seconds, or when the process ends."""
    deadline = time.monotonic() + limit
    last: str | None = "no answer yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Unavailable(f"{name} ended with {process.returncode}: {said[-1]}; all of it is in {log}")
        try:
            last = trouble()
        except (OSError, http.client.HTTPException) as error:
            last = repr(error)
        if last is None:
            return
        time.sleep(0.1)
    raise Unavailable(f"{name} was not ready in {limit:.0f} s, last: {last}; its log is {log}")


def fetch(url: str, body: bytes | None = None, key: str = "") -> tuple[int, bytes]:
    """Status and body of a GET, or with a body of a POST of JSON."""
    fields = {"Content-Type": "application/json"} if body else {}
    if key:
        fields["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(*address(url), timeout=30)
    with contextlib.closing(connection):
        path = "/" + url.split("/", 3)[3]
        connection.request("POST" if body else "GET", path, body, fields)
        answer = connection.getresponse()
        return answer.status, answer.read()


def stop_on_sigterm() -> None:
    """Lets a SIGTERM unwind like an exit, so that all that was started is stopped."""

    def stop(number: int, _: object) -> None:
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _stop(process: subprocess.Popen) -> None:
    # Our balancer drains for some seconds after the first signal and ends at the second.
    for request, seconds in ((signal.SIGTERM, 0.2), (signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlive it
