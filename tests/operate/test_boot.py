"""`groundserve enable`: the unit that it writes, and a service under what systemd does with such a unit."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from balancer.operate.commands.boot import unit
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import ServiceFolder
from tests.operate.command_line import ANY_PORT, LAB, PATIENCE, ROOT, Groundserve
from tests.operate.meant import desired
from tests.support.needed import lacking
from tests.support.until import wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
FILE = "name: odd\nservice: {replicas: 1, readiness_probe: /health}\nrun: serve $GROUNDSERVE_PORT\n"
NAME = "odd"
ODD = desired(base="/a b/100%", serving=1, versions=(Version(1, FILE, "/a b/odd.yaml", {}, ()),))


@pytest.fixture
def booted(groundserve: Groundserve) -> Groundserve:
    """With a configuration folder of its own, and no systemd to be told."""
    groundserve.environ["XDG_CONFIG_HOME"] = str(groundserve.folder / "config")
    groundserve.environ.pop("XDG_RUNTIME_DIR", None)
    if shutil.which("systemctl") is None:
        lacking("no systemctl here: apt-get install systemd")
    return groundserve


def verified(path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        lacking("no systemd-analyze here: apt-get install systemd")
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    complaints = [line for line in done.stderr.splitlines() if path.name in line or "groundserve" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize("is_users", [True, False])
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path, is_users: bool) -> None:
    secrets = [tmp_path / "a secret 5%.env"]
    path = tmp_path / "groundserve-odd.service"
    path.write_text(unit(NAME, ODD, is_users=is_users, secret_files=secrets))
    verified(path)
    text = path.read_text()
    for line in ("KillMode=mixed", "Restart=always", "OOMPolicy=continue", "WorkingDirectory=/a b/100%%"):
        assert line in text.splitlines()
    path.write_text(text.replace("KillMode=mixed", "KillMode=mixd"))
    with pytest.raises(AssertionError):
        verified(path)


def read(text: str, credentials: Path) -> tuple[list[str], dict[str, str]]:
    """Command and variables of a unit as systemd reads them."""
    lines = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
    (start,) = (value for name, _, value in lines if name == "ExecStart")

    def word(text: str) -> str:
        text = text.replace("%%", "\0").replace("%d", str(credentials)).replace("\0", "%")
        return text.replace("$$", "$")

    variables = [shlex.split(value)[0] for name, _, value in lines if name == "Environment"]
    return [word(part) for part in shlex.split(start)], dict(v.replace("%%", "%").split("=", 1) for v in variables)


def test_a_unit_resumes_the_service(tmp_path: Path) -> None:
    command, _ = read(unit(NAME, ODD, is_users=False, secret_files=[tmp_path / "s"]), tmp_path)
    assert command[command.index("up") :] == ["up", NAME, "--secret-file", f"{tmp_path}/secrets1"]


def test_secrets_are_in_no_unit(booted: Groundserve) -> None:
    file = booted.service("lab", replicas=1, more="secrets: {TOKEN: null}")
    booted("up", "-d", file, "--secret", "TOKEN=s3cr3t", *ANY_PORT)
    state = booted.folder / "state/groundserve/lab/desired.json"
    assert "s3cr3t" not in state.read_text()
    assert "lab has secrets (TOKEN), which are kept nowhere" in booted("enable", "lab", "--user", code=1)
    kept = booted.folder / "kept.env"
    enable = ("enable", "lab", "--user", "--secret-file", kept)
    assert f"--secret-file {kept}: No such file" in booted(*enable, code=1)
    kept.write_text("OTHER=1\n")
    assert "lab wants TOKEN, and no --secret-file has it" in booted(*enable, code=1)
    assert not (booted.folder / "config").exists()
    kept.write_text("TOKEN=s3cr3t\n")
    booted(*enable)
    text = (booted.folder / "config/systemd/user/groundserve-lab.service").read_text()
    assert "s3cr3t" not in text
    assert f"LoadCredential=secrets1:{kept}" in text
    booted("down", "lab")


def test_enable_and_disable(booted: Groundserve) -> None:
    assert "lab is not meant to run here" in booted("enable", "lab", "--user", code=1)
    booted("up", "-d", booted.service("lab", replicas=1), *ANY_PORT)
    assert "lab comes up at boot" in booted("enable", "lab", "--user")
    folder = booted.folder / "config/systemd/user"
    assert (folder / "groundserve-lab.service").stat().st_mode & 0o777 == 0o644
    verified(folder / "groundserve-lab.service")
    assert (folder / "default.target.wants/groundserve-lab.service").is_symlink()
    assert "no longer comes up at boot" in booted("disable", "lab", "--user")
    assert list(folder.rglob("groundserve-*")) == []
    assert "lab is not enabled" in booted("disable", "lab", "--user", code=1)
    assert booted.status("lab")["service"]["ready"] == 1
    booted("down", "lab")


@pytest.mark.parametrize("before", [None, "[Unit]\nDescription=as it was\n"])
def test_enable_that_fails_changes_nothing(groundserve: Groundserve, before: str | None) -> None:
    """Where systemctl cannot be run, the service is as enabled as it was."""
    path = without_systemctl(groundserve)
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_text(before)
    assert "systemctl: No such file or directory: a systemd is needed" in groundserve("enable", NAME, "--user", code=1)
    assert (path.read_text() if path.exists() else None) == before


def test_disable_needs_no_systemctl(groundserve: Groundserve) -> None:
    """The unit goes, and the link to it; what could not be done is told."""
    path = without_systemctl(groundserve)
    link = path.parent / "default.target.wants" / path.name
    link.parent.mkdir(parents=True)
    path.write_text("[Unit]\n")
    link.symlink_to(path)
    said = groundserve("disable", NAME, "--user", code=1)
    assert f"odd no longer comes up at boot: {path} is gone; but systemctl: No such file" in said
    assert not path.exists()
    assert not link.is_symlink()
    assert "odd is not enabled" in groundserve("disable", NAME, "--user", code=1)


def without_systemctl(groundserve: Groundserve) -> Path:
    """The unit's file of a service that is meant to run, on a machine without systemctl."""
    folder = ServiceFolder(groundserve.folder / "state/groundserve", NAME)
    folder.claim().close()
    folder.write_desired(ODD)
    groundserve.environ |= {"PATH": "/nowhere", "XDG_CONFIG_HOME": str(groundserve.folder / "config")}
    return groundserve.folder / "config/systemd/user/groundserve-odd.service"


def test_what_ends_an_enabled_service_that_is_down(booted: Groundserve) -> None:
    booted("up", "-d", booted.service("lab", replicas=1), *ANY_PORT)
    booted("enable", "lab", "--user")
    booted("down", "lab")
    said = booted("status", code=4)
    assert "groundserve disable lab --user && groundserve down lab ends that" in said
    booted("disable", "lab", "--user")
    assert "resumes it, groundserve down lab ends that" in booted("status", code=4)
    assert booted("status", "--json", code=4).startswith("[]\ngroundserve: lab is meant to run and does not")
    booted("down", "lab")
    assert "meant to run" not in booted("status")


class Unit:
    """A service under a unit, with what systemd does: main process in a group of its own, SIGTERM to it alone, and
    SIGKILL to all that is left.
    """

    def __init__(self, groundserve: Groundserve, text: str) -> None:
        self._groundserve = groundserve
        self.command, variables = read(text, groundserve.folder)
        self._environ = {**groundserve.environ, **variables, "SYSTEMD_EXEC_PID": "1"}
        self.main: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        nothing = subprocess.DEVNULL
        self.main = subprocess.Popen(
            self.command,
            env=self._environ,
            cwd=ROOT,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
        )

    def stop(self) -> None:
        assert self.main is not None
        self.main.terminate()
        assert self.main.wait(PATIENCE) == 0
        for process in self._groundserve.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def under_systemd(booted: Groundserve) -> Iterator[Unit]:
    slow = f"{LAB} --first-token-delay 1 --tokens 20 --token-interval 0.1"
    booted("up", "-d", booted.service("lab", slow, replicas=1), *ANY_PORT)
    booted("enable", "lab", "--user")
    booted("down", "lab")
    yield Unit(booted, (booted.folder / "config/systemd/user/groundserve-lab.service").read_text())
    booted.stop_all()


def ready(groundserve: Groundserve) -> str:
    def endpoint() -> str:
        with contextlib.suppress(Exception):
            service = groundserve.status("lab")["service"]
            return str(service["endpoint"]) if service["ready"] else ""
        return ""

    return wait_until(endpoint)


def test_a_restart_under_systemd_cuts_no_stream_off(under_systemd: Unit, groundserve: Groundserve) -> None:
    under_systemd.start()
    before = ready(groundserve)
    with httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{before}/v1/chat/completions", json=CHAT) as answer:
            lines = answer.iter_lines()
            next(lines)
            under_systemd.stop()
            assert "data: [DONE]" in list(lines)
        under_systemd.start()
        assert ready(groundserve) == before, "clients find it where it was"
        with client.stream("POST", f"{before}/v1/chat/completions", json=CHAT) as answer:
            assert "data: [DONE]" in list(answer.iter_lines())
    under_systemd.stop()


def test_an_update_outlives_a_boot(under_systemd: Unit, booted: Groundserve) -> None:
    """The unit brings up the version that served last, not the file of the first `up`."""
    under_systemd.start()
    ready(booted)
    booted("update", "lab", booted.service("lab", f"{LAB} --tokens 3", replicas=2, more="# another file"))
    under_systemd.stop()
    under_systemd.start()
    wait_until(lambda: ready(booted) and [row["version"] for row in booted.status("lab")["replicas"]] == [2, 2])
    under_systemd.stop()


def test_a_controller_that_is_killed_comes_back_as_it_was(under_systemd: Unit, groundserve: Groundserve) -> None:
    under_systemd.start()
    before = ready(groundserve)
    assert under_systemd.main is not None
    under_systemd.main.kill()
    under_systemd.main.wait()
    groundserve.until_nothing_runs()
    time.sleep(0.1)
    under_systemd.start()
    assert ready(groundserve) == before
    under_systemd.stop()
