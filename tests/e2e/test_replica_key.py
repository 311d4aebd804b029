"""The replicas' own key: asked by the real SGLang, held by the balancer, and shown nowhere."""

import json
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.e2e.running import Replica


def test_a_replica_with_a_key_lets_only_the_balancer_in(eyes: str, tiny_llava: Replica, key_file: Path) -> None:
    assert httpx.get(f"{eyes}/v1/models", timeout=30).status_code == 200
    assert httpx.get(f"{tiny_llava.url}/v1/models", timeout=30).status_code == 401
    for wrong in ("wrong", f"@file:{key_file}"):
        headers = {"Authorization": f"Bearer {wrong}"}
        assert httpx.get(f"{tiny_llava.url}/v1/models", headers=headers, timeout=30).status_code == 401


def test_its_websocket_too_asks_for_the_key(eyes: str, tiny_llava: Replica) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{tiny_llava.port}/v1/realtime", proxy=None)
    assert refused.value.response.status_code == 403
    with connect(eyes.replace("http", "ws") + "/v1/realtime", proxy=None) as client:
        assert json.loads(client.recv(30))["error"]["code"] == "not_supported"


@pytest.mark.usefixtures("eyes")
def test_the_key_is_in_no_log_and_in_no_process_list(tiny_llava: Replica, key_file: Path, logs: Path) -> None:
    key = key_file.read_text().strip()
    assert "api_key" in tiny_llava.log.read_text()  # SGLang does print its arguments
    for log in logs.iterdir():
        assert key not in log.read_text(errors="replace"), log.name
    for pid in [tiny_llava.process.pid, *tiny_llava.offspring()]:
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
