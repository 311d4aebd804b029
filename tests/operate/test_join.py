"""Several services behind one endpoint, each with a controller of its own; real processes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from balancer.errors import ConfigError
from balancer.operate.commands import change
from balancer.operate.commands.begin import Source, beginning
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.compose.engine import ComposeEngine
from balancer.operate.recipe.recipe import recipe
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder, state_root
from balancer.spec.service_file import load
from tests.operate.command_line import ANY_PORT, LAB, Groundserve
from tests.operate.meant import desired
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
    assert "(none)" in groundserve("keys", "list"), "they have one endpoint, so nobody has to say of which service"
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
    assert "eyes shares the endpoint of lab, and has none until lab is up again" in groundserve("down", "lab")
    assert lab.wait() == 0
    eyes.until("lab is not up: eyes has no endpoint until it is")
    alone = groundserve.until("eyes", lambda status: status["service"]["status"] == "NO_BALANCER")
    assert "lab is not up: eyes has no endpoint until it is" in alone["service"]["reason"]
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    endpoint = endpoint_of(groundserve, "lab")
    wait_until(answers, fits=lambda who: who == "eyes-1")
    assert endpoint_of(groundserve, "eyes") == endpoint


def test_turns_on_a_gpu_outlive_a_controller(groundserve: Groundserve, tmp_path: Path) -> None:
    """Killed with its replica's turn, be it the one with the balancer or not, it leaves the GPU and nobody stuck."""
    (tmp_path / "seat").mkdir()
    shares = f"--seat {tmp_path / 'seat'} --seat-start 0.1"
    lab = groundserve.up(groundserve.service("lab", f"{LAB} {shares}", replicas=1)).until_up()
    file = groundserve.service("eyes", f"{EYES} {shares}", replicas=1)
    eyes = groundserve.up(file, "--join", "lab", ports=()).until_up()
    endpoint = endpoint_of(groundserve, "lab")
    assert [who_answers(endpoint, model) for model in ("lab", "eyes")] == ["lab-1", "eyes-1"]
    eyes.signal(signal.SIGKILL)
    killed = time.monotonic()
    assert who_answers(endpoint, "lab") == "lab-1"
    assert time.monotonic() - killed < 5
    groundserve("up", "-d", "eyes")
    assert [who_answers(endpoint, model) for model in ("eyes", "lab")] == ["eyes-1", "lab-1"]
    lab.signal(signal.SIGKILL)
    groundserve("up", "-d", "lab")
    assert endpoint_of(groundserve, "lab") == endpoint
    assert wait_until(lambda: who_answers(endpoint, "eyes"), fits=lambda who: who != "404") == "eyes-1"
    assert who_answers(endpoint, "lab") == "lab-1"
    groundserve.until("eyes", lambda status: status["replicas"][0]["status"] == "DOZING")
    groundserve("down", "--all")
    groundserve.until_nothing_runs()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_several_stay_meant_to_exist(groundserve: Groundserve, number: signal.Signals) -> None:
    """As one that ends with its terminal or its machine does; the one with the endpoint ends last."""
    both = groundserve.up(groundserve.service("ann", replicas=1), groundserve.service("eyes", EYES, replicas=1))
    both.until("ann, eyes share one endpoint")
    assert both.end(number) == 0
    assert both.text.index("eyes is down: groundserve up eyes resumes it") < both.text.index("ann is down")
    assert groundserve.processes() == {}
    said = groundserve("status", code=4)
    assert all(f"{name} is meant to run and does not" in said for name in ("ann", "eyes"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_several_that_are_asked_to_end_while_they_start(groundserve: Groundserve, number: signal.Signals) -> None:
    files = [groundserve.service("ann", replicas=1), groundserve.service("eyes", f"{EYES} --start-delay 600")]
    both = groundserve.up(*files)
    both.until("eyes-2  STARTING")
    assert both.end(number) == 0
    assert groundserve.processes() == {}
    said = groundserve("status", code=0 if number is signal.SIGINT else 4)
    assert ("ann is meant to run and does not" in said) is (number is not signal.SIGINT)
    assert "eyes is meant" not in said, "it did not come up the first time"


def test_several_asked_twice_end_at_once(groundserve: Groundserve) -> None:
    """The first Ctrl-C waits for answers in flight, the second for nothing; neither leaves one without an endpoint."""
    files = [
        groundserve.service("ann", replicas=1),
        groundserve.service("eyes", f"{EYES} --first-token-delay 600", replicas=1),
    ]
    both = groundserve.up(*files)
    both.until("ann, eyes share one endpoint")
    with httpx.stream(
        "POST",
        f"{endpoint_of(groundserve, 'ann')}/v1/chat/completions",
        json={**BODY, "model": "eyes", "stream": True},
        timeout=60,
    ) as answer:
        assert answer.is_success
        both.signal(signal.SIGINT)
        groundserve.until("eyes", lambda status: status["service"]["status"] == "SHUTTING_DOWN")
        assert both.check_alive()
        both.signal(signal.SIGINT)
        assert both.wait(within=20) == 0
    assert groundserve.processes() == {}
    assert groundserve("status") == "No existing services.\n"


def test_several_are_left_alone_where_one_hangs(groundserve: Groundserve) -> None:
    """Asked again and again, the command says who does not end, and ends itself."""
    both = groundserve.up(groundserve.service("ann", replicas=1), groundserve.service("eyes", EYES, replicas=1))
    both.until("ann, eyes share one endpoint")
    hangs = json.loads((groundserve.folder / "state/groundserve/eyes/lock").read_text())["pid"]
    os.kill(hangs, signal.SIGSTOP)

    def asked() -> int | None:
        for _ in range(50):  # often enough that some come while Python ends
            both.signal(signal.SIGTERM)
            time.sleep(0.005)
        return both.process.poll()

    try:
        assert wait_until(asked, fits=lambda code: code is not None, within=20) == 1
        assert "eyes did not end: groundserve down eyes ends what hangs" in both.text
    finally:
        os.kill(hangs, signal.SIGCONT)
    groundserve.until_nothing_runs()


def test_one_that_cannot_come_up_leaves_the_others_meant(groundserve: Groundserve) -> None:
    """Those that were resumed; what a file brought up just now is down, and that is all."""
    groundserve("up", "-d", groundserve.service("ann", replicas=1), *ANY_PORT)
    pid = json.loads((groundserve.folder / "state/groundserve/ann/lock").read_text())["pid"]
    os.kill(pid, signal.SIGTERM)
    groundserve.until_nothing_runs()
    files = [groundserve.service("eyes", EYES, replicas=1), groundserve.service("ears", ": $GROUNDSERVE_PORT; exit 2")]
    both = groundserve.up("ann", *files, ports=())
    assert both.wait() == 1
    assert both.text.index("eyes is down\n") < both.text.index("ann is down: groundserve up ann resumes it")
    groundserve.until_nothing_runs()
    said = groundserve("status", code=4)
    assert "ann is meant to run and does not" in said
    assert "eyes" not in said


def test_whoever_has_the_endpoint_goes_down_last(groundserve: Groundserve) -> None:
    groundserve("up", "-d", groundserve.service("ann", replicas=1), groundserve.service("eyes", EYES, replicas=1))
    assert groundserve("down", "--all") == "eyes is down\nann is down\n"


def test_several_that_others_take_down(groundserve: Groundserve) -> None:
    """The command in the foreground takes down what is left of them, and ends by itself once nothing is."""
    files = [groundserve.service("lab", replicas=1), groundserve.service("eyes", EYES, replicas=1)]
    both = groundserve.up(*files)
    both.until("lab, eyes share one endpoint")
    groundserve("down", "--all")
    both.until("lab, eyes were taken down")
    assert both.wait() == 0
    again = groundserve.up(*files)
    again.until("lab, eyes share one endpoint")
    groundserve("down", "eyes")
    assert again.end(signal.SIGINT) == 0
    assert "lab is down" in again.text
    assert "eyes" not in again.text.partition("Ctrl-C takes them down")[2]
    groundserve.until_nothing_runs()


def test_what_cannot_be_joined_is_told(groundserve: Groundserve, tmp_path: Path) -> None:
    file = groundserve.service("eyes", EYES)
    assert "no service nobody is up here: bring it up first" in groundserve("up", file, "--join", "nobody", code=1)
    engine = ComposeEngine(ServiceFolder(tmp_path, "eyes"))
    with pytest.raises(ConfigError, match=r"docker/compose\.two-models\.yaml"):
        engine.prepare(recipe(load(file)), AddressFlags(join="lab"))


@pytest.mark.parametrize(
    "flags",
    [
        AddressFlags(listen="127.0.0.1:0"),
        AddressFlags(admin="127.0.0.1:0"),
        AddressFlags(api_keys="keys"),
        AddressFlags(is_open=True),
        AddressFlags(balancers=("127.0.0.1:1",)),
    ],
)
def test_who_joined_has_no_endpoint_to_change(
    flags: AddressFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags that would be of no use are refused, and what to do instead is told."""
    resumed(tmp_path, monkeypatch, desired(join="lab"))
    with pytest.raises(
        ConfigError, match=r"^eyes shares the endpoint of lab: .* groundserve down eyes, and up with its"
    ):
        beginning(Source("eyes"), flags, "local")


def test_who_has_balancers_joins_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed(tmp_path, monkeypatch, desired(balancers=("127.0.0.1:1",)))
    with pytest.raises(ConfigError, match=r"^eyes is behind the balancers 127\.0\.0\.1:1: .* groundserve down eyes"):
        beginning(Source("eyes"), AddressFlags(join="lab"), "local")


def test_who_has_a_balancer_stays_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed(tmp_path, monkeypatch, desired())
    with pytest.raises(
        ConfigError, match=r"^eyes has a balancer of its own, and stays behind it; groundserve down eyes"
    ):
        beginning(Source("eyes"), AddressFlags("192.0.2.1:1", balancers=("127.0.0.1:1",)), "local")


def resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, meant: Desired) -> None:
    """The service eyes is meant to run so."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    eyes = ServiceFolder(state_root(), "eyes")
    eyes.claim().close()
    eyes.write_desired(meant)


def together(monkeypatch: pytest.MonkeyPatch, groundserve: Groundserve, *arguments: Any) -> list[tuple[Any, ...]]:
    """What `up` of several asks of `up` of each."""
    monkeypatch.setenv("XDG_STATE_HOME", groundserve.environ["XDG_STATE_HOME"])
    asked: list[tuple[Any, ...]] = []

    def up(*arguments: Any, is_detached: bool) -> int:
        asked.append(arguments)
        return int(not is_detached)

    monkeypatch.setattr(change, "up", up)
    assert change.up_together(*arguments, is_detached=True) == 0
    return asked


def test_several_behind_balancers_join_nobody(groundserve: Groundserve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The balancers tell the services apart; one of the services has none to share."""
    flags = AddressFlags("192.0.2.1:1", admin_key="key", balancers=("127.0.0.1:1",))
    files = [Source(str(groundserve.service(name))) for name in ("lab", "eyes")]
    asked = together(monkeypatch, groundserve, files, flags, "local")
    assert [given for _, given, _ in asked] == [flags, flags]


def test_several_files_may_be_pipes(groundserve: Groundserve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read once, and begun with what it said."""
    files = []
    for name in ("lab", "eyes"):
        reading, writing = os.pipe()
        os.write(writing, f"name: {name}\n{groundserve.service(name).read_text()}".encode())
        os.close(writing)
        files.append(Source(f"/dev/fd/{reading}"))
    asked = together(monkeypatch, groundserve, files, AddressFlags(), "local")
    for file in files:
        os.close(int(file.path.removeprefix("/dev/fd/")))
    assert [beginning(source, AddressFlags(), "local").name for source, *_ in asked] == ["lab", "eyes"]


def test_two_services_of_one_name_are_refused(groundserve: Groundserve) -> None:
    file = groundserve.service("lab")
    assert "two services are called lab" in groundserve("up", file, file, code=1)
