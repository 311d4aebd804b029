"""`groundserve up` and what ends it, with real processes."""

import contextlib
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.operate.command_line import ANY_PORT, LAB, ROOT, Groundserve
from tests.support.until import wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def replica_processes(groundserve: Groundserve) -> list[int]:
    return [pid for pid, line in groundserve.processes().items() if "tests.lab.replica" in line and "leash" not in line]


def test_up_says_how_it_goes_and_prints_a_command_that_answers(groundserve: Groundserve) -> None:
    up = groundserve.up(groundserve.service("lab")).until_up()
    assert "lab-1  STARTING" in up.text
    assert "lab-2  READY" in up.text
    assert "lab is up after" in up.until(": 2 replicas at http://127.0.0.1:")
    command = up.text.partition("try    ")[2].partition("look ")[0]
    # As curl would do it, for machines that have none.
    program, url, _, header, _, body = shlex.split(command.replace("\\\n", " "))
    answer = httpx.post(url, content=body, headers=[header.split(": ")])
    assert program == "curl"
    assert answer.json()["object"] == "chat.completion"
    assert url.startswith(groundserve("status", "--endpoint", "lab").strip())


def test_what_serves_no_models_gets_a_command_that_answers_too(groundserve: Groundserve) -> None:
    script = f"exec {sys.executable} -m http.server $GROUNDSERVE_PORT --bind 127.0.0.1"
    file = groundserve.folder / "web.yaml"
    file.write_text(f"service: {{readiness_probe: /, replicas: 1}}\nrun: {script}\n")
    up = groundserve.up(file).until_up()
    program, url = shlex.split(up.text.partition("try    ")[2].partition("look ")[0])
    assert program == "curl"
    assert httpx.get(url).json() == {"status": "ok", "ready": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(groundserve: Groundserve, number: signal.Signals) -> None:
    up = groundserve.up(groundserve.service("lab")).until_up()
    assert up.end(number) == 0
    assert "lab is down" in up.text
    assert groundserve.processes() == {}
    if number is signal.SIGINT:
        assert groundserve("status") == "No existing services.\n"
    else:
        assert "lab is meant to run and does not: groundserve up lab resumes it" in groundserve("status", code=4)


def test_a_signal_before_anything_is_ready_ends_everything(groundserve: Groundserve) -> None:
    up = groundserve.up(groundserve.service("lab", f"{LAB} --start-delay 600"))
    up.until("lab-2  STARTING")
    assert up.end(signal.SIGTERM) == 0
    assert groundserve.processes() == {}


def test_kill_9(groundserve: Groundserve) -> None:
    """Killed with signal 9, groundserve up leaves nothing behind and comes up again."""
    # The server is nobody's direct child here: a shell stands between, and one process has left the session.
    script = f"(setsid sleep 1000 &)\n{LAB.removeprefix('exec ')}\ntrue"
    service = groundserve.service("lab", script)
    up = groundserve.up(service).until_up()
    assert sum("sleep 1000" in line and "leash" not in line for line in groundserve.processes().values()) >= 2
    assert up.end(signal.SIGKILL) == -signal.SIGKILL
    groundserve.until_nothing_runs()
    assert "lab is meant to run and does not: groundserve up lab resumes it" in groundserve("status", code=4)
    assert groundserve.up(service).until_up().end(signal.SIGTERM) == 0


def test_a_killed_leash_takes_its_replica_along(groundserve: Groundserve) -> None:
    """Also where a shell stands between, and one process has left the session; then the replica is started again."""
    script = f"(setsid sleep 1000 &)\n{LAB.removeprefix('exec ')}\ntrue"
    groundserve.up(groundserve.service("lab", script, replicas=1)).until_up()

    def life() -> dict[int, str]:
        return {pid: line for pid, line in groundserve.processes().items() if "sleep 1000" in line or "replica" in line}

    before = life()
    assert len(before) == 5  # two of the leash's, the shell, the server, and the stray
    os.kill(min(pid for pid, line in before.items() if "leash" in line), signal.SIGKILL)
    wait_until(life, fits=lambda now: not before.keys() & now.keys())
    after = groundserve.until("lab", lambda status: status["service"]["ready"] == 1)
    assert after["replicas"][0]["id"] == 1


def test_a_second_up_of_the_same_name_says_so(groundserve: Groundserve) -> None:
    service = groundserve.service("lab")
    groundserve.up(service).until_up()
    endpoint = groundserve("status", "--endpoint").strip()
    said = groundserve("up", service, code=1)
    assert said.count("\n") == 1
    assert f"lab is up already at {endpoint}" in said
    assert groundserve.status("lab")["service"]["ready"] == 2


def test_two_services_live_side_by_side(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("one", replicas=1)).until_up()
    groundserve.up(groundserve.service("two", replicas=1)).until_up()
    first, second = (groundserve("status", "--endpoint", name).strip() for name in ("one", "two"))
    assert first != second
    assert [httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code for url in (first, second)] == [200, 200]
    assert "one-1" not in groundserve("status", "tw*")
    assert groundserve("down", "o?e") == "one is down\n"
    assert groundserve.status("two")["service"]["status"] == "READY"
    assert groundserve("down", "--all") == "two is down\n"
    groundserve.until_nothing_runs()


def test_detached_it_returns_when_ready_and_down_ends_it(groundserve: Groundserve) -> None:
    said = groundserve("up", "-d", groundserve.service("lab"), *ANY_PORT)
    assert "lab is up after" in said
    assert groundserve.status("lab")["service"]["ready"] == 2
    groundserve("scale", "lab", "3")
    groundserve.until("lab", lambda status: status["service"]["ready"] == 3)
    assert "lab-3  READY" in groundserve("logs", "lab", "--controller")
    assert groundserve("down", "lab") == "lab is down\n"
    assert groundserve.processes() == {}


def test_detached_start_that_fails(groundserve: Groundserve) -> None:
    """up -d returns with the reason if the service cannot come up."""
    said = groundserve(
        "up", "-d", groundserve.service("lab", "echo the model is gone $GROUNDSERVE_PORT\nexit 2"), code=1
    )
    assert "exited with code 2: the model is gone" in said
    assert groundserve.processes() == {}
    assert "the model is gone" in groundserve("logs", "lab")


def test_a_dead_replica_comes_back(groundserve: Groundserve) -> None:
    def endpoints(status: dict[str, Any]) -> dict[str, str]:
        return {row["name"]: row["endpoint"] for row in status["replicas"]}

    up = groundserve.up(groundserve.service("lab")).until_up()
    before = endpoints(groundserve.status("lab"))
    os.kill(replica_processes(groundserve)[0], signal.SIGKILL)
    assert "killed by signal 9" in up.until("starts again in")
    # Its status may still be that of the moment before.
    ends = endpoints(groundserve.until("lab", lambda now: now["service"]["ready"] == 2 and endpoints(now) != before))
    assert before.keys() == ends.keys()
    assert sum(before[name] != ends[name] for name in before) == 1


def test_dead_balancer_comes_back(groundserve: Groundserve) -> None:
    """A dead balancer comes back at the same endpoint with the same replicas."""
    groundserve.up(groundserve.service("lab")).until_up()
    before = groundserve.status("lab")
    replicas = replica_processes(groundserve)
    (balancer,) = (
        pid for pid, line in groundserve.processes().items() if "-m balancer " in line and "leash" not in line
    )
    os.kill(balancer, signal.SIGKILL)
    wait_until(lambda: balancer in groundserve.processes(), fits=lambda is_there: not is_there)

    def answers() -> bool:
        try:
            url = f"{before['service']['endpoint']}/v1/chat/completions"
            return httpx.post(url, json=CHAT).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers)
    assert replica_processes(groundserve) == replicas
    after = groundserve.until("lab", lambda status: status["service"]["ready"] == 2)
    assert [row["endpoint"] for row in after["replicas"]] == [row["endpoint"] for row in before["replicas"]]


def test_service_that_cannot_start(groundserve: Groundserve) -> None:
    """A service that cannot start is failed, and the message has its last output."""
    up = groundserve.up(groundserve.service("lab", "echo $GROUNDSERVE_PORT\necho out of memory >&2\nexit 1"))
    assert up.wait() == 1
    assert up.text.count("starts again in") == 4  # twice for each of two replicas
    assert "groundserve: lab failed: exited with code 1: out of memory" in up.text
    assert groundserve.processes() == {}


def test_a_command_that_is_not_there_is_not_tried_again(groundserve: Groundserve) -> None:
    up = groundserve.up(groundserve.service("lab", "exec no-such-program $GROUNDSERVE_PORT"))
    assert up.wait() == 1
    assert "starts again in" not in up.text
    assert "no-such-program: not found" in up.text


def test_one_of_two_given_up_leaves_a_service_that_serves(groundserve: Groundserve) -> None:
    script = f"if [ $SKYPILOT_SERVE_REPLICA_ID = 1 ]; then echo no luck; exit 2; fi\n{LAB}"
    up = groundserve.up(groundserve.service("lab", script)).until_up()
    assert "lab-1 is given up: exited with code 2: no luck" in up.text
    status = groundserve.status("lab")
    assert (status["service"]["status"], status["service"]["ready"]) == ("READY", 1)
    assert [row["status"] for row in status["replicas"]] == ["FAILED", "READY"]
    assert "lab-1: exited with code 2: no luck" in groundserve("status", code=3)


def test_ctrl_c_lets_an_answer_finish_and_a_second_one_does_not(groundserve: Groundserve) -> None:
    slow = f"{LAB} --first-token-delay 1.5 --tokens 1"
    up = groundserve.up(groundserve.service("lab", slow, replicas=1)).until_up()
    url = f"{groundserve('status', '--endpoint').strip()}/v1/chat/completions"

    def in_flight() -> int:
        return int(groundserve.status("lab")["service"]["in_flight"])

    with httpx.Client() as client, client.stream("POST", url, json={**CHAT, "stream": True}) as answer:
        assert answer.status_code == 200
        up.process.send_signal(signal.SIGINT)
        up.until("once more ends at once")
        assert "data: [DONE]" in list(answer.iter_lines())
    assert up.wait() == 0
    assert groundserve.processes() == {}

    up = groundserve.up(groundserve.service("lab", f"{LAB} --first-token-delay 600", replicas=1)).until_up()
    url = f"{groundserve('status', '--endpoint').strip()}/v1/chat/completions"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json={**CHAT, "stream": True}):
        wait_until(in_flight, fits=lambda count: count == 1)
        up.process.send_signal(signal.SIGINT)
        up.until("once more ends at once")
        up.process.send_signal(signal.SIGINT)
        assert up.wait() == 0
    assert groundserve.processes() == {}


def test_scaling_up_and_down_loses_nothing(groundserve: Groundserve) -> None:
    slow = f"{LAB} --first-token-delay 1.0 --tokens 1"
    groundserve.up(groundserve.service("lab", slow, replicas=1)).until_up()
    assert "3 replicas from now on" in groundserve("scale", "lab", "3")
    groundserve.until("lab", lambda status: status["service"]["ready"] == 3)
    url = f"{groundserve('status', '--endpoint').strip()}/v1/chat/completions"
    with httpx.Client() as client:
        streams = [client.stream("POST", url, json={**CHAT, "stream": True}) for _ in range(3)]
        answers = [stream.__enter__() for stream in streams]
        members = {answer.headers["x-replica-id"] for answer in answers}
        assert members == {"lab-1", "lab-2", "lab-3"}
        groundserve("scale", "lab", "1")
        assert all("data: [DONE]" in list(answer.iter_lines()) for answer in answers)
        for stream in streams:
            stream.__exit__(None, None, None)
    status = groundserve.until("lab", lambda status: status["service"]["total"] == 1)
    assert status["replicas"][0]["status"] == "READY"
    wait_until(lambda: len(replica_processes(groundserve)), fits=lambda count: count == 1)
    groundserve("scale", "lab", "0")
    empty = groundserve.until("lab", lambda status: status["service"]["total"] == 0)
    assert empty["service"]["status"] == "NO_REPLICA"


def test_down_with_a_replica_id_replaces_that_replica(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab")).until_up()
    assert "replica 1 finishes what it has" in groundserve("down", "lab", "--replica-id", "1")
    status = groundserve.until(
        "lab", lambda status: [row["id"] for row in status["replicas"]] == [2, 3] and status["service"]["ready"] == 2
    )
    assert [row["name"] for row in status["replicas"]] == ["lab-2", "lab-3"]
    assert "lab has no replica 1; it has 2, 3" in groundserve("down", "lab", "--replica-id", "1", code=1)


def test_a_port_that_was_asked_for_and_is_taken_stops_the_start(groundserve: Groundserve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("--listen", "--admin"):
            said = groundserve("up", groundserve.service("lab"), flag, address, code=1)
            assert f"{flag} {address}: the port is in use" in said
    assert groundserve.processes() == {}


def test_script_with_a_taken_port(groundserve: Groundserve) -> None:
    """A script with a fixed port fails if that port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = groundserve.service("lab", f"serve --port {port}", replicas=1, more=f"resources: {{ports: {port}}}")
        up = groundserve.up(service)
        assert up.wait() == 1
    assert f"lab failed: port {port} is in use by another program" in up.text


def test_a_script_with_a_port_of_its_own_serves_one_replica(groundserve: Groundserve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = f"exec {sys.executable} -m tests.lab.replica --exit-look 0.02 --port {port}"
    more = f"resources: {{ports: {port}}}"
    up = groundserve.up(groundserve.service("lab", script, replicas=1, more=more)).until_up()
    assert groundserve.status("lab")["replicas"][0]["endpoint"] == f"http://127.0.0.1:{port}"
    assert f"lab listens on port {port} only" in groundserve("scale", "lab", "2", code=1)
    os.kill(replica_processes(groundserve)[0], signal.SIGKILL)
    up.until("starts again in")
    groundserve.until("lab", lambda status: status["service"]["ready"] == 1)


def test_logs_show_what_replicas_and_balancer_print(groundserve: Groundserve) -> None:
    service = groundserve.service("lab", f"echo one $SKYPILOT_SERVE_REPLICA_ID; echo two\n{LAB}")
    groundserve.up(service).until_up()
    assert {"lab-1 | one 1", "lab-1 | two", "lab-2 | one 2"} <= set(groundserve("logs", "lab").splitlines())
    assert groundserve("logs", "lab", "2").startswith("one 2\ntwo\n")
    assert groundserve("logs", "lab", "--tail", "1", "--balancer").count("\n") == 1
    both = groundserve("logs", "lab", "1", "2", "--no-follow").splitlines()
    assert {"lab-1 | one 1", "lab-2 | one 2"} <= set(both)
    assert groundserve("logs", "lab", "--tail", "1", "--load-balancer").count("\n") == 1
    assert "the controller of lab prints where groundserve up was started" in groundserve(
        "logs", "lab", "--controller", code=1
    )
    said = groundserve("logs", "lab", "9", code=1)
    assert "there is no log of replica 9 of lab; there is one of each of these: 1, 2" in said
    assert "services that ran here: lab" in groundserve("logs", "other", code=1)


def test_on_a_terminal_the_replicas_move_until_they_are_ready(groundserve: Groundserve) -> None:
    may_go_on = groundserve.folder / "may-go-on"
    wait = f"echo loading shards\nuntil [ -e {may_go_on} ]; do sleep 0.05; done"
    service = groundserve.service("lab", f"{wait}\n{LAB}")
    ours, theirs = pty.openpty()
    up = subprocess.Popen(
        [sys.executable, "-m", "balancer.cli", "up", str(service), *ANY_PORT],
        env={**groundserve.environ, "TERM": "xterm", "COLUMNS": "100"},
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""
    with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123 - a descriptor
        while "stop   groundserve down lab" not in seen:
            seen += terminal.read(4096).decode(errors="replace")
            if "loading shards" in seen:
                may_go_on.touch()
        up.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while chunk := terminal.read(4096):
                seen += chunk.decode(errors="replace")
    assert up.wait(timeout=60) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert re.search(r"lab-1 +STARTING +\d+ s", plain)
    assert re.search(r"● +lab-2 +READY", plain)
    assert "lab is up after" in plain
    assert "lab is down" in plain
