"""The two keys of a local service: who has them, and who does not."""

import asyncio
import stat
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from balancer.contract.listing import Listing, ReplicaListing
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses, AddressFlags, open_listeners
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.local.balancer_handle import LocalBalancer
from balancer.operate.engines.local.engine import LocalEngine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import BrokenState
from balancer.spec.service_file import parse
from tests.operate.command_line import LAB, Groundserve

ANY = AddressFlags("127.0.0.1:0", "127.0.0.1:0")
EVIL = Listing((ReplicaListing("evil", "http://127.0.0.1:9", id=1),))


def made(run: str, more: str = "") -> Recipe:
    return recipe(parse(f"service: {{replicas: 1}}\n{more}\nrun: {run}\n", source="x.yaml"))


def admin_of(groundserve: Groundserve) -> str:
    """The admin port of the one service, by its balancer's own command line."""
    (line,) = (words for words in groundserve.processes().values() if "-m balancer " in words and "leash" not in words)
    return f"http://{line.partition('--admin ')[2].split()[0]}"


# The admin port's


def test_admin_port_needs_the_services_folder(groundserve: Groundserve) -> None:
    """Only users who can read the service's folder can change anything at its admin port."""
    groundserve.up(groundserve.service("lab", replicas=1)).until_up()
    admin = admin_of(groundserve)
    assert httpx.put(f"{admin}/replicas", json=EVIL.to_json()).status_code == 401
    assert httpx.post(f"{admin}/replicas/1/drain").status_code == 401
    assert [httpx.get(f"{admin}{path}").status_code for path in ("/status", "/metrics", "/")] == [200, 200, 200]

    file = Path(groundserve("status", "--admin-key", "lab").strip())
    key = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.post(f"{admin}/replicas/1/drain", headers=headers).status_code == 200
    # The controller takes back what others changed, and what it says itself is done.
    groundserve("scale", "lab", "2")
    groundserve.until("lab", lambda status: status["service"]["ready"] >= 1 and status["service"]["total"] == 2)

    shown = [groundserve("status", *words, code=3) for words in (("-v",), ("--json",))]  # the one drained stays so
    shown += [groundserve("logs", "lab")]
    shown += [groundserve("logs", "lab", "--balancer"), httpx.get(f"{admin}/status").text]
    assert [text for text in shown if key in text] == []
    for process in groundserve.processes():
        for what in ("cmdline", "environ"):
            assert key.encode() not in Path(f"/proc/{process}/{what}").read_bytes()


def test_a_key_of_ones_own_is_used_as_it_is(groundserve: Groundserve, tmp_path: Path) -> None:
    mine = tmp_path / "mine.key"
    mine.write_text("open-sesame\n")
    groundserve.up(groundserve.service("lab", replicas=1), "--admin-key", mine).until_up()
    admin = admin_of(groundserve)
    assert groundserve("status", "--admin-key").strip() == str(mine)
    assert httpx.post(f"{admin}/replicas/1/drain", headers={"Authorization": "Bearer open-sesame"}).status_code == 200
    assert not (tmp_path / "state/groundserve/lab/admin.key").exists()


def test_another_services_balancer_takes_no_orders_from_us(groundserve: Groundserve, tmp_path: Path) -> None:
    groundserve.up(groundserve.service("one", replicas=1)).until_up()
    admin = admin_of(groundserve).removeprefix("http://")
    folder = ServiceFolder(tmp_path / "state/groundserve", "two")
    folder.claim().close()

    async def asked() -> tuple[bool, bool]:
        ours = made("exec serve --port $GROUNDSERVE_PORT")
        _, listeners = open_listeners(ANY)
        addresses = Addresses("127.0.0.1:9", admin)
        balancer = LocalBalancer(folder, addresses, listeners, ours, None, lambda: None)
        answer = await BalancerHandle.tell(balancer, EVIL)
        was_drained = await BalancerHandle.drain(balancer, 1)
        await balancer.stop(asyncio.Event())
        return answer is not None or balancer.has_answered, was_drained

    assert asyncio.run(asked()) == (False, False)
    assert [row["name"] for row in groundserve.status("one")["replicas"]] == ["one-1"]
    assert groundserve.status("one")["service"]["status"] == "READY"


def test_a_key_is_drawn_once_and_again_where_the_file_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "admin.key"
    key = keys.drawn(file)
    assert keys.drawn(file) == key
    file.write_text("")
    file.chmod(0o644)
    assert keys.drawn(file) not in ("", key)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_drawn_key_can_be_a_flags_value(tmp_path: Path) -> None:
    drawn = [keys.drawn(tmp_path / str(number)) for number in range(300)]
    assert [key for key in drawn if not key.isalnum()] == []
    assert len(set(drawn)) == 300


@pytest.mark.parametrize("text", ["two\nlines", "caf\u00e9"])
def test_a_file_that_holds_no_key_is_said(tmp_path: Path, text: str) -> None:
    file = tmp_path / "admin.key"
    file.write_text(text)
    with pytest.raises(BrokenState, match=r"admin\.key cannot be used"):
        keys.drawn(file)
    with pytest.raises(ConfigError, match="one line with a key"):
        keys.given(file, "--admin-key")


def test_a_key_that_cannot_be_made_stops_the_start_in_one_line(groundserve: Groundserve, tmp_path: Path) -> None:
    (tmp_path / "state/groundserve/lab/admin.key").mkdir(parents=True)
    said = groundserve("up", groundserve.service("lab"), code=1)
    assert said.endswith("admin.key cannot be used (Is a directory): remove it\n")
    assert groundserve.processes() == {}


def test_beyond_loopback_the_admin_port_still_wants_a_word(groundserve: Groundserve) -> None:
    said = groundserve("up", groundserve.service("lab"), "--admin", "0.0.0.0:0", code=1)
    assert "--admin 0.0.0.0:0 is not loopback: give --admin-key FILE, or say --open" in said


# The replicas'


@pytest.mark.parametrize(
    ("run", "more", "environ"),
    [
        ("sglang serve --model-path a/b --api-key mine", "", {}),
        ("sglang serve --model-path a/b --api-key=mine", "", {}),
        ("sglang serve --model-path a/b --admin-api-key mine", "", {}),
        ("sglang serve --model-path a/b --config mine.yaml", "", {}),
        ("sglang serve --model-path a/b", "envs: {SGLANG_ARGS: --api-key mine}", {}),
        ("sglang serve --model-path a/b", "", {"SGLANG_ARGS": "--log-requests --api-key mine"}),
        ("sglang serve --model-path a/b", "", {"SGLANG_PLUGINS": "others"}),
        ("vllm serve a/b --port $GROUNDSERVE_PORT", "", {}),
    ],
)
def test_what_sees_to_its_keys_itself_gets_none(
    tmp_path: Path, run: str, more: str, environ: Mapping[str, str]
) -> None:
    assert keys.for_replicas(made(run, more), tmp_path / "replica.key", environ) is None
    assert not (tmp_path / "replica.key").exists()


@pytest.mark.parametrize("by", ["SGLANG_API_KEY_FILE", "BALANCER_REPLICA_KEY"])
def test_a_file_that_was_given_wins(tmp_path: Path, by: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    one = made("sglang serve --model-path a/b")
    assert keys.for_replicas(one, tmp_path / "replica.key", {by: str(mine)}) == mine
    mine.write_text("")
    with pytest.raises(ConfigError, match="one line with a key"):
        keys.for_replicas(one, tmp_path / "replica.key", {by: str(mine)})


def test_sglang_gets_a_key_of_the_services_own(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    ours = made("sglang serve --model-path a/b")
    file = keys.for_replicas(ours, folder.replica_key_file, {})
    assert file == folder.replica_key_file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    engine = LocalEngine(folder)
    engine.prepare(ours, ANY)
    assert engine.fields == {"Authorization": f"Bearer {file.read_text()}"}
    with pytest.raises(ConfigError, match="and now `run:` brings one of its own: take it down and up again"):
        engine.fit(made("sglang serve --model-path a/b --api-key mine"))
    script = LocalEngine(folder)
    script.prepare(made("exec serve --port $GROUNDSERVE_PORT"), ANY)
    assert script.fields == {}
    for prepared in (engine, script):
        asyncio.run(prepared.close())


def test_scripts_that_are_no_sglang_work_without(groundserve: Groundserve, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    run = f"env | grep -i api_key > {seen} || true\n{LAB}"
    groundserve.up(groundserve.service("lab", run, replicas=1)).until_up()
    assert seen.read_text() == ""
    assert not (tmp_path / "state/groundserve/lab/replica.key").exists()
