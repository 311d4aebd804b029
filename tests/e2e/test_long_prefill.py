"""A prefill much longer than any probe's patience: a real replica stays READY all the while, whatever the probe is."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Balancer, Replica
from tests.support.until import wait_until

PATIENCE = 0.4  # seconds: time-out of the service's probe, and the time between two


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("/health", 5000),  # makes a token: SGLang lets it wait for the prefill
        ("/server_info", 7000),  # asks the scheduler, which is busy
    ],
)
def test_prefill_longer_than_the_probes_time_out(
    replicas: list[Replica], tmp_path: Path, path: str, first: int
) -> None:
    """A prefill that is longer than the probe's time-out takes no replica out."""
    probe = {"path": path, "timeout_seconds": PATIENCE, "endpoint_probe_interval_seconds": PATIENCE}
    if path == "/health":
        probe["timeout_seconds"] = 5  # it takes a second even when nothing else is to do
        probe["endpoint_probe_interval_seconds"] = 10  # SkyServe's default
    service = tmp_path / "service.yaml"
    described = {"readiness_probe": probe, "replicas": 1}
    service.write_text(json.dumps({"service": described, "resources": {"ports": 8000}, "run": "sglang serve"}))
    balancer = Balancer(tmp_path / "balancer.log", replicas[:1], "--service", str(service))
    try:
        wait_until(lambda: balancer.statuses() == ["READY"], "the replica is READY", 60)
        prompt = "".join(f" {first + n}" for n in range(560))  # some 2,800 tokens, never seen before
        got: list[int] = []

        def ask() -> None:
            body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
            got.append(httpx.post(f"{balancer.url}/generate", json=body, timeout=300).status_code)

        asker = threading.Thread(target=ask)
        began = time.monotonic()
        asker.start()
        seen = set()
        while asker.is_alive():
            seen.update(balancer.statuses())
            time.sleep(0.05)
        took = time.monotonic() - began
        asker.join()
        assert got == [200]
        assert took > 3 * PATIENCE, "the prefill was too short to show anything"
        assert seen == {"READY"}
    finally:
        balancer.close()
