"""A port that never closes: whatever happens to the balancer, a new connection waits for the next one; and one service
never has another's port. With real processes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from balancer.operate.state import control_socket
from tests.operate.command_line import LAB, Groundserve
from tests.operate.newcomers import newcomers
from tests.operate.streaming import CHAT, streaming
from tests.security.certificates import Authority
from tests.support.program import ROOT
from tests.support.until import wait_until

CROWD = {"max_connections_per_client": 10_000}


def up(groundserve: Groundserve, run: str = LAB) -> str:
    """The endpoint of a service that is up."""
    groundserve.up(groundserve.service("lab", run, **CROWD)).until_up()
    return groundserve("status", "--endpoint").strip()


def balancers(groundserve: Groundserve) -> list[int]:
    return [pid for pid, line in groundserve.processes().items() if "-m balancer " in line and "leash" not in line]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_balancer_loses_only_what_it_had_accepted(groundserve: Groundserve, number: signal.Signals) -> None:
    endpoint = up(groundserve)
    (balancer,) = balancers(groundserve)
    with newcomers(endpoint) as seen:
        os.kill(balancer, signal.SIGSTOP)
        wait_until(lambda: state(balancer) == "T")
        stopped = time.monotonic()  # whoever comes from here on is not accepted by this process
        wait_until(lambda: sum(one.is_connected for one in seen.since(stopped)) > 50)
        assert all(one.outcome == "" for one in seen.since(stopped))
        os.kill(balancer, number)
        os.kill(balancer, signal.SIGCONT)
        wait_until(lambda: state(balancer) in ("", "Z"))
        seen.until_more_are_answered()
    assert seen.outcomes(stopped).keys() == {"200"}
    assert seen.outcomes().keys() <= {"200", "ConnectionResetError", "closed b''"}, "nobody was refused"
    assert balancer not in balancers(groundserve)


def test_ended_balancer_is_replaced(groundserve: Groundserve) -> None:
    """A balancer that somebody ends is replaced by another one, and no client is lost."""
    endpoint = up(groundserve)
    (balancer,) = balancers(groundserve)
    with newcomers(endpoint) as seen:
        os.kill(balancer, signal.SIGTERM)
        wait_until(lambda: balancer not in groundserve.processes())
        seen.until_more_are_answered()
    assert seen.outcomes().keys() == {"200"}
    assert len(balancers(groundserve)) == 1


@contextlib.contextmanager
def under_way(endpoint: str) -> Iterator[list[Iterator[str]]]:
    """The lines that are still to come of three streams which take a quarter of a minute; all of them have begun."""
    long = {**CHAT, "max_tokens": 300}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60))
        url = f"{endpoint}/v1/chat/completions"
        streams = [stack.enter_context(client.stream("POST", url, json=long)).iter_lines() for _ in range(3)]
        for stream in streams:
            next(stream)
        yield streams


def test_takeover(groundserve: Groundserve) -> None:
    """A takeover loses no client, and the old balancer finishes its streams."""
    endpoint = up(groundserve, f"{LAB} --token-interval 0.05")
    (old,) = balancers(groundserve)
    with newcomers(endpoint) as seen, under_way(endpoint) as streams:
        new = taken_over(groundserve, old)
        seen.until_more_are_answered()
        wait_until(lambda: groundserve.status("lab")["service"]["ready"] == 2)
        assert all("data: [DONE]" in list(stream) for stream in streams)
    assert seen.outcomes().keys() == {"200"}
    wait_until(lambda: balancers(groundserve) == [new])
    assert groundserve.status("lab")["service"]["status"] == "READY"
    with streaming(endpoint) as answers:
        pass
    assert answers.failed == []


def taken_over(groundserve: Groundserve, old: int) -> int:
    """Has another balancer take over from the old one, which has streams under way; the new one's process."""
    assert "another takes its place" in groundserve("down", "lab", "--balancer")
    (new,) = wait_until(lambda: [pid for pid in balancers(groundserve) if pid != old])
    assert old in balancers(groundserve), "its streams are not over"
    return new


def install(site: Path, version: str) -> None:
    """Puts this version of the package into the folder, as pip does: the old one's files go, then the new one's come.

    The versions differ in what they say about themselves, and the second in a field more that it tells its controller.
    """
    package = site / "balancer"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "balancer", package, ignore=shutil.ignore_patterns("__pycache__"))
    edits = [("relay/own_paths.py", r'(?<=^OLLAMA_VERSION = )".*?"', f'"{version}"')]
    if version != "1":
        edits.append(("contract/status.py", r"(?<=wanted: int \| None = None)$", '\n    mood: str = "good"'))
    for name, old, new in edits:
        text, found = re.subn(old, new, (package / name).read_text(), flags=re.MULTILINE)
        assert found == 1, name
        (package / name).write_text(text)


def version_at(endpoint: str) -> str:
    return str(httpx.get(f"{endpoint}/api/version", timeout=60).json()["version"])


def test_takeover_by_another_version(groundserve: Groundserve, tmp_path: Path) -> None:
    """While a service runs, its code is replaced; then its balancer, by one of the new version, under 200 clients a
    second. Its controller stays the old one.
    """
    site = tmp_path / "site"
    groundserve.environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    install(site, "1")
    endpoint = up(groundserve, f"{LAB} --token-interval 0.05")
    (old,) = balancers(groundserve)
    with newcomers(endpoint) as seen, under_way(endpoint) as streams:
        install(site, "2")
        assert version_at(endpoint) == "1"
        new = taken_over(groundserve, old)
        seen.until_more_are_answered()
        assert version_at(endpoint) == "2"
        told = control_socket.ask(groundserve.folder / "state/groundserve/lab/control.sock", {"do": "balancer"})
        assert httpx.get(f"http://{told['admin']}/status").json()["service"]["mood"] == "good"
        groundserve.until("lab", lambda shown: shown["service"]["status"] == "READY")  # its old controller hears it
        assert all("data: [DONE]" in list(stream) for stream in streams)
    assert seen.outcomes().keys() == {"200"}
    wait_until(lambda: balancers(groundserve) == [new])


# Over TLS


@dataclass(frozen=True)
class Secure:
    """A service behind TLS that is up."""

    file: Path
    endpoint: str
    authority: Authority
    trusted: ssl.SSLContext


def with_certificate(file: Path, authority: Authority, name: str) -> None:
    """The service file with a certificate of that name, in place of the one that it has."""
    pair = authority.sign(name, "IP:127.0.0.1")
    tls = json.dumps({"certfile": str(pair.cert), "keyfile": str(pair.key)})
    text = re.sub(r'"tls": {[^}]*}, ', "", file.read_text())
    file.write_text(text.replace("service: {", f'service: {{"tls": {tls}, '))


@pytest.fixture
def secure(groundserve: Groundserve, tmp_path: Path) -> Secure:
    authority = Authority(tmp_path)
    file = groundserve.service("lab", LAB, **CROWD)
    with_certificate(file, authority, "first")
    groundserve.up(file).until_up()
    endpoint = groundserve("status", "--endpoint").strip()
    assert endpoint.startswith("https://")
    return Secure(file, endpoint, authority, ssl.create_default_context(cafile=str(authority.pair.cert)))


def test_a_killed_balancer_loses_only_its_own_handshakes(groundserve: Groundserve, secure: Secure) -> None:
    """With TLS: what it had accepted is lost, the handshakes that it was amid included, and no new connection."""
    (balancer,) = balancers(groundserve)
    with newcomers(secure.endpoint, secure.trusted) as seen:
        os.kill(balancer, signal.SIGSTOP)
        wait_until(lambda: state(balancer) == "T")
        stopped = time.monotonic()  # whoever comes from here on is not accepted by this process
        assert seen.outcomes().keys() <= {"", "200"}
        wait_until(lambda: sum(one.is_connected for one in seen.since(stopped)) > 50)
        assert not any(one.is_let_in for one in seen.since(stopped))
        os.kill(balancer, signal.SIGKILL)
        os.kill(balancer, signal.SIGCONT)
        wait_until(lambda: state(balancer) in ("", "Z"))
        seen.until_more_are_answered()
    assert seen.outcomes(stopped).keys() == {"200"}
    assert all(one.is_connected for one in seen.all), "nobody was refused"


def test_takeover_over_tls(groundserve: Groundserve, secure: Secure) -> None:
    """The old balancer ends its handshakes, too, before it goes, so that a takeover loses nobody."""
    (old,) = balancers(groundserve)
    with newcomers(secure.endpoint, secure.trusted) as seen:
        assert "another takes its place" in groundserve("down", "lab", "--balancer")
        wait_until(lambda: old not in groundserve.processes())
        seen.until_more_are_answered()
    assert seen.outcomes().keys() == {"200"}


def test_update_to_another_certificate_under_new_connections(groundserve: Groundserve, secure: Secure) -> None:
    """It brings another balancer process, to which the port goes over."""
    (old,) = balancers(groundserve)
    with_certificate(secure.file, secure.authority, "second")
    with newcomers(secure.endpoint, secure.trusted) as seen:
        assert "lab is at version 2" in groundserve("update", "lab", secure.file)
        wait_until(lambda: old not in groundserve.processes())
        seen.until_more_are_answered()
    assert seen.outcomes().keys() == {"200"}
    assert "second" in served_name(secure)


def served_name(secure: Secure) -> str:
    """The common name of the certificate that the endpoint shows."""
    address = ("127.0.0.1", int(secure.endpoint.rpartition(":")[2]))
    with (
        socket.create_connection(address, timeout=10) as plain,
        secure.trusted.wrap_socket(plain, server_hostname=address[0]) as connection,
    ):
        return str(connection.getpeercert())


# What goes wrong at a start


def test_a_start_that_fails_is_tried_again_while_clients_wait(groundserve: Groundserve) -> None:
    """What a process needs may be missing for a moment: here its log cannot be opened."""
    endpoint = up(groundserve)
    log = groundserve.folder / "state/groundserve/lab/balancer.log"
    (balancer,) = balancers(groundserve)
    log.rename(log.with_name("aside"))
    log.mkdir()
    os.kill(balancer, signal.SIGKILL)
    wait_until(lambda: balancer not in groundserve.processes())
    answers: list[int] = []
    waiting = threading.Thread(
        target=lambda: answers.append(httpx.get(f"{endpoint}/v1/models", timeout=60).status_code)
    )
    waiting.start()
    time.sleep(1.5)  # it is tried in vain meanwhile
    assert (answers, balancers(groundserve)) == ([], [])
    log.rmdir()
    waiting.join()
    assert answers == [200]


def test_once_a_service_goes_down_nobody_is_let_in(groundserve: Groundserve) -> None:
    endpoint = up(groundserve)
    port = int(endpoint.rpartition(":")[2])
    assert groundserve("down", "lab") == "lab is down\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_sigterm_to_every_process_at_once_finishes_the_streams(groundserve: Groundserve) -> None:
    """As systemd ends a unit: to the controller, which ends the others in order, and to all the others as well."""
    service = groundserve.service("lab", f"{LAB} --token-interval 0.03", replicas=1)
    controller = groundserve.up(service).until_up()
    endpoint = groundserve("status", "--endpoint").strip()
    long = {**CHAT, "max_tokens": 60}
    with httpx.Client(timeout=60) as client, client.stream("POST", f"{endpoint}/v1/chat/completions", json=long) as one:
        lines = one.iter_lines()
        next(lines)
        for pid in groundserve.processes():
            os.kill(pid, signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    assert controller.wait() == 0


def test_services_that_start_at_once_have_a_port_each(groundserve: Groundserve) -> None:
    """Nobody says which: all three want the first pair that is free."""
    files = {name: groundserve.service(name, replicas=1) for name in ("one", "two", "three")}
    threads = [threading.Thread(target=groundserve, args=("up", "-d", file)) for file in files.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endpoints = {name: groundserve("status", "--endpoint", name).strip() for name in files}
    assert len(set(endpoints.values())) == 3
    for name, endpoint in endpoints.items():
        answer = httpx.post(f"{endpoint}/v1/chat/completions", json={**CHAT, "stream": False})
        assert answer.headers["x-replica-id"] == f"{name}-1"
    assert groundserve("down", "--all").count("is down") == 3


def test_who_has_a_port_is_said(groundserve: Groundserve) -> None:
    endpoint = up(groundserve)
    address = endpoint.removeprefix("http://")
    said = groundserve("up", groundserve.service("other"), "--listen", address, code=1)
    who = re.fullmatch(
        rf"groundserve: --listen {address}: the port is in use by process (\d+) \((.*)\): stop what listens there, or "
        r"give another one\n",
        said,
    )
    assert who is not None
    assert "balancer.cli up" in who[2] or "-m balancer" in who[2]
    assert int(who[1]) in groundserve.processes()
