"""SGLang's demo for SkyServe, as docs/coming-from-skyserve.md has it, typed into a real bash; then updates of it.

The two service files are the project's own but for their models, which a CPU serves; GPUs are pretended, so that each
replica leases one.
"""

import functools
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from replica import models
from replica.options import models_dir
from tests.e2e.images import PLAIN, WORDS
from tests.e2e.shell import DOCS, Shell, commands
from tests.operate.command_line import Groundserve
from tests.operate.streaming import Streams, streaming
from tests.support.program import ROOT

# As SkyServe 0.14.1 heads its tables (format_service_table in sky/serve/serve_utils.py).
SERVICES = ["NAME", "VERSION", "UPTIME", "STATUS", "REPLICAS", "ENDPOINT"]
REPLICAS = ["SERVICE_NAME", "ID", "VERSION", "ENDPOINT", "LAUNCHED", "INFRA", "RESOURCES", "STATUS"]
# As the demo shows them, from a time when a replica's address was its IP and where it was its region.
RENAMED = {"IP": "ENDPOINT", "REGION": "INFRA"}
DEMO_REPLICAS = ["SERVICE_NAME", "ID", "VERSION", "IP", "LAUNCHED", "RESOURCES", "STATUS", "REGION"]

LLAVA, LLAMA2 = commands("coming-from-skyserve.md")
IMAGE = "https://raw.githubusercontent.com/sgl-project/sglang/main/examples/quick_start/images"
TOKEN = "hf_ofNobodyAtAll0123456789"


@pytest.fixture(scope="module")
def image_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a web server that has cat.jpeg, a red one, and the paths that it was asked for."""
    folder, asked = tmp_path_factory.mktemp("images"), []
    Image.new("RGB", (640, 480), PLAIN["red"]).save(folder / "cat.jpeg", "JPEG")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A bash in a folder where services/ has the two files with their models replaced."""
    folder = tmp_path_factory.mktemp("demo")
    with_models_of_a_cpu(folder)
    groundserve = Groundserve(folder)
    typing = Shell(
        folder,
        {
            **groundserve.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "REPLICA_PRETEND_GPUS": "3",
            "LEASE_DIR": str(folder / "leases"),
            # The demo's requests set no limit, and a small model may ramble.
            "SGLANG_ARGS": "--context-length 256",
            # The demo's image is on the Internet; here it is on this machine.
            "ALLOW_PRIVATE_MEDIA": "1",
        },
    )
    yield typing
    typing.close()
    groundserve.stop_all()


def with_models_of_a_cpu(folder: Path) -> None:
    """LLaVA's file gets a model's folder, Llama-2's the name of a model that comes with the project."""
    for name in ("tiny-llava", "smollm2-135m"):
        models.ensure(name, models_dir(os.environ))
    # SGLang samples as the model's folder says, where a request does not: this one does not leave it to chance.
    seeing = folder / "tiny-llava"
    shutil.copytree(models_dir(os.environ) / "tiny-llava", seeing)
    generation = json.loads((seeing / "generation_config.json").read_text())
    (seeing / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.01, "top_k": 1}))
    replaced = {
        "llava.yaml": {
            "liuhaotian/llava-v1.6-vicuna-7b": str(seeing),
            "llava-hf/llava-1.5-7b-hf": str(seeing),
            "vicuna_v1.1": str(seeing / "chat_template.jinja"),
        },
        "llama2.yaml": {"meta-llama/Llama-2-7b-chat-hf": "smollm2-135m"},
    }
    services = folder / "services"
    services.mkdir(parents=True)
    for name, models_names in replaced.items():
        text = (ROOT / "services" / name).read_text()
        for real, small in models_names.items():
            assert text.count(real) == 1
            text = text.replace(real, small)
        (services / name).write_text(text)


def typed(shell: Shell, block: list[str], replaced: dict[str, str]) -> list[str]:
    """What each command of a block printed, the last left out: it takes the service down."""
    printed = []
    for command in block[:-1]:
        for real, ours in replaced.items():
            command = command.replace(real, ours)
        printed.append(shell(command))
    return printed


@pytest.fixture(scope="module")
def llama2(shell: Shell) -> Iterator[list[str]]:
    """The Llama-2 service, up, and what the commands printed until then."""
    yield typed(shell, LLAMA2, {"<your-huggingface-token>": TOKEN})
    shell(LLAMA2[-1])


def rows(table: str) -> list[list[str]]:
    """Columns are two blanks apart, as a cell may hold single ones."""
    return [re.split(r"  +", line) for line in table.splitlines()]


def check_status(printed: str, name: str) -> None:
    """Two replicas are ready, and the tables have SkyServe's columns."""
    services, replicas = printed.strip().split("\n\n")
    title, head, service = rows(services)
    assert (title, head) == (["Services"], SERVICES)
    assert [service[at] for at in (0, 1, 3, 4)] == [name, "1", "READY", "2/2"]
    title, head, *each = rows(replicas)
    assert (title, head) == (["Service Replicas"], REPLICAS)
    assert [[row[at] for at in (0, 1, 2, 5, 6, 7)] for row in each] == [
        [name, id, "1", "local", "1x pretended GPU", "READY"] for id in ("1", "2")
    ]
    assert {RENAMED.get(column, column) for column in DEMO_REPLICAS} == set(head)


def check_answer(printed: str, model: str) -> str:
    """What the assistant says, in an answer of the shape that the demo shows."""
    answer: dict[str, Any] = json.loads(printed)
    assert (answer["object"], answer["model"]) == ("chat.completion", model)
    assert {"id", "created", "usage"} < set(answer)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    (choice,) = answer["choices"]
    assert (choice["index"], choice["message"]["role"]) == (0, "assistant")
    said: str = choice["message"]["content"]
    assert said.strip()
    return said


def test_the_page_has_the_demos_commands() -> None:
    for name, block in (("sglang-llava", LLAVA), ("sglang-llama2", LLAMA2)):
        assert [" ".join(command.split()[:2]) for command in block] == [
            "groundserve up",
            "groundserve status",
            "ENDPOINT=$(groundserve status",
            "curl -L",
            "groundserve down",
        ]
        assert all(name in block[at] for at in (0, 1, 2, 4))
    heads = [
        line.split()
        for line in (DOCS / "quickstart.md").read_text().splitlines()
        if re.match("(NAME|SERVICE_NAME) ", line)
    ]
    assert heads == [SERVICES, REPLICAS]


def test_llava_is_served_as_the_page_says(shell: Shell, image_host: tuple[str, list[str]]) -> None:
    url, asked = image_host
    up, status, _, answer = typed(shell, LLAVA, {IMAGE: url})
    assert "sglang-llava is up after" in up
    check_status(status, "sglang-llava")
    said = check_answer(answer, "liuhaotian/llava-v1.6-vicuna-7b")
    assert asked == ["/cat.jpeg"]
    named = WORDS.search(said.lower())
    assert named is not None, said
    assert named[0] == "red", said
    assert shell(LLAVA[-1]) == "sglang-llava is down\n"


def test_llama_2_is_served_as_the_page_says(llama2: list[str]) -> None:
    up, status, _, answer = llama2
    assert "sglang-llama2 is up after" in up
    check_status(status, "sglang-llama2")
    check_answer(answer, "meta-llama/Llama-2-7b-chat-hf")


def test_the_token_is_shown_nowhere(shell: Shell, llama2: list[str]) -> None:
    assert llama2
    shell("groundserve status -v; groundserve status --json; groundserve logs sglang-llama2")
    assert "SGLang" in shell.printed or "sglang" in shell.printed
    assert TOKEN not in shell.printed + shell.errors.read_text()
    files = [file for file in (shell.folder / "state").rglob("*") if file.is_file()]
    assert {"replica-1.log", "controller.log"} <= {file.name for file in files}
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []


def test_a_replica_lets_only_its_balancer_in(shell: Shell, llama2: list[str]) -> None:
    assert llama2
    replicas = Groundserve(shell.folder).status("sglang-llama2")["replicas"]
    asked = [httpx.get(f"{row['endpoint']}/v1/models", timeout=60, trust_env=False) for row in replicas]
    assert [answer.status_code for answer in asked] == [401, 401]
    key = (shell.folder / "state/groundserve/sglang-llama2/replica.key").read_text()
    shell("groundserve logs sglang-llama2; groundserve status -v; ps -ef")
    assert key not in shell.printed + shell.errors.read_text()


def updated(shell: Shell, flag: str, code: int = 0) -> str:
    """What an update says that gives SGLang a flag more, and one replica."""
    text = (shell.folder / "services/llama2.yaml").read_text()
    changed = text.replace("replicas: 2", "replicas: 1").replace("--port 8000", f"--port 8000 {flag}")
    (shell.folder / "new.yaml").write_text(changed)
    return shell(f"groundserve update sglang-llama2 new.yaml --env HF_TOKEN={TOKEN} 2>&1", code)


def streams(shell: Shell) -> AbstractContextManager[Streams]:
    question = {"role": "user", "content": "Count to ten."}
    body = {"model": "smollm2-135m", "messages": [question], "stream": True, "max_tokens": 16, "temperature": 0}
    return streaming(shell("echo $ENDPOINT").strip(), clients=3, body=body)


def test_update_of_real_replicas(shell: Shell, llama2: list[str]) -> None:
    """An update of real replicas under streams loses nothing and shows both versions."""
    assert llama2
    groundserve = Groundserve(shell.folder)
    shell("groundserve scale sglang-llama2 1")
    groundserve.until("sglang-llama2", lambda status: status["service"]["total"] == 1)
    with streams(shell) as seen, ThreadPoolExecutor(1) as beside:
        update = beside.submit(updated, shell, "--schedule-policy fcfs")
        both = groundserve.until("sglang-llama2", lambda status: status["service"]["version"] == "1,2")
        assert (both["service"]["status"], both["service"]["ready"]) == ("READY", 1)
        assert update.result().endswith("sglang-llama2 is at version 2\n")
        groundserve.until("sglang-llama2", lambda status: status["service"]["total"] == 1)
    assert seen.failed == []
    # A version may be asked for again by a later test, and its number grows with each.
    assert len(set(seen.replicas)) == 2


def test_version_that_sglang_refuses(shell: Shell, llama2: list[str]) -> None:
    """A version that SGLang refuses is rolled back, with the reason."""
    assert llama2
    groundserve = Groundserve(shell.folder)
    before = groundserve.status("sglang-llama2")["replicas"]
    with streams(shell) as seen:
        said = updated(shell, "--no-such-flag", code=1)
    assert "--no-such-flag" in said
    assert "sglang-llama2 stays at version" in said
    assert seen.failed == []
    after = groundserve.status("sglang-llama2")["replicas"]
    assert [row["endpoint"] for row in after] == [row["endpoint"] for row in before]
