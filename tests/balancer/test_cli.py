"""What is typed, and what comes back without anything being started."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from balancer.__main__ import parse
from balancer.cli import _parser, main
from balancer.operate.commands import change
from balancer.operate.commands.begin import Source
from replica import gpu, lease, placement
from tests.operate.command_line import ROOT, Groundserve
from tests.support.program import BalancerProgram, Program
from tests.support.until import wait_until

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
        ["down"],
        ["down", "x", "--all"],
        ["down", "--all", "--replica-id", "1"],
        ["down", "x", "y", "--replica-id", "1"],
        ["update", "a", "a.yaml", "--mode", "green"],
        ["logs", "a", "--tail", "5", "b"],
        ["keys", "add", "--priority", "bulk"],
    ],
)
def test_wrong_usage_is_2_and_shows_the_usage(groundserve: Groundserve, arguments: list[str]) -> None:
    assert "usage: groundserve" in groundserve(*arguments, code=2)


@pytest.mark.parametrize("arguments", [["down"], ["update", "a"], ["up", "a.yaml", "--join", "b", "--open"]])
def test_wrong_usage_is_told_by_its_command(groundserve: Groundserve, arguments: list[str]) -> None:
    assert groundserve(*arguments, code=2).startswith(f"usage: groundserve {arguments[0]} ")


@pytest.mark.parametrize("count", ["0", "-1", "x", "65", ""])
def test_number_of_workers(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--workers", count])
    assert f"{count!r} is neither a number from 1 to 64 nor auto" in capsys.readouterr().err


def test_one_worker_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((3, 3), (128, 64)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert parse(["--workers", "auto"]).workers == workers


def test_version(groundserve: Groundserve) -> None:
    assert groundserve("--version") == f"groundserve {metadata.version('groundserve')}\n"


@pytest.mark.parametrize("words", ["status", "events", "--version", "check x.yaml", "logs lab"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(groundserve: Groundserve, words: str, unbuffered: str) -> None:
    (groundserve.folder / "x.yaml").write_text(GOOD)
    log = groundserve.folder / "state/groundserve/lab/replica-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("a line\n" * 10)
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "balancer.cli", *words.split()],
            env={**groundserve.environ, "PYTHONUNBUFFERED": unbuffered},
            cwd=groundserve.folder,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "groundserve: its output: No space left on device\n")


@pytest.mark.parametrize("command", ["up", "status", "scale", "logs", "down", "check"])
def test_every_command_has_help(groundserve: Groundserve, command: str) -> None:
    assert groundserve(command, "--help").startswith(f"usage: groundserve {command}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "--endpoint"], "--endpoint wants one service, and none fit: give one NAME"),
        (["scale", "nobody", "2"], "no service nobody is up here; none is"),
        (["logs", "nobody"], "there is no log of any replica of nobody; services that ran here: none"),
        (["logs", "nobody", "1", "3"], "there is no log of replica 1 or 3 of nobody; services that ran here: none"),
        (
            ["logs", "nobody", "--controller"],
            "there is no log of the controller of nobody; services that ran here: none",
        ),
        (["down", "nobody"], "no service nobody is up here; none is"),
        (["down", "no*"], "no service no* is up here; none is"),
    ],
)
def test_what_cannot_be_done_is_1_and_one_line(groundserve: Groundserve, arguments: list[str], said: str) -> None:
    assert groundserve(*arguments, code=1) == f"groundserve: {said}\n"


# What else `sky serve` 0.14.1 takes (sky/client/cli/command.py and flags.py): it works, changes nothing and says why,
# or says what to write instead.


@pytest.mark.parametrize(
    "words",
    [
        "up x.yaml -n x --yes --no-async --secret-file F --env-file F --env K=V --secret K=V",
        "up --service-name x x.yaml -y",
        "update x x.yaml -y --mode ROLLING",
        "update --mode blue_green x x.yaml --yes --no-async",
        "status x y -v --endpoint",
        "status --verbose",
        "down x y* -y --purge",
        "down -a -p --no-async",
        "down --all --yes",
        "down x --replica-id 1 --purge",
        "logs x 1 3 --no-follow --tail 100",
        "logs --follow --load-balancer x",
        "logs --controller x",
        "logs x --tail 5 1 2",
        "update x --mode blue_green new.yaml",
        "update x --secret K=V new.yaml --yes",
        "down x --yes y",
        "up a.yaml -y b.yaml --env K=V c.yaml",
        "status x -v y",
    ],
)
def test_what_sky_serve_takes_is_taken(words: str) -> None:
    assert _parser().parse_args(words.split()).command == words.split()[0]


def test_flags_between_arguments_belong_to_neither() -> None:
    options = _parser().parse_args(["logs", "x", "--tail", "5", "1", "-f", "2"])
    assert (options.name, options.ids, options.tail, options.follow) == ("x", [1, 2], 5, True)
    options = _parser().parse_args(["update", "x", "--mode", "blue_green", "new.yaml", "--env", "A=1"])
    assert (options.name, options.service, options.mode, options.env) == ("x", "new.yaml", "blue_green", ["A=1"])
    options = _parser().parse_args(["down", "x", "--yes", "y"])
    assert options.names == ["x", "y"]
    options = _parser().parse_args(["keys", "add", "--priority", "bulk", "me"])
    assert (options.name, options.priority) == ("me", "bulk")
    assert _parser().parse_args(["logs", "--", "-x"]).name == "-x"


@pytest.mark.parametrize(
    "words", [["up", ""], ["check", "a.yaml", ""], ["update", "", "a.yaml"], ["scale", "", "1"], ["logs", ""]]
)
def test_an_empty_argument_is_said(groundserve: Groundserve, words: list[str]) -> None:
    said = groundserve(*words, code=2)
    assert said.startswith(f"usage: groundserve {words[0]} ")
    assert "is empty: a variable of the shell without a value?" in said


@pytest.mark.parametrize("command", ["up", "update x"])
@pytest.mark.parametrize(
    ("flag", "why"),
    [
        *((f"{flag} gcp", "not in a cloud") for flag in ("--infra", "--cloud", "--region", "--zone", "-t")),
        ("--instance-type p5", "not in a cloud"),
        ("--network-tier best", "not in a cloud"),
        ("--image-id docker:x", "in this machine's own environment"),
        ("--use-spot", "no spot instances"),
        ("--no-use-spot", "no spot instances"),
        *((f"{flag} 100", "this machine's disks") for flag in ("--disk-size", "--disk-tier", "--local-disk")),
    ],
)
def test_a_flag_about_clouds_is_warned_of(
    capsys: pytest.CaptureFixture[str], command: str, flag: str, why: str
) -> None:
    options = _parser().parse_args([*command.split(), "x.yaml", *flag.split()])
    assert options.service in ("x.yaml", ["x.yaml"])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {flag.split()[0]} has no effect here: ")
    assert why in said


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        *(
            (f"{command} x.yaml {flag}", instead)
            for command in ("up", "update x")
            for flag, instead in (
                ("--gpus L4:2", "write `resources: {accelerators: L4:2}` in the service file"),
                ("--cpus 4+", "write `resources: {cpus: 4+}` in the service file"),
                ("--memory 16+", "write `resources: {memory: 16+}` in the service file"),
                ("--ports 8080", "write `resources: {ports: 8080}` in the service file"),
                ("--workdir src", "write `workdir: src` in the service file"),
                ("--num-nodes 2", "write `num_nodes: 2` in the service file"),
                ("--git-url http://x/y", "clone http://x/y and give the path of a service file in it"),
                ("--git-ref main", "check main out and give the path of a service file in it"),
                ("--config a=b", "SkyPilot's own machinery"),
            )
        ),
        ("up x.yaml --async", "use -d"),
        ("update x x.yaml --async", "end the line with &"),
        ("down x --async", "end the line with &"),
        ("down x --config a=b", "SkyPilot's own machinery"),
        ("status --config a=b", "SkyPilot's own machinery"),
        ("logs x -s", "redirect what this prints"),
        ("logs x 1 --sync-down", "redirect what this prints"),
    ],
)
def test_a_flag_that_is_none_of_ours_says_what_to_write_instead(
    capsys: pytest.CaptureFixture[str], words: str, instead: str
) -> None:
    with pytest.raises(SystemExit) as left:
        _parser().parse_args(words.split())
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert " is not for groundserve: " in said
    assert instead in said


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
        (GOOD + "secrets: {KEY: }", [], "KEY has no value: give it with --secret KEY=VALUE"),
        (GOOD + "secrets: [secrets:KEY]", [], "KEY has no value: give it with --secret KEY=VALUE"),
        (GOOD, ["--secret-file", "/nowhere"], "--secret-file /nowhere: No such file or directory"),
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
        (GOOD + "workdir: /nowhere/at/all", [], "workdir: there is no folder /nowhere/at/all"),
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


def test_check_names_the_gpus_that_would_be_used(groundserve: Groundserve, tmp_path: Path) -> None:
    leases = tmp_path / "leases"
    groundserve.environ |= {"REPLICA_PRETEND_GPUS": "3", "LEASE_DIR": str(leases)}
    first_gpu = gpu.list_gpus(groundserve.environ)[:1]
    held = lease.take(first_gpu, placement.Want(1), leases, wait=0, note="another on port 8001")
    said = groundserve("check", ROOT / "services/llama2.yaml", "--env", "HF_TOKEN=hush")
    held.release()
    first, *others = [line for line in said.splitlines() if line.startswith("GPU ")]
    assert first.startswith("GPU 0 (pretended GPU, 80 of 80 GiB free): held by another on port 8001 (process ")
    assert others == [f"GPU {n} (pretended GPU, 80 of 80 GiB free): for replica {n}" for n in (1, 2)]
    assert "hush" not in said


def test_env_files_are_read_as_sky_serve_reads_them(groundserve: Groundserve, tmp_path: Path) -> None:
    path, envs = tmp_path / "x.yaml", tmp_path / "envs"
    path.write_text(
        "service: {readiness_probe: '/$A/$B/$C', replicas: 1}\nrun: $GROUNDSERVE_PORT\nenvs: {A: , B: , C: }"
    )
    envs.write_text("# a comment\nA=a\nexport B='b b' # more\n\nC=from-file\n")
    assert "readiness /a/b b/given" in groundserve("check", path, "--env-file", envs, "--env", "C=given")
    groundserve.environ["C"] = "of-ours"
    assert "readiness /a/b b/of-ours" in groundserve("check", path, "--env-file", envs, "--env", "C")
    envs.write_text("A='a # b'\nB=b#c # d's\nC=\"#\\\"e\"")
    assert 'readiness /a # b/b#c/#"e' in groundserve("check", path, "--secret-file", envs)
    envs.write_text("A='a")
    assert f"--env-file {envs}:1: no closing quotation" in groundserve("check", path, "--env-file", envs, code=1)


@pytest.mark.parametrize(("flag", "of"), [("--env-file", "envs"), ("--secret-file", "secrets")])
def test_a_pipe_of_variables_is_read_once(monkeypatch: pytest.MonkeyPatch, flag: str, of: str) -> None:
    """All of several services get what a shell's `<(command)` prints."""
    reading, writing = os.pipe()
    os.write(writing, b"A=1\n")
    os.close(writing)
    got: list[Source] = []
    monkeypatch.setattr(change, "check", lambda *arguments: got.extend(arguments[0]) or 0)
    assert main(["check", "a.yaml", "b.yaml", flag, f"/dev/fd/{reading}"]) == 0
    os.close(reading)
    assert [(source.path, getattr(source, of)) for source in got] == [("a.yaml", {"A": "1"}), ("b.yaml", {"A": "1"})]


def test_a_state_folder_that_cannot_be_made_is_said(groundserve: Groundserve, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    said = groundserve("up", groundserve.service("x"), code=1)
    assert "set XDG_STATE_HOME to a folder that can be written" in said


def test_status_of_a_foreign_balancer(groundserve: Groundserve) -> None:
    """If no service runs here, status asks the balancer that somebody else runs."""
    with BalancerProgram([]) as balancer:
        wait_until(balancer.is_listening)
        groundserve.environ["GROUNDSERVE_ADMIN"] = balancer.admin_url
        assert groundserve("status", "--endpoint").strip() == balancer.url
        (shown,) = json.loads(groundserve("status", "--json", code=4))
        assert shown["service"]["status"] == "NO_REPLICA"
    assert groundserve("status") == "No existing services.\n"


def test_watch_shows_it_again_and_again(groundserve: Groundserve) -> None:
    with Program("-m", "balancer.cli", "status", "--watch", environ=groundserve.environ) as watching:
        wait_until(lambda: watching.text.count("No existing services.") >= 2)


def test_a_reader_that_has_seen_enough_is_no_error(groundserve: Groundserve, tmp_path: Path) -> None:
    folder = tmp_path / "state/groundserve/x"
    folder.mkdir(parents=True)
    (folder / "replica-1.log").write_text("a line\n" * 100_000)
    script = f"{sys.executable} -m balancer.cli logs x | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=groundserve.environ, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("x-1 | a line\n0\n", "")


def test_models_are_kept_by_the_replicas_program(groundserve: Groundserve, tmp_path: Path) -> None:
    groundserve.environ |= {"HF_HOME": str(tmp_path), "MODELS_DIR": str(tmp_path)}
    assert groundserve("models").split() == ["MODEL", "SIZE", "STATE"]
    refused = groundserve("export", "org/one", tmp_path / "one.tar", code=1)
    assert refused == "groundserve: org/one is not here whole: pull it first\n"
