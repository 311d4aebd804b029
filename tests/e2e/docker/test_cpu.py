"""Real SGLang in containers on a plain CPU: it comes up by itself, answers, and is scaled without a loss."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.docker.conftest import CPU_FILES
from tests.e2e.docker.project import TAG, Project, docker
from tests.e2e.docker.traffic import Traffic, traffic
from tests.support.until import wait_until

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def service(cpu_images: Project) -> Iterator[Project]:
    """Two replicas of smollm2-135m behind the balancer, as `docker compose up --wait` leaves them."""
    assert cpu_images.files == CPU_FILES
    project = Project("groundserve-test-cpu", CPU_FILES, {"REPLICAS": "2"})
    project.up()
    yield project
    project.down()


def test_up_wait_returns_when_it_can_answer(service: Project) -> None:
    question = {"role": "user", "content": "Name the capital of France."}
    body = {"model": "smollm2-135m", "messages": [question], "max_tokens": 16, "temperature": 0}
    answer = httpx.post(service.url() + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    told = httpx.get(service.url() + "/server_info", timeout=10).json()
    assert told["device"] == "cpu"
    assert told["version"] == "0.5.23", "SGLang itself"


def test_scaling_under_sparse_traffic(service: Project) -> None:
    """Scaling real replicas under sparse traffic loses nothing."""

    async def scale() -> Traffic:
        async with traffic(service.url(), 1, tokens=8, pause=1.0, is_exact=False) as seen:
            await seen.more(2)
            for count in (1, 2):
                await asyncio.to_thread(service.scale, count)
                await asyncio.to_thread(
                    wait_until, lambda n=count: len(service.ready()) == n, f"{count} ready replicas"
                )
                await seen.more(4)
        return seen

    seen = asyncio.run(scale())
    assert seen.lost == []
    assert len(seen.ended) > 20
    assert len({one.member for one in seen.outcomes}) >= 2


def test_the_embedded_models_need_no_network(cpu_images: Project) -> None:
    assert cpu_images.files == CPU_FILES
    read = (
        "import json, pathlib, sys\n"
        "folder = pathlib.Path('/opt/models', sys.argv[1])\n"
        "files = [one.name for one in folder.iterdir() if one.is_file() and one.read_bytes()]\n"
        "print(json.dumps(sorted(files)))\n"
    )
    for model in ("smollm2-135m", "tiny-llava"):
        run = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--entrypoint", "python3")
        files = json.loads(docker(*run, f"groundserve/replica-cpu:{TAG}", "-c", read, model))
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files), "all of it, readable by its user"
