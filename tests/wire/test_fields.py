"""Header fields: which pass byte for byte, which are dropped, and which the balancer sets."""

import itertools
import re
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.wire.client import CHAT, chat, request
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

GET = ("GET", "/v1/models/lab")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


@pytest.mark.parametrize("body", [None, b"a body"], ids=["", "with a body"])
@pytest.mark.parametrize("method", METHODS)
@in_house
async def test_every_method_passes_with_and_without_a_body(house: House, method: str, body: bytes | None) -> None:
    client = await house.client()
    for _ in range(2):
        await client.send(request(method, "/v1/files/x?a=%2F", body))
        answer = await client.answer(method)
        assert (answer.status, answer.is_last) == (200, False)
        assert answer.body == (b"" if method == "HEAD" else body or b"")
        seen = house.replicas[0].seen.last
        assert (seen.method, seen.target, seen.version, seen.body) == (
            method,
            "/v1/files/x?a=%2F",
            "HTTP/1.1",
            body or b"",
        )


@in_house
async def test_a_request_reaches_the_replica_byte_for_byte_with_what_the_balancer_adds(house: House) -> None:
    fields = (
        ("Accept", "text/event-stream"), ("X-Odd", "caf\xe9 \t| tail"), ("x-odd", "again"), ("Cookie", "a=1"),
        ("Cookie", "b=2"), ("X-Empty", ""), ("User-Agent", "wire"), ("Authorization", "Bearer k"),
        ("Content-Type", "application/json"), ("X-Request-Id", "mine.1-2_3"),
    )  # fmt: skip
    body = chat()
    await house.ask(request(body=body, headers=fields))
    assert house.replicas[0].seen.last.headers == [
        ("Host", house.replicas[0].url.removeprefix("http://")),
        *fields[:7],
        fields[8],
        ("X-Request-Id", "mine.1-2_3"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "wire.test"),
        ("Authorization", "Bearer k"),
        ("Content-Length", str(len(body))),
    ]


DROPPED = {
    "hop by hop": (
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authorization", "Basic x"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers"),
        ("Trailer", "X-T"),
        ("Upgrade", "h2c"),
        ("HTTP2-Settings", "AA"),
        ("Proxy-Authenticate", "x"),
    ),
    "named by Connection": (("Connection", "X-Mine, keep-alive"), ("X-Mine", "1"), ("x-mine", "2")),
    "named by two Connections": (
        ("Connection", "X-Mine"),
        ("connection", "X-Other"),
        ("X-Mine", "1"),
        ("X-Other", "2"),
    ),
    "named in other letters": (("Connection", "x-MINE"), ("X-Mine", "1")),
}


@pytest.mark.parametrize("fields", **each(DROPPED))
@in_house
async def test_fields_of_the_connection_do_not_pass(house: House, fields: tuple[tuple[str, str], ...]) -> None:
    await house.ask(request(*GET, headers=(*fields, ("X-Kept", "1"))), "GET")
    names = {name.lower() for name, _ in house.replicas[0].seen.last.headers}
    assert names == {"host", "x-kept", "x-request-id", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}


@in_house
async def test_connection_cannot_take_away_what_the_balancer_sets(house: House) -> None:
    named = "x-forwarded-for, x-forwarded-proto, x-request-id, host, authorization, content-length, x-replica-id"
    await house.ask(request(headers=(("Connection", named), ("Authorization", "Bearer k")), body=chat()))
    seen = house.replicas[0].seen.last
    assert seen.header("x-forwarded-for") == "127.0.0.1"
    assert seen.header("authorization") == "Bearer k"
    assert seen.id


# Who asked

FORWARDED = (
    ("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-For", "198.51.100.2"), ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "public.test"),
)  # fmt: skip
TRUST = {
    "nobody": ((), "127.0.0.1", "http", "wire.test"),
    "others": (("10.0.0.0/8", "::1"), "127.0.0.1", "http", "wire.test"),
    "this one": (("127.0.0.1",), "203.0.113.7, 198.51.100.2, 127.0.0.1", "https", "public.test"),
    "its network": (("127.0.0.0/8",), "203.0.113.7, 198.51.100.2, 127.0.0.1", "https", "public.test"),
}


@pytest.mark.parametrize("row", **each(TRUST))
@on_uvloop
async def test_forwarded_fields_are_kept_from_trusted_proxies_only(row: tuple[tuple[str, ...], str, str, str]) -> None:
    trusted, chain, scheme, host = row
    async with LabReplica() as a, serving(a, trusted_proxies=trusted) as house:
        await house.ask(request(*GET, headers=FORWARDED), "GET")
        seen = a.seen.last
        assert seen.headers_named("x-forwarded-for") == [chain]
        assert seen.headers_named("x-forwarded-proto") == [scheme]
        assert seen.headers_named("x-forwarded-host") == [host]


# X-Request-Id

IDS = {
    "an ordinary one": ("abc-1.2_3", True),
    "the longest": ("x" * 128, True),
    "too long": ("x" * 129, False),
    "empty": ("", False),
    "with a space": ("a b", False),
    "with a quote": ('a"b', False),
    "with a slash": ("a/b", False),
    "beyond ASCII": ("caf\xe9", False),
}


@pytest.mark.parametrize("row", **each(IDS))
@in_house
async def test_a_request_id_is_taken_or_made_passed_on_returned_and_logged(house: House, row: tuple[str, bool]) -> None:
    given, is_taken = row
    answer = await house.ask(request(*GET, headers=(("X-Request-Id", given),)), "GET")
    known = answer.header("x-request-id")
    assert known is not None
    assert re.fullmatch(r"[\w.-]{1,128}", known, re.ASCII)
    assert (known == given) == is_taken
    assert house.replicas[0].seen.last.headers_named("x-request-id") == [known]
    assert [line["id"] for line in await house.logged(1)] == [known]


@in_house
async def test_made_request_ids_differ_and_errors_carry_them_too(house: House) -> None:
    answers = [await house.ask(request("GET", path), "GET") for path in ("/v1/models/lab", "/nowhere", "/health") * 5]
    assert len({answer.header("x-request-id") for answer in answers}) == 15


# What answers tell


@in_house
async def test_answers_name_their_replica_and_when_asked_the_reason(house: House) -> None:
    plain = await house.ask(request(body=chat()))
    assert (plain.header("x-replica-id"), plain.header("x-route-reason")) == ("a", None)
    asked = await house.ask(request(body=chat(), headers=(("X-Route-Explain", "1"),)))
    assert re.fullmatch(r"in turn; attempts=1; queued=0\.\d{3}", asked.header("x-route-reason") or "")
    assert house.replicas[0].seen.last.header("x-route-explain") is None
    assert (await house.ask(request(body=chat(), headers=(("X-Route-Explain", "0"),)))).header("x-route-reason") is None


# Authorization


@pytest.mark.parametrize("value", ["Bearer client", "Basic dTpw", ""])
@in_house
async def test_authorization_is_passed_on_where_the_balancer_holds_no_keys(house: House, value: str) -> None:
    await house.ask(request(*GET, headers=(("Authorization", value),) if value else ()), "GET")
    assert house.replicas[0].seen.last.headers_named("authorization") == ([value] if value else [])


@on_uvloop
async def test_the_replicas_own_key_takes_its_place() -> None:
    async with LabReplica(api_key="inner") as a, serving(a, config={"replica_key": "inner"}) as house:
        answer = await house.ask(request(body=chat(), headers=(("Authorization", "Bearer outer"),)))
        assert answer.status == 200
        assert a.seen.last.headers_named("authorization") == ["Bearer inner"]
        assert b"inner" not in answer.body + str(answer.headers).encode() + str(house.log()).encode()


# CORS

ORIGIN = ("Origin", "https://app.test")
PREFLIGHT = (
    ORIGIN,
    ("Access-Control-Request-Method", "POST"),
    ("Access-Control-Request-Headers", "authorization, x-a"),
)
OPEN = {"a list": (("https://app.test", "https://b.test"), "https://app.test"), "all": (("*",), "*")}


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
async def test_answers_and_our_own_errors_carry_the_cors_fields_and_the_replicas_are_dropped() -> None:
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
            if status != 431:  # nothing of that head was read
                assert answer.header("access-control-allow-origin") == "https://app.test", status
                assert "X-Request-Id" in (answer.header("access-control-expose-headers") or "")
        other = await house.ask(request(body=chat(), headers=(("Origin", "https://evil.test"),)))
        assert (other.status, other.header("access-control-allow-origin")) == (200, None)


@in_house
async def test_without_origins_of_our_own_cors_is_the_replicas(house: House) -> None:
    house.replicas[0].set(headers=(("Access-Control-Allow-Origin", "*"),))
    answer = await house.ask(request("OPTIONS", CHAT, headers=PREFLIGHT), "OPTIONS")
    assert (answer.status, answer.header("access-control-allow-origin")) == (200, "*")
    assert house.replicas[0].seen.last.method == "OPTIONS"
