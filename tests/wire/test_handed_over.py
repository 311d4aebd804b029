"""A balancer with inherited sockets: it accepts on them, then stops, and another balancer accepts on them."""

import asyncio
import contextlib
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from balancer.__main__ import main
from tests.lab.replica import LabReplica
from tests.support.client import Client, chat, request
from tests.support.program import BalancerProgram
from tests.support.until import until
from tests.wire.process import BalancerProcess, running
from tests.wire.running import SOON, on_uvloop

STREAM = request(body=chat(stream=True, tokens=60))


@contextlib.asynccontextmanager
async def supervised(
    *replicas: str, arguments: tuple[str, ...] = (), **settings: object
) -> AsyncIterator[tuple[BalancerProcess, socket.socket, socket.socket]]:
    """A balancer, and the listening sockets that the test hands over to it."""
    with socket.create_server(("127.0.0.1", 0)) as endpoint, socket.create_server(("127.0.0.1", 0)) as admin:
        descriptors = (endpoint.fileno(), admin.fileno())
        flags = ("--listen-fd", str(descriptors[0]), "--admin-fd", str(descriptors[1]), *arguments)
        async with running(*replicas, arguments=flags, pass_fds=descriptors, **settings) as balancer:
            yield balancer, endpoint, admin


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@on_uvloop
async def test_it_serves_on_both_sockets_and_says_where_they_are() -> None:
    async with LabReplica() as a, supervised(a.url) as (balancer, endpoint, admin):
        assert (balancer.url, balancer.admin_url) == (url_of(endpoint), url_of(admin))
        client = await balancer.client()
        await client.send(request(body=chat()))
        assert (await client.answer()).status == 200


@on_uvloop
async def test_sigterm_again_is_no_hurry_and_sigint_is() -> None:
    """A balancer gets SIGTERM twice: systemd sends it to each process of a unit, and the supervisor passes it on."""
    async with LabReplica(token_interval=0.02) as a, supervised(a.url, drain_grace=0, drain_timeout=60) as (one, _, _):
        client, endless = await one.client(), await one.client()
        await client.send(STREAM)
        await endless.send(request(body=chat(stream=True, tokens=100_000)))
        for streaming in (client, endless):
            await streaming.until(b"t00")
        for _ in range(3):
            one.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
        await client.until(b"data: [DONE]\n\n")
        one.signal(signal.SIGINT)
        assert b'"stream_broken"' in await endless.rest()
        assert await one.end() == 0


@on_uvloop
async def test_old_balancer_after_a_takeover() -> None:
    """After a takeover, the old balancer accepts on neither port and finishes its streams."""
    async with LabReplica(token_interval=0.02) as a, supervised(a.url, drain_timeout=60) as (old, endpoint, admin):
        client = await old.client()
        await client.send(STREAM)
        await client.until(b"t00")
        assert len(listeners_of(old)) == 2
        old.signal(signal.SIGUSR1)
        await until(lambda: not listeners_of(old), "both are closed")
        early = await Client.open(url_of(endpoint))  # nobody accepts it yet
        await early.send(request(body=chat()))
        asking = await Client.open(url_of(admin))
        await asking.send(b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        descriptors = (endpoint.fileno(), admin.fileno())
        flags = ("--listen-fd", str(descriptors[0]), "--admin-fd", str(descriptors[1]))
        with BalancerProgram([a.url], *flags, has_own_errors=True, pass_fds=descriptors) as new:
            await until(new.is_listening, "the next one listens", SOON * 4)
            for waiting in (early, asking):
                assert (await waiting.answer()).status == 200
                waiting.leave()
            await client.until(b"data: [DONE]\n\n")
            assert await old.end() == 0


def listeners_of(balancer: BalancerProcess) -> list[str]:
    """The listening sockets that the process has open."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {f"socket:[{row[9]}]" for row in table if row[3] == "0A"}
    names = (str(link.readlink()) for link in Path(f"/proc/{balancer.process.pid}/fd").iterdir())
    return [name for name in names if name in listening]


@on_uvloop
async def test_clients_wait_for_a_replica() -> None:
    """Clients wait for a replica to become ready, but not for ever."""
    async with LabReplica() as a:
        a.set(ready=503, health=503)
        flags = ("--accept-when-ready", "60")
        with socket.create_server(("127.0.0.1", 0)) as endpoint:
            flags = ("--listen-fd", str(endpoint.fileno()), *flags)
            with BalancerProgram([a.url], *flags, pass_fds=[endpoint.fileno()]):
                early = await Client.open(url_of(endpoint))
                await early.send(request("GET", "/v1/models"))
                await a.seen.until(lambda seen: len(seen.probes) > 2)  # it has been probed and is not ready
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(early.more(), 0.2)
                a.set(ready=200, health=200)
                assert (await early.answer("GET")).status == 200
                early.leave()


@pytest.mark.parametrize("flag", ["--listen-fd", "--admin-fd"])
def test_what_is_no_socket_that_listens_is_refused_in_one_line(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryFile() as file, socket.socket() as deaf:
        for descriptor, why in ((file.fileno(), "no socket was handed over by that number"), (deaf.fileno(), "listen")):
            assert main([flag, str(descriptor)]) == 1
            said = capfd.readouterr().err
            assert said.startswith(f"groundserve: {flag} {descriptor}: ")
            assert why in said
            assert said.count("\n") == 1


def test_a_socket_beyond_loopback_wants_keys_as_an_address_does(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        assert main(["--listen-fd", str(listener.fileno())]) == 1
    assert "is not loopback: give --api-keys FILE" in capfd.readouterr().err
