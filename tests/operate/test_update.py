"""Updates and autoscaling with real processes, under load that must not notice."""

import json
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.operate.command_line import LAB, ROOT, Groundserve
from tests.operate.streaming import CHAT, streaming
from tests.security.certificates import Authority
from tests.support.until import wait_until


def endpoint(groundserve: Groundserve) -> str:
    return groundserve("status", "--endpoint").strip()


def better(groundserve: Groundserve, name: str = "better", run: str = LAB) -> str:
    return str(groundserve.service(name, f"export BETTER=1\n{run} --token-interval 0.03"))


def test_a_rolling_update_under_streams_loses_nothing(groundserve: Groundserve) -> None:
    up = groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03")).until_up()
    with streaming(endpoint(groundserve)) as seen:
        said = groundserve("update", "lab", better(groundserve))
        assert "lab goes from version 1 to 2, rolling" in said
        assert said.endswith("lab is at version 2\n")
    assert seen.failed == []
    assert set(seen.replicas) == {"lab-1", "lab-2", "lab-3", "lab-4"}
    status = groundserve.status("lab")
    assert status["service"]["version"] == "2"
    assert [(row["id"], row["version"], row["status"]) for row in status["replicas"]] == [
        (3, 2, "READY"),
        (4, 2, "READY"),
    ]
    assert "lab is at version 2" in up.text


def test_both_versions_are_shown_while_an_update_runs(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    slow = groundserve.service("slow", f"{LAB} --start-delay 3", replicas=1)
    update = threading.Thread(target=groundserve, args=("update", "lab", slow))
    update.start()
    status = groundserve.until("lab", lambda status: len(status["replicas"]) == 2)
    assert (status["service"]["version"], status["service"]["status"]) == ("1,2", "READY")
    update.join()
    assert groundserve.status("lab")["service"]["version"] == "2"


def test_a_new_update_supersedes_one_under_way(groundserve: Groundserve) -> None:
    """The first one says so, and streams notice nothing."""
    groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03")).until_up()
    never = groundserve.service("never", f"{LAB} --start-delay 600")
    with streaming(endpoint(groundserve)) as seen, ThreadPoolExecutor() as pool:
        first = pool.submit(groundserve, "update", "lab", never, code=1)
        groundserve.until("lab", lambda status: len(status["replicas"]) == 3)
        assert groundserve("update", "lab", better(groundserve)).endswith("lab is at version 3\n")
        assert first.result().endswith("groundserve: lab: version 2 gave way to version 3\n")
    assert seen.failed == []
    assert {row["version"] for row in groundserve.status("lab")["replicas"]} == {3}


def test_blue_green_fails_when_its_time_is_over(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    never = groundserve.service("never", f"{LAB} --start-delay 600", replicas=1)
    never.write_text(never.read_text().replace('"path"', '"initial_delay_seconds": 2, "path"'))
    said = groundserve("update", "lab", never, "--mode", "blue_green", code=1)
    assert "lab stays at version 1: not ready after 2 s (readiness_probe.initial_delay_seconds)" in said
    status = groundserve.until("lab", lambda status: len(status["replicas"]) == 1)
    assert [(row["id"], row["status"]) for row in status["replicas"]] == [(1, "READY")]


def test_a_version_that_dies_soon_after_it_was_ready(groundserve: Groundserve) -> None:
    """It fails the update, and the old version serves all along."""
    groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03", replicas=1)).until_up()
    script = f"({LAB}) & replica=$!\n(sleep 2; kill -9 $replica) &\nwait $replica\necho it ran out of memory\nexit 1"
    dies = groundserve.service("dies", script, replicas=1, min_ready=30)
    with streaming(endpoint(groundserve)) as seen:
        said = groundserve("update", "lab", dies, code=1)
    assert "lab stays at version 1: exited with code 1: it ran out of memory" in said
    assert seen.failed == []
    assert "lab-1" in seen.replicas
    status = groundserve.until("lab", lambda status: len(status["replicas"]) == 1)
    assert [(row["id"], row["status"]) for row in status["replicas"]] == [(1, "READY")]


def test_a_failed_update_restores_the_number(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    groundserve("scale", "lab", "3")
    groundserve.until("lab", lambda status: status["service"]["ready"] == 3)
    broken = groundserve.service("broken", "echo $GROUNDSERVE_PORT; exit 3", replicas=1)
    assert "lab stays at version 1" in groundserve("update", "lab", broken, code=1)
    status = groundserve.until("lab", lambda status: {row["version"] for row in status["replicas"]} == {1})
    assert [row["id"] for row in status["replicas"] if row["status"] == "READY"] == [1, 2, 3]


def test_blue_green_under_streams(groundserve: Groundserve) -> None:
    """A blue-green update under streams loses nothing and switches as a whole."""
    groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03")).until_up()
    with streaming(endpoint(groundserve)) as seen:
        assert "lab is at version 2" in groundserve("update", "lab", better(groundserve), "--mode", "blue_green")
    assert seen.failed == []
    old = max(at for at, name in enumerate(seen.replicas) if name in ("lab-1", "lab-2"))
    new = min(at for at, name in enumerate(seen.replicas) if name in ("lab-3", "lab-4"))
    # Answers that were under way at the switch end after it, and the balancer needs a moment to find all ready.
    assert old - new < len(seen.replicas) / 2
    assert {row["version"] for row in groundserve.status("lab")["replicas"]} == {2}


def test_rollback_under_streams(groundserve: Groundserve) -> None:
    """A version that cannot start is rolled back without any client noticing."""
    groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03")).until_up()
    broken = groundserve.service("broken", "echo $GROUNDSERVE_PORT; echo no such model; exit 3")
    with streaming(endpoint(groundserve)) as seen:
        said = groundserve("update", "lab", broken, code=1)
        assert "groundserve: lab stays at version 1: exited with code 3: no such model" in said
        assert "everything it said: groundserve logs lab 3" in said
        assert "no such model" in groundserve("logs", "lab", "3", "--no-follow")
        groundserve.until("lab", lambda status: [row["id"] for row in status["replicas"]] == [1, 2])
    assert seen.failed == []
    assert groundserve.status("lab")["service"]["version"] == "1"


def test_a_file_that_cannot_be_is_refused_and_changes_nothing(groundserve: Groundserve) -> None:
    service = groundserve.service("lab", replicas=1)
    groundserve.up(service).until_up()
    before = groundserve.status("lab")["replicas"][0]["endpoint"]
    bad = groundserve.folder / "bad.yaml"
    bad.write_text("service: {replica: 1}")
    assert "service.replica is unknown" in groundserve("update", "lab", bad, code=1)
    for text, said in (
        ("service: {replicas: {{ replicas }}}", "bad.yaml:1: service.replicas has a list or a mapping for a key"),
        (
            "service: {}\nenvs: {A: &x [*x]}",
            "bad.yaml:2: not valid YAML: the alias *x refers to a value that contains it",
        ),
        ("service: {}\n? [a, b]\n: 1", "bad.yaml:2: the file has a list or a mapping for a key"),
        ("[" * 100_000, "bad.yaml:1: not valid YAML: it is nested more than 50 deep"),
        ("#" * 300_000, "bad.yaml: larger than 256 KiB"),
    ):
        bad.write_text(text)
        answer = groundserve("update", "lab", bad, code=1)
        assert said in answer
        assert answer.count("\n") == 1
    assert "it is a folder" in groundserve("update", "lab", groundserve.folder, code=1)
    assert "No such file" in groundserve("update", "lab", "nowhere.yaml", code=1)
    assert "no service other is up here" in groundserve("update", "other", service, code=1)
    assert groundserve.status("lab")["replicas"][0]["endpoint"] == before


def test_settings_change_under_streams(
    groundserve: Groundserve,
) -> None:
    """Policy and limits change under streams in the same processes, and nothing is lost."""
    service = groundserve.service("lab", f"{LAB} --token-interval 0.03", queue_size=7)
    groundserve.up(service).until_up()
    before = [row["endpoint"] for row in groundserve.status("lab")["replicas"]]
    processes = set(groundserve.processes())
    text = service.read_text().replace("service: {", 'service: {"load_balancing_policy": "least_load", ')
    service.write_text(text.replace('"queue_size": 7', '"queue_size": 9'))
    with streaming(endpoint(groundserve)) as seen:
        assert "lab is at version 2" in groundserve("update", "lab", service)
        status = groundserve.until("lab", lambda status: status["service"]["policy"] == "least_load")
    assert seen.failed == []
    assert [(row["endpoint"], row["version"]) for row in status["replicas"]] == [(url, 2) for url in before]
    assert set(groundserve.processes()) == processes, "the balancer took it up as it runs"


def test_update_from_another_folder(groundserve: Groundserve, tmp_path: Path) -> None:
    """An update from another folder touches no replica, and its paths are still relative to that of up."""
    run = f"pwd > {tmp_path}/was-in-$SKYPILOT_SERVE_REPLICA_ID; {LAB}"
    service = groundserve.service("lab", run)
    groundserve.up(service).until_up()
    before = [row["endpoint"] for row in groundserve.status("lab")["replicas"]]
    (elsewhere := tmp_path / "elsewhere").mkdir()
    text = service.read_text()
    service.write_text(text.replace("service: {", 'service: {"load_balancing_policy": "least_load", '))
    assert "lab is at version 2" in groundserve("update", "lab", service, folder=elsewhere)
    service.write_text(text.replace('"/health"', '"/v1/models"'))
    assert "lab is at version 3" in groundserve("update", "lab", service, folder=elsewhere)
    status = groundserve.status("lab")
    assert [(row["endpoint"], row["version"]) for row in status["replicas"]] == [(url, 3) for url in before]
    service.write_text(service.read_text().replace("run: |", "workdir: tests\nrun: |"))
    assert "lab is at version 4" in groundserve("update", "lab", service, folder=elsewhere)
    folders = {id: (tmp_path / f"was-in-{id}").read_text().strip() for id in (1, 2, 3, 4)}
    assert folders == {1: str(ROOT), 2: str(ROOT), 3: str(ROOT / "tests"), 4: str(ROOT / "tests")}


def test_update_with_a_certificate(groundserve: Groundserve, tmp_path: Path) -> None:
    """A certificate brings a new balancer process and keeps the replicas."""
    service = groundserve.service("lab")
    groundserve.up(service).until_up()
    before = [row["endpoint"] for row in groundserve.status("lab")["replicas"]]
    authority = Authority(tmp_path)
    pair = authority.sign("localhost", "DNS:localhost", "IP:127.0.0.1")
    tls = {"certfile": str(pair.cert), "keyfile": str(pair.key)}
    service.write_text(service.read_text().replace("service: {", f'service: {{"tls": {json.dumps(tls)}, '))
    assert "lab is at version 2" in groundserve("update", "lab", service)
    url = groundserve("status", "--endpoint").strip()
    assert url.startswith("https://127.0.0.1:")
    wait_until(lambda: answers(url, authority.pair.cert))
    assert [row["endpoint"] for row in groundserve.status("lab")["replicas"]] == before


def answers(url: str, authority: Path) -> bool:
    with httpx.Client(verify=ssl.create_default_context(cafile=str(authority))) as client:
        try:
            return client.get(f"{url}/health").status_code == 200
        except httpx.ConnectError:
            return False


def test_a_service_asleep_wakes_for_a_request_which_waits(groundserve: Groundserve) -> None:
    policy = {"min_replicas": 0, "max_replicas": 2, "upscale_delay_seconds": 0, "downscale_delay_seconds": 2}
    service = groundserve.service("lab", replicas=policy, target_in_flight_per_replica=2)
    up = groundserve.up(service).until_up()
    assert "no replica at" in up.text
    assert groundserve.status("lab")["service"]["status"] == "NO_REPLICA"
    assert groundserve.status("lab")["replicas"] == []
    url = f"{groundserve('status', '--endpoint').strip()}/v1/chat/completions"
    assert httpx.post(url, json=CHAT, timeout=60).status_code == 200
    groundserve.until("lab", lambda status: status["service"]["total"] == 0)
    assert "scales with its load, 0 to 2" in groundserve("scale", "lab", "2", code=1)


def test_replicas_follow_the_load_up_and_down(groundserve: Groundserve) -> None:
    policy = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_seconds": 1, "downscale_delay_seconds": 2}
    slow = f"{LAB} --token-interval 0.1"
    service = groundserve.service("lab", slow, replicas=policy, target_in_flight_per_replica=2)
    groundserve.up(service).until_up()
    with streaming(endpoint(groundserve), clients=8) as seen:
        groundserve.until("lab", lambda status: status["service"]["ready"] == 4)
    assert seen.failed == []
    groundserve.until("lab", lambda status: status["service"]["total"] == 1)
