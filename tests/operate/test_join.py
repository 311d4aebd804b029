"""Several services behind one endpoint, each with a controller of its own; real processes."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.compose.engine import ComposeEngine
from balancer.operate.recipe.recipe import recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.service_file import load
from tests.operate.command_line import LAB, Groundserve
from tests.support.until import wait_until

EYES = f"{LAB} --served-model org/eyes"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def endpoint_of(groundserve: Groundserve, name: str) -> str:
    return groundserve("status", "--endpoint", name).strip()


def who_answers(endpoint: str, model: str) -> str:
    """The replica that answered, or the status of a refusal."""
    answer = httpx.post(f"{endpoint}/v1/chat/completions", json=BODY | {"model": model}, timeout=20)
    return answer.headers["x-replica-id"] if answer.is_success else str(answer.status_code)


def test_a_service_joins_the_endpoint_of_another_and_leaves_it(groundserve: Groundserve) -> None:
    lab = groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    eyes = groundserve.up(groundserve.service("eyes", EYES, replicas=1), "--join", "lab", ports=()).until_up()
    endpoint = endpoint_of(groundserve, "lab")
    assert endpoint_of(groundserve, "eyes") == endpoint
    assert '"model": "org/eyes"' in eyes.text
    assert [who_answers(endpoint, model) for model in ("lab", "org/eyes", "eyes")] == ["lab-1", "eyes-1", "eyes-1"]
    assert who_answers(endpoint, "ears") == "404"
    groundserve("update", "eyes", groundserve.service("eyes", f"{EYES} --tokens 5", replicas=1))
    assert who_answers(endpoint, "eyes") == "eyes-2"
    assert groundserve("status").count(endpoint) == 2
    assert "eyes is down" in groundserve("down", "eyes")
    assert eyes.wait() == 0
    assert who_answers(endpoint, "org/eyes") == "lab-1"  # it is alone again, and takes any name
    assert lab.end(signal.SIGTERM) == 0
    groundserve.until_nothing_runs()


def test_it_finds_the_endpoint_again(groundserve: Groundserve) -> None:
    """After the balancer died and was restarted, and after its service went down and came up elsewhere."""
    lab = groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    eyes = groundserve.up(groundserve.service("eyes", EYES, replicas=1), "--join", "lab", ports=()).until_up()
    (balancer,) = (
        pid for pid, line in groundserve.processes().items() if " -m balancer " in f"{line} " and "leash" not in line
    )
    os.kill(balancer, signal.SIGKILL)
    endpoint = endpoint_of(groundserve, "lab")

    def answers() -> str:
        try:
            return who_answers(endpoint, "org/eyes")
        except httpx.TransportError:
            return ""

    wait_until(answers, fits=lambda who: who == "eyes-1")
    assert lab.end(signal.SIGTERM) == 0
    eyes.until("lab is not up: eyes has no endpoint until it is")
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    endpoint = endpoint_of(groundserve, "lab")
    wait_until(answers, fits=lambda who: who == "eyes-1")
    assert endpoint_of(groundserve, "eyes") == endpoint


def test_several_files_are_one_command(groundserve: Groundserve) -> None:
    """In the foreground they end together; in the background each by its name."""
    files = [groundserve.service("lab", replicas=1), groundserve.service("eyes", EYES, replicas=1)]
    both = groundserve.up(*files)
    both.until("lab, eyes share one endpoint; Ctrl-C takes them down")
    endpoint = endpoint_of(groundserve, "lab")
    assert [who_answers(endpoint, model) for model in ("lab", "org/eyes")] == ["lab-1", "eyes-1"]
    assert both.end(signal.SIGINT) == 0
    assert "eyes is down" in both.text
    assert "lab is down" in both.text
    groundserve.until_nothing_runs()


def test_what_cannot_be_joined_is_told(groundserve: Groundserve, tmp_path: Path) -> None:
    file = groundserve.service("eyes", EYES)
    assert "no service nobody is up here: bring it up first" in groundserve("up", file, "--join", "nobody", code=1)
    engine = ComposeEngine(ServiceFolder(tmp_path, "eyes"))
    with pytest.raises(ConfigError, match=r"docker/compose\.two-models\.yaml"):
        engine.prepare(recipe(load(file)), AddressFlags(join="lab"))


def test_two_services_of_one_name_are_refused(groundserve: Groundserve) -> None:
    file = groundserve.service("lab")
    assert "two services are called lab" in groundserve("up", file, file, code=1)
