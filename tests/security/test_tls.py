"""TLS: the endpoint's own, and towards https replicas."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from balancer.__main__ import config_from, parse
from balancer.contract.listing import ReplicaListing
from balancer.contract.words import Status
from balancer.errors import ConfigError
from balancer.relay import tls_listener
from balancer.relay.downstream import LINGER, MAX_UNSENT, ClientConnection
from balancer.relay.tls import Certificate, replica_context
from tests.lab.replica import LabReplica
from tests.security.certificates import Authority, Pair, encrypted
from tests.support.client import CHAT, chat, request
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving

BODY = {"model": "lab", "messages": [], "max_tokens": 3}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.sign("localhost", "DNS:localhost", "IP:127.0.0.1")


def copied(pair: Pair, folder: Path) -> Pair:
    """A pair that a test may change."""
    mine = Pair(folder / "tls.crt", folder / "tls.key")
    mine.cert.write_bytes(pair.cert.read_bytes())
    mine.key.write_bytes(pair.key.read_bytes())
    return mine


def replace(path: Path, by: Path) -> None:
    path.write_bytes(by.read_bytes())


def tls(pair: Pair) -> dict[str, Path]:
    return {"tls_cert": pair.cert, "tls_key": pair.key}


def secured(pair: Pair, *replicas: LabReplica, **config: Any) -> Any:
    return serving(*replicas, config={**tls(pair), **config})


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.pair.cert)


@contextlib.asynccontextmanager
async def client(house: House, authority: Authority) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=house.url, verify=trusting(authority), trust_env=False, timeout=10) as made:
        yield made


def shake_hands(url: str, context: ssl.SSLContext) -> tuple[str | None, str, dict[str, Any]]:
    """Protocol, cipher and certificate of a fresh connection; raises ssl.SSLError or OSError."""
    parts = urlsplit(url)
    assert parts.hostname
    plain = socket.create_connection((parts.hostname, parts.port or 443), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
        cipher = secure.cipher()
        assert cipher
        return secure.version(), cipher[0], dict(secure.getpeercert() or {})


async def subject(house: House, authority: Authority) -> str:
    """The name on the certificate that new connections see."""
    _, _, certificate = await asyncio.to_thread(shake_hands, house.url, trusting(authority))
    return str(dict(part[0] for part in certificate["subject"])["commonName"])


async def renewed_to(name: str, house: House, authority: Authority) -> None:
    """Waits until new connections see that certificate."""
    async with asyncio.timeout(10):
        while await subject(house, authority) != name:  # noqa: ASYNC110 - only a handshake can tell
            await asyncio.sleep(0.05)


@on_uvloop
async def test_the_endpoint_speaks_https(authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, secured(pair, lab) as house, client(house, authority) as https:
        assert house.url.startswith("https://127.0.0.1:")
        for body in (BODY, BODY | {"stream": True}):
            answer = await https.post(CHAT, json=body)
            assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
        assert lab.seen.last.header("x-forwarded-proto") == "https"
        large = b"x" * (5 << 20)
        echoed = await https.post("/v1/models/echo", content=large)
        assert echoed.content == large
        status = (await https.get(house.balancer.admin_endpoint + "/status")).json()
        assert status["service"]["endpoint"] == house.url


@on_uvloop
async def test_unread_session_tickets_are_no_fault(authority: Authority, pair: Pair) -> None:
    """A client is not cut for unread data between its handshake and its first request.

    Until then TLS holds session tickets for it, which it has had no time to take.
    """

    class SweptAtOnce(set[ClientConnection]):
        def add(self, connection: ClientConnection) -> None:
            super().add(connection)
            doors.loop.call_soon(lambda: doors.sweep(doors.loop.time()))

    async with LabReplica() as lab, secured(pair, lab) as house, client(house, authority) as https:
        doors = house.balancer.doors
        doors.connections = SweptAtOnce()  # type: ignore[assignment]
        assert (await https.post(CHAT, json=BODY)).status_code == 200


@on_uvloop
async def test_a_client_that_leaves_is_noticed_through_tls_too(authority: Authority, pair: Pair) -> None:
    async with LabReplica(token_interval=0.05) as lab, secured(pair, lab) as house, client(house, authority) as https:
        async with https.stream("POST", CHAT, json=BODY | {"stream": True, "max_tokens": 500}) as answer:
            async for _ in answer.aiter_bytes():
                break
        await lab.seen.until(lambda seen: seen.generations_aborted == 1, timeout=2)
        await house.at_rest()


def client_context(
    authority: Authority, oldest: ssl.TLSVersion, newest: ssl.TLSVersion, ciphers: str
) -> ssl.SSLContext:
    context = trusting(authority)
    context.minimum_version, context.maximum_version = oldest, newest
    context.set_ciphers(ciphers + ":@SECLEVEL=0")
    return context


V1_0, V1_1, V1_2, V1_3 = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3

SPOKEN = {"1.3": (V1_2, V1_3, "DEFAULT", "TLSv1.3"), "1.2": (V1_2, V1_2, "DEFAULT", "TLSv1.2")}
NOT_SPOKEN = {
    "1.0": (V1_0, V1_0, "ALL"),
    "1.1": (V1_1, V1_1, "ALL"),
    "1.2 with CBC": (V1_2, V1_2, "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA"),
    "1.2 without forward secrecy": (V1_2, V1_2, "AES128-GCM-SHA256"),
    "1.2 without a certificate": (V1_2, V1_2, "aNULL"),
}


@pytest.mark.parametrize("row", **each(SPOKEN))
@on_uvloop
async def test_modern_tls_is_spoken(row: tuple[Any, Any, str, str], authority: Authority, pair: Pair) -> None:
    oldest, newest, ciphers, version = row
    async with LabReplica() as lab, secured(pair, lab) as house:
        context = client_context(authority, oldest, newest, ciphers)
        context.set_alpn_protocols(["h2", "http/1.1"])
        spoken, cipher, _ = await asyncio.to_thread(shake_hands, house.url, context)
        assert spoken == version
        assert "GCM" in cipher or "CHACHA20" in cipher


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("row", **each(NOT_SPOKEN))
@on_uvloop
async def test_what_is_broken_or_old_is_not_spoken(row: tuple[Any, Any, str], authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, secured(pair, lab) as house:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(shake_hands, house.url, client_context(authority, *row))
        assert (await asyncio.to_thread(shake_hands, house.url, trusting(authority)))[0] == "TLSv1.3"


NO_TLS = {
    "plain HTTP": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": bytes(range(256)) * 8,
    "an endless hello": b"\x16\x03\x01\xff\xff" + b"\0" * 70000,
    "nothing": b"",
}


@pytest.mark.parametrize("data", **each(NO_TLS))
@on_uvloop
async def test_who_speaks_no_tls_is_cut_off_without_fuss(data: bytes, authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, secured(pair, lab) as house:
        wire = await house.client()
        if data:
            await wire.send(data)
            assert b"HTTP/" not in await wire.rest()
        wire.leave("reset")
        async with client(house, authority) as https:
            assert (await https.get("/v1/models")).status_code == 200
        assert house.complaints == []


@on_uvloop
async def test_a_handshake_has_little_time(authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_listener, "HANDSHAKE_TIMEOUT", 0.3)
    async with LabReplica() as lab, secured(pair, lab) as house:
        parts = urlsplit(house.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"\x16\x03\x01\x02\x00\x01")  # a hello that never ends
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()
        assert (await asyncio.to_thread(shake_hands, house.url, trusting(authority)))[0] == "TLSv1.3"


@on_uvloop
async def test_one_client_has_only_so_many_handshakes_under_way(authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, serving(lab, config=tls(pair), max_connections_per_client=3) as house:
        parts = urlsplit(house.url)
        others = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(3)]
        for _, writer in others:
            writer.write(b"\x16\x03\x01\x02\x00\x01")
        await asyncio.sleep(0.1)
        reader, fourth = await asyncio.open_connection(parts.hostname, parts.port)
        assert await asyncio.wait_for(reader.read(), 2) == b"", "the fourth is let go at once"
        fourth.close()
        with pytest.raises(OSError):
            await asyncio.to_thread(shake_hands, house.url, trusting(authority))
        others[0][1].transport.abort()
        await asyncio.sleep(0.1)
        assert (await asyncio.to_thread(shake_hands, house.url, trusting(authority)))[0] == "TLSv1.3"
        for _, writer in others[1:]:
            writer.transport.abort()
        async with client(house, authority) as https:
            assert (await https.get("/v1/models")).status_code == 200
        assert house.complaints == []


@on_uvloop
async def test_trusted_proxy_has_no_handshake_limit(authority: Authority, pair: Pair) -> None:
    """A trusted proxy may have any number of handshakes in progress."""
    settings: Any = {"max_connections_per_client": 1, "trusted_proxies": ("127.0.0.1",)}
    async with LabReplica() as lab, serving(lab, config=tls(pair), **settings) as house:
        parts = urlsplit(house.url)
        others = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert (await asyncio.to_thread(shake_hands, house.url, trusting(authority)))[0] == "TLSv1.3"
        for _, writer in others:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def slow_client(house: House, authority: Authority) -> AsyncIterator[tuple[ssl.SSLSocket, ClientConnection]]:
    """A client and its connection in the balancer, with hardly any of the kernel's buffers between them."""
    parts = urlsplit(house.url)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(20)
        await asyncio.to_thread(plain.connect, (parts.hostname, parts.port))
        with await asyncio.to_thread(trusting(authority).wrap_socket, plain, server_hostname="localhost") as secure:
            await until(lambda: house.balancer.doors.connections)
            (connection,) = house.balancer.doors.connections
            ours = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            yield secure, connection


@on_uvloop
async def test_who_takes_the_last_answer_late_gets_all_of_it(authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, secured(pair, lab) as house, slow_client(house, authority) as (client, _):
        body = b"x" * (32 << 10)
        asked = request(path="/v1/models/echo", body=body, headers=(("Connection", "close"),))
        sent = asyncio.ensure_future(asyncio.to_thread(client.sendall, asked))
        await lab.seen.until(lambda seen: len(seen.requests) == 1)
        await sent
        await asyncio.sleep(LINGER + 1)

        def rest() -> bytes:
            got = b""
            while piece := client.recv(1 << 16):
                got += piece
            return got

        assert (await asyncio.to_thread(rest)).endswith(body)


@on_uvloop
async def test_little_is_held_for_who_takes_nothing(authority: Authority, pair: Pair) -> None:
    async with (
        LabReplica(body_mib=64) as lab,
        secured(pair, lab) as house,
        slow_client(house, authority) as (client, connection),
    ):
        await asyncio.to_thread(client.sendall, request(body=chat()))
        await until(lambda: connection._is_blocked)
        await asyncio.sleep(0.3)
        held = connection._transport.get_write_buffer_size()  # type: ignore[union-attr]
        assert MAX_UNSENT <= held < MAX_UNSENT + (320 << 10), "one read of the replica's may be on its way"
        assert lab.seen.last.bytes_sent < 16 << 20, "the replica is held back"


@on_uvloop
async def test_renewed_certificate(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    """A renewed certificate takes effect while existing connections go on."""
    mine = copied(pair, tmp_path)
    renewed = authority.sign("renewed", "DNS:localhost", "IP:127.0.0.1")
    async with LabReplica(token_interval=0.1) as lab, secured(mine, lab) as house, client(house, authority) as https:
        assert await subject(house, authority) == "localhost"
        body = BODY | {"stream": True, "max_tokens": 8}
        async with https.stream("POST", CHAT, json=body) as answer:
            copied(renewed, tmp_path)
            await renewed_to("renewed", house, authority)
            assert (await answer.aread()).endswith(b"data: [DONE]\n\n")
        # The page's own way to the endpoint trusts the new one as well.
        models = await https.get(house.balancer.admin_endpoint + "/playground/v1/models")
        assert models.status_code == 200


@on_uvloop
async def test_a_pair_that_does_not_fit_leaves_the_old_certificate(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    mine = copied(pair, tmp_path)
    other = authority.sign("other", "DNS:localhost")
    async with LabReplica() as lab, secured(mine, lab) as house:
        # Half of a renewal: the certificate is there, its key not yet.
        replace(mine.cert, other.cert)
        await until(lambda: house.complaints)
        assert "the certificate stays as it was" in house.complaints[0]
        house.complaints.clear()
        assert await subject(house, authority) == "localhost"
        replace(mine.key, other.key)
        await renewed_to("other", house, authority)


def test_files_as_windows_saves_them_are_used(pair: Pair, authority: Authority, tmp_path: Path) -> None:
    saved = []
    for name, path in (("cert", pair.cert), ("key", pair.key), ("ca", authority.pair.cert)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        saved.append(tmp_path / name)
    cert, key, ca = saved
    assert Certificate(cert, key).context.get_ciphers()
    assert replica_context(ca).cert_store_stats()["x509"] == 1


def test_what_cannot_be_used_is_said_in_one_line(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    (noise := tmp_path / "noise").write_text("no PEM")
    for cert, key, said in (
        (pair.cert, authority.pair.key, "key values mismatch"),
        (noise, pair.key, "--tls-cert"),
        (pair.cert, noise, "--tls-key"),
        (tmp_path / "nowhere", pair.key, "No such file"),
        (pair.cert, encrypted(pair, tmp_path).key, "the key is encrypted"),
    ):
        with pytest.raises(ConfigError) as refusal:
            Certificate(cert, key)
        assert said in str(refusal.value)
        assert "\n" not in str(refusal.value)
    for authorities in (noise, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="--replica-ca"):
            replica_context(authorities)


# Towards the replicas


@contextlib.asynccontextmanager
async def in_front_of(lab: LabReplica, pair: Pair) -> AsyncIterator[int]:
    """The port of a TLS server that passes all on to a lab replica."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    tasks: set[asyncio.Task[None]] = set()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        there, back = await asyncio.open_connection(lab.host, lab.port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def one(url: str, **config: Any) -> dict[str, Any]:
    return {"replicas": (ReplicaListing("secure", url),), **config}


@on_uvloop
async def test_https_replicas_are_probed_and_served_from(authority: Authority, pair: Pair) -> None:
    async with LabReplica() as lab, in_front_of(lab, pair) as port:
        config = one(f"https://localhost:{port}", replica_ca=authority.pair.cert)
        async with serving(ready=1, config=config) as house, httpx.AsyncClient(base_url=house.url) as http:
            for _ in range(3):
                answer = await http.post(CHAT, json=BODY | {"stream": True})
                assert answer.status_code == 200
                assert answer.text.endswith("data: [DONE]\n\n")
            assert lab.seen.last.header("host") == f"localhost:{port}"
            assert (await http.get("/server_info")).json()["random_seed"] == lab.random_seed


@pytest.mark.parametrize("reason", ["unknown authority", "another name"])
@on_uvloop
async def test_a_replica_that_is_not_who_it_should_be_gets_nothing(
    reason: str, authority: Authority, tmp_path: Path
) -> None:
    names = ("DNS:elsewhere.example",) if reason == "another name" else ("DNS:localhost", "IP:127.0.0.1")
    signer = Authority(tmp_path) if reason == "unknown authority" else authority
    async with LabReplica() as lab, in_front_of(lab, signer.sign("replica", *names)) as port:
        config = one(f"https://localhost:{port}", replica_ca=authority.pair.cert, replica_key="sk-the-replicas")
        async with serving(ready=0, config=config) as house, httpx.AsyncClient(base_url=house.url) as http:
            (member,) = house.balancer.service.fleet.members.values()
            await until(lambda: member.ready.failures_total >= 2, within=20)
            assert member.status(house.balancer.loop.time()) is Status.STARTING
            house.complaints[:] = [said for said in house.complaints if "sk-the-replicas" in said]
            assert (await http.get("/health")).status_code == 503
            assert lab.seen.requests == []
            assert lab.seen.probes == []


def test_tls_of_the_service_file(pair: Pair, tmp_path: Path) -> None:
    """The service file's tls: configures the endpoint, and flags take precedence over it."""
    service = tmp_path / "service.yaml"
    service.write_text(f"service:\n  tls: {{certfile: {pair.cert}, keyfile: {pair.key}}}\nrun: x\n")
    arguments = ["--service", str(service), "--listen", "127.0.0.1:0"]
    config = config_from(parse(arguments))
    assert (config.tls_cert, config.tls_key) == (pair.cert, pair.key)
    config = config_from(parse([*arguments, "--tls-cert", "/other.crt", "--tls-key", "/other.key"]))
    assert (config.tls_cert, config.tls_key) == (Path("/other.crt"), Path("/other.key"))
