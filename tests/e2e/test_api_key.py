"""`run:` with `--api-key $KEY`: the real SGLang asks its callers for the key, and nobody else is shown it."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from replica import models
from replica.options import models_dir
from tests.e2e.running import START
from tests.operate.command_line import Groundserve

KEY = "hush-hush-4711"
CHAT = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Say yes."}],
    "max_tokens": 4,
    "temperature": 0,
}


@pytest.fixture
def groundserve(tmp_path: Path) -> Iterator[Groundserve]:
    command = Groundserve(tmp_path)
    yield command
    command.stop_all()


def test_a_key_in_run_is_asked_for_and_shown_nowhere(groundserve: Groundserve, tmp_path: Path) -> None:
    models.ensure("smollm2-135m", models_dir(os.environ))
    run = "python -m sglang.launch_server --model-path smollm2-135m --api-key $KEY --context-length 256"
    up = groundserve.up(groundserve.service("own", run, replicas=1, more="secrets: {KEY: }"), "--secret", f"KEY={KEY}")
    up.until_up(START)
    endpoint = groundserve.status("own")["service"]["endpoint"]
    with httpx.Client(base_url=endpoint, timeout=120, trust_env=False) as client:

        def status(**headers: str) -> int:
            return client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code

        assert status(Authorization=f"Bearer {KEY}") == 200
        assert status() == 401
        assert status(Authorization="Bearer @env:GROUNDSERVE_SECRET_1") == 401
    # The one who typed it showed it himself.
    others = {pid: line for pid, line in groundserve.processes().items() if "balancer.cli up" not in line}
    assert any("@env:GROUNDSERVE_SECRET_1" in line for line in others.values())
    assert [line for line in others.values() if KEY in line] == []
    files = [file for file in (tmp_path / "state").rglob("*") if file.is_file()]
    log = next(file for file in files if file.name == "replica-1.log")
    assert "api_key" in log.read_text(), "SGLang prints its arguments"
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    assert KEY not in up.text
