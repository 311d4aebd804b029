"""Web pages: those of listed origins may use the endpoint, all others may neither read nor use it; and our own."""

import itertools
import re
from pathlib import Path

import httpx
import pytest

from tests.lab.replica import LabReplica
from tests.support.client import CHAT, chat, request
from tests.wire.running import each, on_uvloop, serving

ORIGIN = ("Origin", "https://app.test")
PREFLIGHT = (
    ORIGIN,
    ("Access-Control-Request-Method", "POST"),
    ("Access-Control-Request-Headers", "authorization, x-a"),
)
OPEN = {"a list": (("https://app.test", "https://b.test"), "https://app.test"), "all": (("*",), "*")}


@on_uvloop
async def test_every_link_of_the_admin_page_leads_somewhere() -> None:
    async with (
        LabReplica() as a,
        serving(a) as house,
        httpx.AsyncClient(base_url=house.balancer.admin_endpoint, trust_env=False) as client,
    ):
        links = set(re.findall(r'(?:href|src)="([^"#:]+)"', (await client.get("/")).text))
        assert {"status", "metrics", "openapi.json", "page/page.js"} <= links
        for link in links:
            assert (await client.get(f"/{link}")).status_code == 200, link


@pytest.mark.parametrize("row", **each(OPEN))
@on_uvloop
async def test_a_preflight_is_answered_here(row: tuple[tuple[str, ...], str]) -> None:
    origins, allowed = row
    async with LabReplica() as a, serving(a, cors_origins=origins) as house:
        client = await house.client()
        for path, letters in itertools.product((CHAT, "/health", "/nowhere"), (str, str.lower, str.upper)):
            await client.send(request("OPTIONS", path, headers=tuple((letters(n), v) for n, v in PREFLIGHT)))
            answer = await client.answer("OPTIONS")
            assert (answer.status, answer.body, answer.is_last) == (204, b"", False)
            assert answer.header("access-control-allow-origin") == allowed
            assert answer.header("access-control-allow-headers") == "authorization, x-a"
            assert "POST" in (answer.header("access-control-allow-methods") or "")
            assert answer.header("content-length") is None
            assert answer.header("vary") == (None if allowed == "*" else "Origin")
        assert a.seen.requests == []


@on_uvloop
async def test_cors_fields() -> None:
    """Answers and the balancer's errors carry its CORS fields, and the replica's own are dropped."""
    async with LabReplica() as a, serving(a, cors_origins=("https://app.test",), queue_size=0) as house:
        a.set(headers=(("Access-Control-Allow-Origin", "*"), ("access-control-expose-headers", "x-their")))
        big = ("X-Big", "x" * 70_000)
        for data, status in (
            (request(body=chat(), headers=(ORIGIN,)), 200),
            (request("GET", "/nowhere", headers=(ORIGIN,)), 404),
            (request("GET", "/health", headers=(ORIGIN,)), 200),
            (request("TRACE", CHAT, headers=(ORIGIN,)), 405),
            (request(headers=(ORIGIN, ("Content-Length", str(1 << 40)))), 413),
            (request("GET", "/v1/models", headers=(ORIGIN, big)), 431),
        ):
            answer = await house.ask(data)
            assert answer.status == status
            if status != 431:  # no field of that head was read
                assert answer.header("access-control-allow-origin") == "https://app.test", status
                exposed = (answer.header("access-control-expose-headers") or "").split(", ")
                assert {"X-Request-Id", "Retry-After", "X-Replica-Id", "X-Route-Reason"} <= {*exposed}


# Pages of origins that are not listed

EVIL = ("Origin", "https://evil.example")
OPEN_TO_ALL = (
    ("Access-Control-Allow-Origin", "*"), ("access-control-allow-credentials", "true"),
    ("Access-Control-Allow-Methods", "POST"), ("Access-Control-Allow-Headers", "*"), ("Access-Control-Max-Age", "9"),
    ("Access-Control-Expose-Headers", "*"), ("Access-Control-Allow-Private-Network", "true"),
)  # fmt: skip


@pytest.mark.parametrize("origins", [(), ("https://app.test",)], ids=["none named", "another named"])
@on_uvloop
async def test_nothing_that_a_replica_says_lets_a_page_read(origins: tuple[str, ...]) -> None:
    asking = (EVIL, *PREFLIGHT[1:])
    async with LabReplica(headers=OPEN_TO_ALL) as a, serving(a, cors_origins=origins) as house:
        for data, method in (
            (request("OPTIONS", CHAT, headers=asking), "OPTIONS"),
            (request("OPTIONS", CHAT, headers=(EVIL,)), "OPTIONS"),
            (request("GET", "/v1/models/lab", headers=(EVIL,)), "GET"),
            (request(body=chat(), headers=(EVIL,)), "POST"),
            (request(body=chat(), headers=(EVIL, ("Authorization", "Bearer x"))), "POST"),
            (request(body=chat(stream=True)), "POST"),
        ):
            answer = await house.ask(data, method)
            assert [name for name, _ in answer.headers if name.lower().startswith("access-control-")] == [], data


USING = {
    # fields, whether it may
    "no page": ((), True),
    "a page of another site": ((EVIL,), False),
    "one without an origin": ((("Origin", "null"),), False),
    "one that a browser tells of": ((("Sec-Fetch-Site", "cross-site"),), False),
    "one of a neighbour": ((("Origin", "http://b.wire.test"), ("Sec-Fetch-Site", "same-site")), False),
    "one on another port": ((("Origin", "http://wire.test:1"),), False),
    "two origins": ((("Origin", "http://wire.test"), EVIL), False),
    "one as a text": ((EVIL, ("Content-Type", "text/plain")), False),
    "our own": ((("Origin", "http://wire.test"),), True),
    "our own, through a proxy": ((EVIL, ("Sec-Fetch-Site", "same-origin")), True),
    "named": ((("Origin", "https://app.test"), ("Sec-Fetch-Site", "cross-site")), True),
    "with a key, which takes a preflight": ((EVIL, ("Authorization", "Bearer x")), True),
}


@pytest.mark.parametrize("row", **each(USING))
@on_uvloop
async def test_a_page_of_another_site_has_nothing_done(row: tuple[tuple[tuple[str, str], ...], bool]) -> None:
    fields, may = row
    async with LabReplica() as a, serving(a, cors_origins=("https://app.test",)) as house:
        answer = await house.ask(request(body=chat(), headers=fields))
        assert answer.status == (200 if may else 403)
        assert len(a.seen.requests) == may
        if not may:
            assert answer.error["code"] == "foreign_page"
            assert "cors_origins" in answer.error["message"]


@on_uvloop
async def test_where_all_pages_may_any_page_may() -> None:
    async with LabReplica() as a, serving(a, cors_origins=("*",)) as house:
        answer = await house.ask(request(body=chat(), headers=(EVIL,)))
        assert (answer.status, answer.header("access-control-allow-origin")) == (200, "*")


NAMES = {
    "a name that anybody can have": ("evil.example", 403),
    "with a port": ("evil.example:30001", 403),
    "with a dot": ("EVIL.example.", 403),
    "that begins as an address": ("127.0.0.1.evil.example", 403),
    "a named origin's": ("llm.example:8443", 200),
    "this machine": ("localhost:30001", 200),
    "a name on it": ("a.localhost", 200),
    "its address": ("127.0.0.1:30001", 200),
    "another one": ("192.168.1.2", 200),
    "in IPv6": ("[::1]:30001", 200),
    "a machine's": ("gpu1", 200),
    "a network's": ("gpu1.lan", 200),
}


@pytest.mark.parametrize("row", **each(NAMES))
@on_uvloop
async def test_a_name_that_was_made_to_point_here_gets_nothing(row: tuple[str, int]) -> None:
    host, status = row
    asked = request("GET", "/v1/models/lab").replace(b"wire.test", host.encode())
    async with LabReplica() as a, serving(a, cors_origins=("https://llm.example:8443",)) as house:
        answer = await house.ask(asked, "GET")
        assert answer.status == status
        assert len(a.seen.requests) == (status == 200)
        if status == 403:
            assert answer.error["code"] == "foreign_host"
            assert "trusted_proxies" in answer.error["message"]


@pytest.mark.parametrize(("published", "status"), [("127.0.0.1", 403), ("0.0.0.0", 200)])
@on_uvloop
async def test_where_a_container_is_published_counts(published: str, status: int) -> None:
    asked = request("GET", "/v1/models/lab").replace(b"wire.test", b"evil.example")
    async with LabReplica() as a, serving(a, config={"published": published}) as house:
        assert (await house.ask(asked, "GET")).status == status


@on_uvloop
async def test_a_trusted_proxy_and_a_keyed_service_have_any_name(tmp_path: Path) -> None:
    asked = request("GET", "/v1/models/lab", headers=(("Authorization", "Bearer good-key"),))
    asked = asked.replace(b"wire.test", b"llm.example")
    (tmp_path / "keys").write_text("good-key\n")
    async with LabReplica() as a:
        async with serving(a, trusted_proxies=("127.0.0.1",)) as house:
            assert (await house.ask(asked, "GET")).status == 200
        async with serving(a, config={"api_keys": tmp_path / "keys"}) as house:
            assert (await house.ask(asked, "GET")).status == 200
            assert (await house.ask(request(body=chat(), headers=(EVIL,)))).status == 401
