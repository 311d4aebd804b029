"""What is typed, and what comes back without anything being started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.operate.command_line import ROOT, Groundserve

GOOD = "service: {readiness_probe: /health}\nrun: serve --port $GROUNDSERVE_PORT\n"


@pytest.fixture
def groundserve(tmp_path: Path) -> Groundserve:
    return Groundserve(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["up"],
        ["up", "a.yaml", "--on", "moon"],
        ["up", "a.yaml", "--detac"],
        ["scale", "a"],
        ["scale", "a", "two"],
        ["scale", "a", "-1"],
        ["logs"],
        ["logs", "a", "b"],
        ["check"],
    ],
)
def test_wrong_usage_is_2_and_shows_the_usage(groundserve: Groundserve, arguments: list[str]) -> None:
    assert "usage: groundserve" in groundserve(*arguments, code=2)


@pytest.mark.parametrize("command", ["up", "status", "scale", "logs", "down", "check"])
def test_every_command_has_help(groundserve: Groundserve, command: str) -> None:
    assert groundserve(command, "--help").startswith(f"usage: groundserve {command}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "nobody"], "no service nobody is up here; none is"),
        (["status", "--endpoint"], "--endpoint wants one service, and none fit: give one NAME"),
        (["scale", "nobody", "2"], "no service nobody is up here; none is"),
        (["logs", "nobody"], "there is no log of any replica of nobody; services that ran here: none"),
        (["down"], "down: give the NAMEs of services, or --all"),
        (["down", "x", "--all"], "down: give the NAMEs of services, or --all"),
        (["down", "nobody"], "no service nobody is up here; none is"),
        (["down", "--all", "--replica-id", "1"], "--replica-id wants the NAME of one service"),
    ],
)
def test_what_cannot_be_done_is_1_and_one_line(groundserve: Groundserve, arguments: list[str], said: str) -> None:
    assert groundserve(*arguments, code=1) == f"groundserve: {said}\n"


@pytest.mark.parametrize("command", ["check", "up"])
@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (None, [], "No such file or directory: give the path of a service YAML"),
        ("service: {replica: 1}", [], ":1: service.replica is unknown; the nearest known key is 'replicas'"),
        ("service: {}", [], "there is no `run:`, so nothing says how to start a replica"),
        (GOOD + "envs: {KEY: }", [], "KEY has no value: give it with --env KEY=VALUE"),
        (GOOD, ["--env", "=x"], "--env: write NAME=VALUE"),
        (GOOD, ["--env", "NOT_SET_ANYWHERE"], "write NOT_SET_ANYWHERE=VALUE, or set NOT_SET_ANYWHERE"),
        (GOOD, ["--env-file", "/nowhere"], "--env-file /nowhere: No such file or directory"),
        (GOOD, ["-n", "a/b"], "'a/b' cannot name a service"),
        (
            "service: {}\nrun: serve",
            [],
            "nothing says where a replica listens: let `run:` use ${GROUNDSERVE_PORT:-8000}",
        ),
        (
            "service: {replicas: 2}\nresources: {ports: 8000}\nrun: serve --port 8000",
            [],
            "all replicas would listen on port 8000 of this machine: let `run:` listen on ${GROUNDSERVE_PORT:-8000}",
        ),
        (GOOD + "resources: {memory: 900000}", [], "1 replica of x want 900000 GB of memory"),
        ("service: {}\nrun: python -m replica --model smolm2", [], "unknown model smolm2: did you mean smollm2-135m?"),
        ("service: {}\nrun: python -m replica --model ./nowhere", [], "there is no folder ./nowhere"),
        (
            "service: {replicas: 64}\nresources: {accelerators: {L4: 8}}\nrun: sglang serve --model-path a/b",
            [],
            "64 replicas of x want 8 GPUs each (L4); this machine has",
        ),
    ],
)
def test_bad_input_stops_before_anything_is_started(
    groundserve: Groundserve, tmp_path: Path, command: str, text: str | None, flags: list[str], said: str
) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    answer = groundserve(command, path, *flags, code=1)
    assert said in answer
    assert answer.startswith("groundserve: ")
    assert answer.count("\n") == 1
    assert groundserve.processes() == {}
    assert not (tmp_path / "state").exists()


def test_check_says_what_would_happen(groundserve: Groundserve, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "service: {readiness_probe: /health, replicas: 2, load_balancing_policy: least_load}\n"
        "resources: {cloud: gcp}\n"
        "run: |\n  pip list\n  python -m sglang.launch_server --model-path smollm2-135m --api-key hush --port 8000\n"
    )
    said = groundserve("check", path)
    assert "x: 2 replicas, 1x " in said
    assert "readiness /health" in said
    assert "policy: least_load" in said
    assert "run: SGLang serves smollm2-135m --api-key ***" in said
    assert ":2: resources.cloud has no effect here" in said
    assert "run: `pip list` is not run" in said
    assert "hush" not in said


def test_env_files_are_read_as_a_shell_would(groundserve: Groundserve, tmp_path: Path) -> None:
    path, envs = tmp_path / "x.yaml", tmp_path / "envs"
    path.write_text(
        "service: {readiness_probe: '/$A/$B/$C', replicas: 1}\nrun: $GROUNDSERVE_PORT\nenvs: {A: , B: , C: }"
    )
    envs.write_text("# a comment\nA=a\nexport B='b b' # more\n\nC=from-file\n")
    assert "readiness /a/b b/given" in groundserve("check", path, "--env-file", envs, "--env", "C=given")
    envs.write_text("A='a")
    assert f"--env-file {envs}:1: no closing quotation" in groundserve("check", path, "--env-file", envs, code=1)


def test_a_state_folder_that_cannot_be_made_is_said(groundserve: Groundserve, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    said = groundserve("up", groundserve.service("x"), code=1)
    assert "set XDG_STATE_HOME to a folder that can be written" in said


def test_without_a_service_status_asks_the_balancer_that_someone_else_runs(groundserve: Groundserve) -> None:
    balancer = subprocess.Popen(
        [sys.executable, "-m", "balancer", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"],
        cwd=ROOT,
        env=groundserve.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    with balancer:
        assert balancer.stderr is not None
        first, second = balancer.stderr.readline(), balancer.stderr.readline()
        groundserve.environ["GROUNDSERVE_ADMIN"] = second.split()[-1]
        assert groundserve("status", "--endpoint").strip() == first.split()[-1]
        (shown,) = json.loads(groundserve("status", "--json"))
        assert shown["service"]["status"] == "NO_REPLICA"
        balancer.kill()
    assert groundserve("status") == "No existing services.\n"


def test_watch_shows_it_again_and_again(groundserve: Groundserve) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "balancer.cli", "status", "--watch"],
        cwd=ROOT,
        env=groundserve.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stdout is not None
        seen = ""
        while seen.count("No existing services.") < 2:
            seen += watching.stdout.readline()
        watching.terminate()


def test_a_reader_that_has_seen_enough_is_no_error(groundserve: Groundserve, tmp_path: Path) -> None:
    folder = tmp_path / "state/groundserve/x"
    folder.mkdir(parents=True)
    (folder / "replica-1.log").write_text("a line\n" * 100_000)
    script = f"{sys.executable} -m balancer.cli logs x | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=groundserve.environ, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("x-1 | a line\n0\n", "")
