"""Services that are meant to exist: written down, resumed, rolled back, restarted."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from balancer.operate.commands.begin import Source, beginning
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.state.desired import Desired, Versions
from balancer.operate.state.service_folder import ServiceFolder
from tests.operate.command_line import ANY_PORT, LAB, Groundserve
from tests.operate.meant import desired, version
from tests.operate.streaming import CHAT, streaming
from tests.support.until import wait_until

# With a shell in between, so that it is nobody's child.
APART = f"{LAB.removeprefix('exec ')}\ntrue"
SLEEPS = f"{LAB} --start-delay 600"


def folder_of(groundserve: Groundserve, name: str = "lab") -> ServiceFolder:
    return ServiceFolder(groundserve.folder / "state/groundserve", name)


def written(groundserve: Groundserve) -> Desired:
    found = folder_of(groundserve).desired
    assert found is not None
    return found


def kill(groundserve: Groundserve) -> None:
    """Ends the controller as a crash or a loss of power would."""
    lock = json.loads((groundserve.folder / "state/groundserve/lab/lock").read_text())
    os.kill(lock["pid"], signal.SIGKILL)
    wait_until(folder_of(groundserve).is_up, fits=lambda is_up: not is_up)


# The file


def test_a_switch_to_the_other_colour_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    files = [
        replace(version(n), text=f"service: {{replicas: 1}}\nrun: x{n} $GROUNDSERVE_PORT\n", envs={}, secrets=())
        for n in (1, 2)
    ]
    meant = desired(serving=1, coming=2, mode="blue_green", target=1, before=1, versions=tuple(files), is_left=True)
    folder = ServiceFolder(tmp_path / "groundserve", "x")
    folder.claim().close()
    for is_switched in (False, True):
        folder.write_desired(replace(meant, is_switched=is_switched))
        begun = beginning(Source("x"), AddressFlags(), "local").wanted
        assert begun.hidden == (frozenset() if is_switched else {2})


def test_a_file_does_not_stand_for_the_service_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At boot it would be begun anew, without its --env and its versions."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = "service: {replicas: 1}\nrun: serve $GROUNDSERVE_PORT\n"
    Path("x").write_text(text)
    assert beginning(Source("x"), AddressFlags(), "local").before is None, "nobody means a service by that"
    meant = desired(versions=(replace(version(3), text=text, envs={"A": "b"}, secrets=()),), serving=3, coming=None)
    folder = ServiceFolder(tmp_path / "groundserve", "x")
    folder.claim().close()
    folder.write_desired(meant)
    assert beginning(Source("x"), AddressFlags(), "local").wanted.serving.version == 3
    assert "warning: x is resumed as it was; for the file x write ./x" in capsys.readouterr().err
    assert not Source("./x").is_name


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    assert folder.desired is None
    folder.write_desired(desired())
    assert folder.desired == desired()
    assert (folder.path / "desired.json").stat().st_mode & 0o777 == 0o600
    folder.remove_desired()
    assert folder.desired is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        desired().to_text()[:-20],
        desired(serving=7).to_text(),
        desired(coming=7).to_text(),
        desired(target=-1).to_text(),
        desired().to_text().replace('"rolling"', '"sideways"'),
    ],
)
def test_what_is_not_whole_is_not_read(text: str) -> None:
    assert Desired.from_text(text) is None


def test_only_so_many_versions_are_kept() -> None:
    versions = Versions({1: version(1)}, 1)
    for number in range(2, 40):
        assert versions.next_number(number - 1) == number
        versions.add(version(number))
        versions.note_serving(number)
    kept = versions.to_keep(number, None)
    assert [one.number for one in kept] == list(range(29, 40))
    assert versions.earlier(39, None) == version(38)
    assert versions.earlier(39, 29) == version(29)
    assert versions.earlier(39, 28) is None


def test_versions_that_never_served_are_not_gone_back_to() -> None:
    versions = Versions({1: version(1)}, 1)
    versions.note_serving(1)
    versions.add(version(2))
    assert [one.number for one in versions.to_keep(1, 2)] == [1, 2]
    assert [one.number for one in versions.to_keep(1, None)] == [1]
    assert [one.number for one in versions.to_keep(2, None)] == [1, 2]
    assert versions.served == [1], "asking changes nothing"
    assert versions.earlier(1, 2) is versions.earlier(1, None) is None


# Resumed


def test_a_service_whose_controller_was_killed_is_resumed(groundserve: Groundserve) -> None:
    """At the same endpoint, with the number and the version that it had."""
    file = groundserve.service("lab", replicas=1)
    groundserve.up(file).until_up()
    groundserve("update", "lab", groundserve.service("other", f"{LAB} --tokens 5", replicas=1))
    groundserve("scale", "lab", "2")
    before = groundserve.until("lab", lambda status: status["service"]["ready"] == 2)
    wait_until(lambda: written(groundserve).target, fits=lambda target: target == 2)
    kill(groundserve)
    said = groundserve("status", code=4)
    assert "lab is meant to run and does not: groundserve up lab resumes it" in said
    assert "lab is meant to run and does not" in groundserve("scale", "lab", "1", code=1)
    file.unlink()
    groundserve("up", "-d", "lab")
    after = groundserve.until("lab", lambda status: status["service"]["ready"] == 2)
    assert after["service"]["endpoint"] == before["service"]["endpoint"]
    assert {row["version"] for row in after["replicas"]} == {2}
    assert "lab gets the file of version 1 again" in groundserve("rollback", "lab")
    assert "lab is up already" in groundserve("up", "lab", code=1)
    assert groundserve("down", "lab") == "lab is down\n"
    assert groundserve("status") == "No existing services.\n"
    assert "lab: no such file, and no service of that name is meant to run here" in groundserve("up", "lab", code=1)


def test_a_signal_does_not_end_what_is_meant(groundserve: Groundserve) -> None:
    """A machine that shuts down sends SIGTERM; down and Ctrl-C mean it."""
    up = groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    assert up.end(signal.SIGTERM) == 0
    assert written(groundserve).is_left is False
    up = groundserve.up("lab", ports=()).until_up()
    assert up.end(signal.SIGINT) == 0
    assert folder_of(groundserve).desired is None
    groundserve.up(groundserve.service("lab", replicas=1)).until_up().end(signal.SIGTERM)
    assert groundserve("down", "lab") == "lab is down\n"
    assert folder_of(groundserve).desired is None


def test_a_service_that_never_came_up_is_not_meant_to(groundserve: Groundserve) -> None:
    """And where an earlier one is, that one stays."""
    broken = groundserve.service("lab", "echo $GROUNDSERVE_PORT; exit 2", replicas=1)
    assert groundserve.up(broken).wait() == 1
    assert folder_of(groundserve).desired is None
    groundserve.up(groundserve.service("lab", replicas=1)).until_up().end(signal.SIGTERM)
    before = written(groundserve)
    groundserve.service("lab", "echo $GROUNDSERVE_PORT; exit 2", replicas=1)
    assert groundserve.up(broken).wait() == 1
    assert written(groundserve) == before


def test_secrets_are_not_written_down(groundserve: Groundserve) -> None:
    file = groundserve.service("lab", f"test ${{#TOKEN}} = 11 && {LAB}", replicas=1, more="secrets: {TOKEN: null}")
    up = groundserve.up(file, "--secret", "TOKEN=hidden-away").until_up()
    up.end(signal.SIGTERM)
    folder = folder_of(groundserve).path
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hidden-away" in path.read_bytes()]
    assert written(groundserve).versions[0].secrets == ("TOKEN",)
    assert "wants TOKEN, which is a secret and so was not written down" in groundserve("up", "lab", code=1)
    groundserve.up("lab", "--secret", "TOKEN=hidden-away", ports=()).until_up()


def test_a_token_given_by_env_is_a_secret(groundserve: Groundserve) -> None:
    """SkyServe's own examples give one so."""
    path = groundserve.service("lab", replicas=1, more="envs: {HF_TOKEN: , SIZE: }")
    up = groundserve.up(path, "--env", "HF_TOKEN=hf_x", "--env", "SIZE=7b").until_up()
    kept = (groundserve.folder / "state/groundserve/lab/desired.json").read_text()
    assert "hf_x" not in kept
    assert '"7b"' in kept
    up.process.kill()
    groundserve.until_nothing_runs()
    assert "wants HF_TOKEN, which is a secret" in groundserve("up", "lab", code=1)
    groundserve.up("lab", "--env", "HF_TOKEN=hf_x").until_up()


def test_an_update_goes_on_where_it_was_cut_off(groundserve: Groundserve) -> None:
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    may_go_on = groundserve.folder / "may-go-on"
    slow = groundserve.service("slow", f"until [ -e {may_go_on} ]; do sleep 0.05; done\n{LAB}", replicas=1)
    with ThreadPoolExecutor() as pool:
        update = pool.submit(groundserve, "update", "lab", slow, code=1)
        groundserve.until("lab", lambda status: len(status["replicas"]) == 2)
        wait_until(lambda: written(groundserve).coming)
        kill(groundserve)
        update.result()
    may_go_on.touch()
    groundserve.up("lab", ports=()).until_up()
    status = groundserve.until("lab", lambda status: {row["version"] for row in status["replicas"]} == {2})
    assert status["service"]["ready"] == 1


# Looked after


def test_rollback_abort_and_restart(groundserve: Groundserve) -> None:
    """Streams notice nothing, and there is progress on the way."""
    groundserve.up(groundserve.service("lab", f"{LAB} --token-interval 0.03", replicas=1)).until_up()
    assert "lab has no earlier version to go back to; these have served: 1" in groundserve("rollback", "lab", code=1)
    assert "lab is at version 1 and not being updated" in groundserve("update", "lab", "--abort", code=1)
    with streaming(f"{groundserve('status', '--endpoint').strip()}") as seen, ThreadPoolExecutor() as pool:
        groundserve("update", "lab", groundserve.service("two", f"{LAB} --token-interval 0.02", replicas=1))
        said = groundserve("rollback", "lab").splitlines()
        assert said[:2] == ["lab gets the file of version 1 again", "lab goes from version 2 to 3, rolling"]
        assert [line.split()[:2] for line in said[2:-1] if "READY" in line] == [["lab-3", "READY"]]
        assert said[-1] == "lab is at version 3"
        assert "lab has no version 9 to go back to; these have served: 1, 2, 3" in groundserve(
            "rollback", "lab", "9", code=1
        )
        update = pool.submit(groundserve, "update", "lab", groundserve.service("never", SLEEPS, replicas=1), code=1)
        groundserve.until("lab", lambda status: len(status["replicas"]) == 2)
        said = groundserve("update", "lab", "--abort")
        assert said == "lab goes back to version 3: the update to version 4 is aborted\n"
        assert "lab stays at version 3: the update was aborted" in update.result()
        groundserve.until("lab", lambda status: len(status["replicas"]) == 1)
        assert groundserve("restart", "lab").endswith("lab is at version 5\n")
    assert seen.failed == []
    (row,) = groundserve.status("lab")["replicas"]
    assert row["version"] == 5
    assert f"replica {row['id']} finishes" in groundserve("restart", "lab", "--replica-id", str(row["id"]))
    groundserve.until(
        "lab",
        lambda status: (
            [one["status"] for one in status["replicas"]] == ["READY"] and status["replicas"][0]["id"] != row["id"]
        ),
    )
    assert [one.number for one in written(groundserve).versions] == [1, 2, 5]


# On an engine whose replicas outlive their controller


class WithMadeUp(Groundserve):
    module = "tests.operate.made_up_engine"

    def start(self, *arguments: str | Path) -> str:
        return self("up", "-d", "--on", "made-up", *arguments)


@pytest.fixture
def made_up(tmp_path: Path) -> Iterator[WithMadeUp]:
    command = WithMadeUp(tmp_path)
    yield command
    command.stop_all()


def test_what_runs_is_compared_with_what_should(made_up: WithMadeUp) -> None:
    """A next controller keeps the replicas that run, their version, and a number that was asked for."""
    made_up.start(made_up.service("lab", APART, replicas=1), *ANY_PORT)
    policy = made_up.service("lab", APART, replicas=1)
    policy.write_text(policy.read_text().replace("service: {", 'service: {"load_balancing_policy": "least_load", '))
    made_up("update", "lab", policy)
    made_up("scale", "lab", "3")
    before = made_up.until("lab", lambda status: status["service"]["ready"] == 3)
    wait_until(lambda: written(made_up).target, fits=lambda target: target == 3)
    kill(made_up)
    assert "its controller is gone: groundserve up lab takes it up again" in made_up("scale", "lab", "1", code=1)
    assert "lab: found 3 of its replicas running" in made_up("up", "-d", "lab")
    after = made_up.until("lab", lambda status: status["service"]["ready"] == 3)
    assert [(row["id"], row["endpoint"], row["version"]) for row in after["replicas"]] == [
        (row["id"], row["endpoint"], 2) for row in before["replicas"]
    ]
    assert after["service"]["endpoint"] == before["service"]["endpoint"]
    assert httpx.post(f"{after['service']['endpoint']}/v1/chat/completions", json=CHAT).status_code == 200
    assert made_up("down", "lab") == "lab is down\n"
    made_up.until_nothing_runs()


def test_another_file_is_an_update_that_can_fail(made_up: WithMadeUp) -> None:
    """Back to the version that was left running, whose file is known."""
    made_up.start(made_up.service("lab", APART, replicas=2), *ANY_PORT)
    before = made_up.status("lab")
    kill(made_up)
    never = made_up.service("lab", SLEEPS, replicas=1)
    never.write_text(never.read_text().replace('"path"', '"initial_delay_seconds": 2, "path"'))
    made_up.start(never)
    status = made_up.until("lab", lambda status: len(status["replicas"]) == 2 and status["service"]["ready"] == 2)
    assert [row["endpoint"] for row in status["replicas"]] == [row["endpoint"] for row in before["replicas"]]
    assert {row["version"] for row in status["replicas"]} == {1}
    assert written(made_up).serving == 1
