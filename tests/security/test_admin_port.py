"""The admin port: what web pages of others cannot do there, and what nobody can do without the key."""

import asyncio
import contextlib
from typing import Any

import httpx
import pytest

from balancer.__main__ import config_from, parse
from balancer.admin.guard import MAX_BODY, Guard, Message
from balancer.errors import ConfigError
from balancer.spec.loopback import is_loopback_name
from tests.lab.replica import LabReplica
from tests.support.client import Client
from tests.support.until import until
from tests.wire.running import House, each, on_uvloop, serving


async def ask(house: House, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=house.balancer.admin_endpoint, trust_env=False) as client:
        return await client.request(method, path, **more)


# Web pages of others


@pytest.mark.parametrize(
    "path", ["/", "/status", "/metrics", "/feed", "/docs", "/replicas/1/drain", "/playground/v1/models"]
)
@on_uvloop
async def test_a_name_that_was_made_to_point_here_gets_nothing(path: str) -> None:
    async with LabReplica() as lab, serving(lab) as house:
        port = house.balancer.admin_endpoint.rpartition(":")[2]
        for host in (
            f"evil.example:{port}",
            "evil.example",
            f"127.0.0.1.evil.example:{port}",
            "localhost.evil.example",
            "",
        ):
            answer = await ask(house, "POST" if "drain" in path else "GET", path, headers={"Host": host})
            assert answer.status_code == 403, host
            assert "http://localhost" in answer.json()["error"]["message"]
        assert not house.member("a").draining


@on_uvloop
async def test_every_name_of_this_machine_is_fine() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for host in (
            "localhost",
            "localhost:30002",
            "LOCALHOST:1",
            "127.0.0.1:30002",
            "127.9.9.9",
            "[::1]:30002",
            "a.localhost",
        ):
            assert (await ask(house, "GET", "/status", headers={"Host": host})).status_code == 200, host


FOREIGN = {
    "another site": "https://evil.example",
    "another port of this machine": "http://127.0.0.1:8080",
    "no origin at all": "null",
    "our own as a part": "http://evil.example/127.0.0.1",
}


@pytest.mark.parametrize("origin", **each(FOREIGN))
@on_uvloop
async def test_a_page_of_another_site_changes_nothing(origin: str) -> None:
    async with LabReplica() as lab, serving(lab) as house:
        headers = {"Origin": origin}
        simple = {**headers, "Content-Type": "text/plain"}  # what a form may send without asking first
        attempts = (
            ("POST", "/replicas/1/drain", headers, b""),
            ("PUT", "/replicas", headers, b'{"replicas": []}'),
            ("POST", "/playground/v1/chat/completions", simple, b'{"messages": []}'),
        )
        for method, path, fields, body in attempts:
            answer = await ask(house, method, path, headers=fields, content=body)
            assert answer.status_code == 403, path
            assert "access-control-allow-origin" not in answer.headers
        assert not house.member("a").draining
        assert lab.seen.requests == []


@on_uvloop
async def test_our_own_page_and_programs_without_a_page_may() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        own = {"Origin": house.balancer.admin_endpoint}
        assert (await ask(house, "POST", "/replicas/1/drain", headers=own)).status_code == 200
        assert house.member("a").draining
        assert (await ask(house, "POST", "/replicas/1/undrain")).status_code == 200
        assert not house.member("a").draining
        answer = await ask(house, "POST", "/playground/v1/chat/completions", headers=own, json={"messages": []})
        assert answer.status_code == 200


@on_uvloop
async def test_every_answer_carries_the_security_headers() -> None:
    async with LabReplica() as lab, serving(lab, config={"admin_key": "k"}) as house:
        for method, path, status in (
            ("GET", "/", 200),
            ("GET", "/page/page.js", 200),
            ("GET", "/page/none.js", 404),
            ("GET", "/page/../app.py", 404),
            ("GET", "/page/%2e%2e/guard.py", 404),
            ("GET", "/status", 200),
            ("GET", "/metrics", 200),
            ("GET", "/docs", 404),
            ("GET", "/openapi.json", 200),
            ("POST", "/replicas/1/drain", 401),
            ("POST", "/status", 405),
            ("GET", "/playground/v1/models", 200),
        ):
            answer = await ask(house, method, path)
            assert answer.status_code == status, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["referrer-policy"] == "no-referrer"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert "https:" not in policy


# Without the key


@on_uvloop
async def test_changes_want_the_admin_key() -> None:
    async with LabReplica() as lab, serving(lab, config={"admin_key": "open sesame"}) as house:
        for key, status in ((None, 401), ("open", 401), ("open sesame!", 401), ("open sesame", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for verb in ("drain", "undrain"):
                answer = await ask(house, "POST", f"/replicas/1/{verb}", headers=headers)
                assert answer.status_code == status, key
                assert "sesame" not in answer.text
        assert (await ask(house, "PUT", "/replicas", json={"replicas": []})).status_code == 401
        assert (await ask(house, "GET", "/status")).status_code == 200, "looking is free"
        assert "sesame" not in (await ask(house, "GET", "/metrics")).text


@on_uvloop
async def test_keys_and_usage_are_shown_to_who_has_the_key(tmp_path: Any) -> None:
    config = {"admin_key": "open sesame", "state": tmp_path / "state"}
    async with LabReplica() as lab, serving(lab, config=config) as house:
        for key, status in ((None, 401), ("wrong", 401), ("open sesame", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for path in ("/keys", "/usage"):
                assert (await ask(house, "GET", path, headers=headers)).status_code == status, (key, path)


@on_uvloop
async def test_without_a_key_nobody_changes_replicas(tmp_path: Any) -> None:
    """Nor issues keys: the balancer would lend its replica key to every user of the machine."""
    config = {"replica_key": "sk-replica", "state": tmp_path / "state"}
    async with LabReplica() as lab, serving(lab, config=config) as house:
        for method, path in (("POST", "/everywhere/flush_cache"), ("POST", "/keys/a"), ("DELETE", "/keys/a")):
            answer = await ask(house, method, path)
            assert answer.status_code == 403, path
            assert "--admin-key" in answer.json()["error"]["message"]
        assert lab.seen.requests == []
        assert (await ask(house, "GET", "/usage")).status_code == 200, "on loopback, looking is free"


async def through(_: Message, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"through"})


@pytest.mark.parametrize(
    ("is_loopback", "has_key", "method", "path", "status"),
    [
        (True, False, "POST", "/replicas/1/drain", 200),
        (True, True, "POST", "/replicas/1/drain", 200),
        (False, True, "POST", "/replicas/1/drain", 200),
        # As in a container: reachable from elsewhere, and nobody could be told apart.
        (False, False, "POST", "/replicas/1/drain", 403),
        (False, False, "PUT", "/replicas", 403),
        (False, False, "DELETE", "/services/a", 403),
        (False, False, "GET", "/status", 200),
        (False, False, "GET", "/keys", 403),
        (False, False, "GET", "/usage", 403),
        (True, False, "GET", "/usage", 200),
        (False, False, "GET", "/v1/organization/usage/completions", 403),
        (True, False, "GET", "/v1/organization/usage/completions", 200),
        (False, True, "GET", "/v1/organization/usage/completions", 200),
    ],
)
def test_where_others_reach_the_port_changes_need_a_key_to_exist(
    is_loopback: bool, has_key: bool, method: str, path: str, status: int
) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(Guard(through, is_loopback, has_key))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30002") as client:
            answer = await client.request(method, path)
        assert answer.status_code == status
        if status == 403:
            assert "--admin-key" in answer.json()["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("has_key", "is_private", "host", "status"),
    [
        # A container's port, published on the host's loopback
        (False, True, "evil.example:30002", 403),
        (True, True, "evil.example:30002", 403),
        (True, True, "127.0.0.1.evil.example", 403),
        (True, True, "\xff.example", 403),
        (False, True, "localhost:30002", 200),
        (False, True, "172.18.0.2:30002", 200),
        (False, True, "balancer:30002", 200),
        # Published for others, or no container's: with a key, public names are how they reach it.
        (False, False, "gpu1.example.org:30002", 403),
        (False, False, "192.168.1.2:30002", 200),
        (False, False, "gpu1:30002", 200),
        (False, False, "lab.serving.svc:30002", 200),
        (False, False, "lab.serving.svc.example.org:30002", 403),
        (True, False, "gpu1.example.org:30002", 200),
    ],
)
def test_beyond_loopback_public_names_get_nothing_either(
    has_key: bool, is_private: bool, host: str, status: int
) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(Guard(through, False, has_key, is_private))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30002") as client:
            answer = await client.get("/status", headers={b"Host": host.encode("latin-1")})
        assert answer.status_code == status
        if status == 403:
            assert "http://localhost" in answer.json()["error"]["message"]

    asyncio.run(main())


@on_uvloop
async def test_the_playground_is_no_way_around_the_api_keys(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("sk-right\n")
    config = {"api_keys": tmp_path / "keys", "replica_key": "sk-replica"}
    async with LabReplica() as lab, serving(lab, config=config) as house:
        for key, status in (("", 401), ("sk-wrong", 401), ("sk-right", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            for method, path in (("GET", "/playground/v1/models"), ("POST", "/playground/v1/chat/completions")):
                answer = await ask(house, method, path, headers=headers, json={"messages": []})
                assert answer.status_code == status, (key, path)
                assert "sk-" not in answer.text
        # Nothing else of the endpoint, or of anybody, can be reached through it.
        for path in ("/playground/flush_cache", "/playground/v1/../../flush_cache", "/playground/http://127.0.0.1:1/"):
            assert (await ask(house, "POST", path, headers={"Authorization": "Bearer sk-right"})).status_code in (
                404,
                405,
            )
        assert {request.target for request in lab.seen.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("listen", "admin", "is_closed"),
    [("127.0.0.1", "0.0.0.0", True), ("0.0.0.0", "0.0.0.0", False), ("127.0.0.1", "127.0.0.1", False)],
)
@on_uvloop
async def test_the_playground_is_no_way_to_an_endpoint_on_loopback(
    listen: str, admin: str, is_closed: bool, tmp_path: Any
) -> None:
    """Unless that wants a key, which may be issued at any time."""
    config = {"listen": (listen, 0), "admin": (admin, 0), "admin_key": "open sesame", "state": tmp_path / "state"}
    async with LabReplica() as lab, serving(lab, config=config) as house:
        port = house.balancer.admin_endpoint.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for method, path in (("GET", "v1/models"), ("POST", "v1/chat/completions")):
                answer = await client.request(method, f"/playground/{path}", json={"messages": []})
                assert answer.status_code == (403 if is_closed else 200), path
                assert ("--api-keys" in answer.text) == is_closed
            assert (await client.get("/status")).status_code == 200
            headers = {"Authorization": "Bearer open sesame"}
            key = (await client.post("/keys/alice", json={}, headers=headers)).json()["key"]
            headers = {"Authorization": f"Bearer {key}"}
            answer = await client.post("/playground/v1/chat/completions", json={"messages": []}, headers=headers)
            assert answer.status_code == 200
        assert len(lab.seen.requests) == (1 if is_closed else 2)


# Huge and slow


@on_uvloop
async def test_large_bodies_are_refused_before_they_are_read() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for fields in ((("Content-Length", str(MAX_BODY + 1)),), (("Transfer-Encoding", "chunked"),)):
            client = await Client.open(house.balancer.admin_endpoint)
            head = "".join(f"{name}: {value}\r\n" for name, value in fields)
            await client.send(f"PUT /replicas HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
            assert (await client.answer("PUT")).status == 413
            client.leave()


@on_uvloop
async def test_a_head_without_end_is_cut_off() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        client = await Client.open(house.balancer.admin_endpoint)
        await client.send(b"GET /status HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(32):
                await client.send(b"a" * (64 << 10))
        assert await client.rest() == b""
        client.leave()


@on_uvloop
async def test_it_has_room_for_64_viewers_and_says_so_to_the_next() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        clients = [await Client.open(house.balancer.admin_endpoint) for _ in range(65)]
        for client in clients[:64]:
            await client.send(b"GET /feed HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.until(b"event: state")
        await clients[64].send(b"GET /feed HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await clients[64].answer("GET")).status == 503
        for client in clients:
            client.leave()
        await until(lambda: not house.balancer.services.feeds[0].is_full)


# What the start refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--listen 0.0.0.0:0", "--api-keys"),
        ("--listen [::]:0", "--api-keys"),
        ("--listen gpu-box:0", "--open"),
        ("--open --admin 0.0.0.0:0 --listen 127.0.0.1:0", None),
        ("--listen 127.0.0.1:0 --admin 0.0.0.0:0", "--admin-key"),
        ("--listen 0.0.0.0:0 --open", None),
        ("--listen 127.0.0.1:0 --admin [::1]:0", None),
        ("--tls-cert x", "--tls-key"),
        ("--tls-key x", "--tls-cert"),
    ],
)
def test_beyond_loopback_the_start_wants_to_know_who_may(arguments: str, said: str | None) -> None:
    options = parse(arguments.split())
    if said is None:
        config_from(options)
        return
    with pytest.raises(ConfigError, match=said):
        config_from(options)


@pytest.mark.parametrize(
    ("arguments", "is_private"),
    [
        ("", (True, True)),
        ("--listen 0.0.0.0:1 --admin 0.0.0.0:2", (False, False)),
        ("--listen 0.0.0.0:1 --admin 0.0.0.0:2 --published 127.0.0.1 --admin-published 127.0.0.1", (True, True)),
        ("--listen 0.0.0.0:1 --admin 0.0.0.0:2 --published 0.0.0.0 --admin-published 127.0.0.1", (False, True)),
        ("--listen 0.0.0.0:1 --admin 0.0.0.0:2 --published [::1] --admin-published localhost", (True, True)),
    ],
)
def test_a_container_knows_who_reaches_its_ports(arguments: str, is_private: tuple[bool, bool]) -> None:
    config = config_from(parse(["--open", *arguments.split()]))
    assert (config.is_for_this_machine, config.is_admin_for_this_machine) == is_private


def test_names_of_this_machine() -> None:
    for name in ("localhost", "localhost:1", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:80", "x.localhost"):
        assert is_loopback_name(name), name
    for name in (
        "",
        ":80",
        "0.0.0.0",
        "[::]",
        "10.0.0.1",
        "localhost.com",
        "127.0.0.1.com",
        "[::1",
        "a@localhost.com",
        "1",
    ):
        assert not is_loopback_name(name), name
