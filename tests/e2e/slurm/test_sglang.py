"""Two real SGLang replicas as jobs: the model, the key, the drain and the log are the real ones."""

import json

import httpx
import pytest

from tests.e2e.slurm.served import ENDPOINT, Served
from tests.lab.hosts import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

QUESTION = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Name the capital of France."}],
    "max_tokens": 8,
    "temperature": 0,
}


def test_two_real_replicas_answer_from_two_nodes(served: Served) -> None:
    """Each asks for the service's key, which any other user of the cluster lacks."""
    run = "python -m sglang.launch_server --model-path smollm2-135m"
    served.up(served.file(run=run, replicas=2, slurm={"gres": "gpu:2"}), within=400, MODELS_DIR=str(ROOT / ".models"))
    rows = served.until_ready(2, within=300)["replicas"]
    assert sorted(row["node"] for row in rows) == ["h1", "h2"]
    answer = httpx.post(f"{ENDPOINT}/v1/chat/completions", json=QUESTION, timeout=120)
    assert "Paris" in json.dumps(answer.json())
    for row in rows:
        url = f"{row['endpoint']}/v1/chat/completions"
        assert httpx.post(url, json=QUESTION, timeout=120).status_code == 401
    assert "smollm2" in served("logs", served.name, "1")
