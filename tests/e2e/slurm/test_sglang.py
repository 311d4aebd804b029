"""Real SGLang replicas as jobs: the model, the key, the drain and the log are the real ones."""

import json

import httpx
import pytest

from tests.e2e.slurm.served import ENDPOINT, Served
from tests.lab.hosts import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

NODES = 3
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


def test_one_real_replica_on_three_nodes(served: Served) -> None:
    """Its three parts share the model by tensor parallelism, over the network."""
    run = "python -m sglang.launch_server --model-path smollm2-135m"
    cpus = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0", "TORCHDYNAMO_DISABLE": "1"}  # the lab's hosts have no compiler
    environ = {"MODELS_DIR": str(ROOT / ".models"), **cpus}
    served.up(served.file(run=run, replicas=1, nodes=3), within=500, **environ)
    (row,) = served.until_ready(1, within=500)["replicas"]
    assert row["node"] == "h[1-3]"
    answer = httpx.post(f"{ENDPOINT}/v1/chat/completions", json=QUESTION, timeout=120)
    assert "Paris" in json.dumps(answer.json())
    for host in served.slurm.nodes.values():
        assert "--nnodes 3" in host.run("ps", "axww")
