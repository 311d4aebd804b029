"""SkyServe's own autoscaler, in a process and an environment of its own, as its controller and balancer drive it."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from balancer.operate.controller.autoscale import Rule
from tests.bench.install import environment

PROGRAM = Path(__file__).with_name("skyserve_autoscaler.py")
# Its balancer tells its controller of the requests 5 s after it started, then every 20 s (_sync_with_controller in
# sky/serve/load_balancer.py, LB_CONTROLLER_SYNC_INTERVAL_SECONDS in constants.py).
FIRST_SYNC, SYNC = 5, 20


def service(rule: Rule) -> dict[str, Any]:
    """The rule as a service file has it."""
    return {
        "readiness_probe": "/",
        "replica_policy": {
            "min_replicas": rule.least,
            "max_replicas": rule.most,
            "target_qps_per_replica": rule.requests_per_second,
            "upscale_delay_seconds": rule.upscale_delay,
            "downscale_delay_seconds": rule.downscale_delay,
        },
    }


class SkyServe:
    """Looks when the real one would: told of requests when its balancer syncs, and deciding when it wants to."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._arrived: list[float] = []
        self._next_sync, self._next_decision = FIRST_SYNC, 0

    def look(self, second: int, arrived: int, replicas: Sequence[tuple[int, bool]]) -> tuple[int, list[int]]:
        """How many replicas to launch, and which to end; `replicas` are (id, is ready)."""
        self._arrived += [second + number / arrived for number in range(arrived)]
        is_sync, is_decision = second >= self._next_sync, second >= self._next_decision
        if not is_sync and not is_decision:
            return 0, []
        told: dict[str, Any] = {"now": second + 1.0, "arrived": None, "decide": is_decision}
        told["replicas"] = [{"id": id, "is_ready": is_ready} for id, is_ready in replicas]
        if is_sync:
            told["arrived"], self._arrived = self._arrived, []
            self._next_sync = second + SYNC
        answer = self._ask(told)
        if is_decision:
            self._next_decision = second + answer["interval"]
        return answer["launch"], answer["end"]

    def _ask(self, told: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def skyserve(rule: Rule, cache: Path) -> Iterator[SkyServe]:
    """One with this rule; raises Unavailable when it cannot be installed."""
    python = environment("skypilot", cache) / "bin/python"
    with TemporaryDirectory() as home:
        environ = {**os.environ, "HOME": home, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONPATH": ""}
        with subprocess.Popen(
            [str(python), str(PROGRAM)], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(service(rule)) + "\n")
            yield SkyServe(process)
            process.stdin.close()
