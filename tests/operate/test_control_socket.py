import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from balancer.errors import ConfigError
from balancer.operate.state import control_socket
from balancer.operate.state.service_folder import AlreadyUp, ServiceFolder, folders, state_root


async def answer(request: Mapping[str, Any], say: control_socket.Say) -> Any:
    match request["do"]:
        case "add":
            say("adding")
            return request["a"] + request["b"]
        case "fail":
            raise ConfigError("that cannot be")
        case _:
            raise AssertionError


async def asked(path: Path, request: Mapping[str, Any], **more: Any) -> Any:
    async with control_socket.serving(path, answer):
        return await asyncio.to_thread(control_socket.ask, path, request, **more)


def test_answer_with_messages(tmp_path: Path) -> None:
    """A request is answered, and the messages sent meanwhile arrive."""
    said: list[str] = []
    assert asyncio.run(asked(tmp_path / "s", {"do": "add", "a": 1, "b": 2}, say=said.append)) == 3
    assert said == ["adding"]


def test_a_refusal_arrives_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="that cannot be"):
        asyncio.run(asked(tmp_path / "s", {"do": "fail"}))


def test_a_folder_with_a_name_too_long_for_a_socket_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    assert asyncio.run(asked(deep / "control.sock", {"do": "add", "a": 1, "b": 1})) == 2


def test_nobody_there_is_not_up(tmp_path: Path) -> None:
    with pytest.raises(control_socket.NotUp):
        control_socket.ask(tmp_path / "s", {"do": "add"})
    with pytest.raises(control_socket.NotUp):
        control_socket.ask(tmp_path / "nowhere/s", {"do": "add"})


def test_what_is_no_request_is_ignored(tmp_path: Path) -> None:
    async def scenario() -> int:
        async with control_socket.serving(tmp_path / "s", answer):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            writer.write(b"hello\n")
            assert await reader.read() == b""
            writer.close()
            sum_ = await asyncio.to_thread(control_socket.ask, tmp_path / "s", {"do": "add", "a": 2, "b": 2})
            return int(sum_)

    assert asyncio.run(scenario()) == 4


def test_a_connection_that_says_nothing_keeps_no_service_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "_REQUEST_TIMEOUT", 0.5)

    async def scenario() -> bytes:
        async with asyncio.timeout(30):
            async with control_socket.serving(tmp_path / "s", answer):
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
                # Who comes later is answered, so this one was let in.
                assert await asyncio.to_thread(control_socket.ask, tmp_path / "s", {"do": "add", "a": 1, "b": 1}) == 2
            said = await reader.read()
            writer.close()
            return said

    assert asyncio.run(scenario()) == b""


def test_an_answer_that_never_comes_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a client that has asked nothing yet."""
    monkeypatch.setattr(control_socket, "_LAST_ANSWERS", 0.1)

    async def scenario() -> list[bytes]:
        asked = asyncio.Event()

        async def never(_: Mapping[str, Any], __: control_socket.Say) -> None:
            asked.set()
            await asyncio.Event().wait()

        async with asyncio.timeout(5):
            async with control_socket.serving(tmp_path / "s", never):
                idle = await asyncio.open_unix_connection(str(tmp_path / "s"))
                waiting = await asyncio.open_unix_connection(str(tmp_path / "s"))
                waiting[1].write(b'{"do": "wait"}\n')
                await asked.wait()
            said = [await reader.read() for reader, _ in (idle, waiting)]
        for _, writer in (idle, waiting):
            writer.close()
        return said

    assert asyncio.run(scenario()) == [b"", b""]


def test_a_claimed_folder_is_up_until_its_holder_lets_go(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    assert not folder.is_up()
    with folder.claim() as lock:
        folder.sign(lock)
        assert folder.is_up()
        assert folder.holder() is not None
        with pytest.raises(AlreadyUp):
            ServiceFolder(tmp_path, "x").claim()
    assert not folder.is_up()
    assert folder.holder() is None
    assert [known.name for known in folders(tmp_path)] == ["x"]


def test_claiming_clears_the_logs_of_an_earlier_life(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    folder.replica_log(2).write_text("old")
    folder.claim().close()
    assert folder.replica_logs() == []


def test_logs_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    for id in (10, 9, 1):
        folder.replica_log(id).touch()
    assert [path.stem for path in folder.replica_logs()] == ["replica-1", "replica-9", "replica-10"]


def test_balancers_file_in_a_private_folder(tmp_path: Path) -> None:
    """The balancer's file is readable for a container's user, inside a folder that is private."""
    folder = ServiceFolder(tmp_path, "x")
    folder.claim().close()
    file = folder.write_service_file("a: 1")
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.parent.stat().st_mode & 0o777 == 0o755
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.write_service_file("a: 2")
    assert [(one.name, one.read_text()) for one in file.parent.iterdir()] == [("service.yaml", "a: 2")]


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"XDG_STATE_HOME": "/s"}, Path("/s/groundserve")),
        ({"XDG_STATE_HOME": "not/absolute"}, Path("~/.local/state/groundserve").expanduser()),
        ({}, Path("~/.local/state/groundserve").expanduser()),
    ],
)
def test_state_lies_where_xdg_says(environ: dict[str, str], root: Path) -> None:
    assert state_root(environ) == root
