"""Header fields: which pass byte for byte, which are dropped, and which the balancer sets."""

import re
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import chat, request
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
        await client.send(request(method, "/v1/models/x?a=%2F", body))
        answer = await client.answer(method)
        assert (answer.status, answer.is_last) == (200, False)
        assert answer.body == (b"" if method == "HEAD" else body or b"")
        seen = house.replicas[0].seen.last
        assert (seen.method, seen.target, seen.version, seen.body) == (
            method,
            "/v1/models/x?a=%2F",
            "HTTP/1.1",
            body or b"",
        )


@in_house
async def test_request_as_the_replica_gets_it(house: House) -> None:
    """A request reaches the replica byte for byte, with the balancer's own fields added."""
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
        ("Via", "1.1 groundserve"),
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
    forwarded = {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "via"}
    assert names == {"host", "x-kept", "x-request-id", *forwarded}


@in_house
async def test_connection_cannot_take_away_what_the_balancer_sets(house: House) -> None:
    named = "x-forwarded-for, x-forwarded-proto, x-request-id, host, authorization, content-length, x-replica-id"
    await house.ask(request(headers=(("Connection", named), ("Authorization", "Bearer k")), body=chat()))
    seen = house.replicas[0].seen.last
    assert seen.header("x-forwarded-for") == "127.0.0.1"
    assert seen.header("authorization") == "Bearer k"
    assert seen.id


# The client's address

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


OTHERS = ("Forwarded", "X-Real-IP", "x-client-ip", "True-Client-IP", "X-Forwarded-Port", "X-FORWARDED-PREFIX")


@pytest.mark.parametrize("is_trusted", [False, True])
@on_uvloop
async def test_what_else_is_said_of_who_asks_is_hearsay_too(is_trusted: bool) -> None:
    said = tuple((name, "for=203.0.113.7") for name in OTHERS)
    async with LabReplica() as a, serving(a, trusted_proxies=("127.0.0.1",) if is_trusted else ()) as house:
        await house.ask(request(*GET, headers=said), "GET")
        for name in OTHERS:
            assert a.seen.last.headers_named(name) == ["for=203.0.113.7"] * is_trusted, name


@in_house
async def test_a_replica_learns_which_way_a_request_came(house: House) -> None:
    await house.ask(request(*GET, headers=(("Via", "1.1 edge"),)), "GET")
    assert house.replicas[0].seen.last.headers_named("via") == ["1.1 edge", "1.1 groundserve"]
    await house.ask(request(*GET, version="1.0"), "GET")
    assert house.replicas[0].seen.last.headers_named("via") == ["1.0 groundserve"]


# Host

HOSTS = {
    "a name": ("a", True), "with a port": ("a:80", True), "an empty port": ("a:", True), "none": ("", True),
    "the last port": ("a.b-c_d.test:65535", True), "zeros": ("a:000080", True), "an address": ("192.0.2.1:1", True),
    "an IPv6 address": ("[::1]", True), "with its port": ("[2001:db8::1]:8000", True), "encoded": ("%41:1", True),
    "a space": ("a b", False), "a slash": ("a/b", False), "a user": ("a@b", False), "a backslash": ("a\\b", False),
    "no closing bracket": ("[::1", False), "no opening one": ("::1]", False), "no brackets": ("::1", False),
    "no address in them": ("[a]", False), "a zone": ("[fe80::1%25eth0]", False), "too long": ("[::1::2]", False),
    "a port too high": ("a:99999", False), "the next": ("a:65536", False), "a name for it": ("a:http", False),
    "two": ("a:1:2", False), "a sign": ("a:-1", False), "a port alone": (":80", False), "a query": ("a?b", False),
    "a fragment": ("a#b", False), "quotes": ('"a"', False), "angles": ("<a>", False), "a tab": ("a\tb", False),
    "beyond ASCII": ("b\xfccher", False), "a lone percent": ("a%zz", False), "digits": ("a:" + "9" * 5000, False),
}  # fmt: skip


@pytest.mark.parametrize("row", **each(HOSTS))
@in_house
async def test_a_host_is_a_name_or_an_address_with_or_without_a_port(house: House, row: tuple[str, bool]) -> None:
    host, is_one = row
    answer = await house.ask(request(*GET).replace(b"wire.test", host.encode("latin-1")), "GET")
    assert (answer.status, answer.is_last) == ((200, False) if is_one else (400, True))
    if is_one:
        assert house.replicas[0].seen.last.headers_named("x-forwarded-host") == [host]
    else:
        assert "Host" in answer.error["message"]
        assert house.replicas[0].seen.requests == []


@pytest.mark.parametrize(
    ("target", "host", "seen"),
    [
        ("http://other.test/v1/images/edits", "other.test", "/v1/images/edits"),
        ("http://other.test:8000/v1/images/edits?a=/b", "other.test:8000", "/v1/images/edits?a=/b"),
        ("HTTPS://[::1]:1/v1/images/edits", "[::1]:1", "/v1/images/edits"),
    ],
)
@in_house
async def test_the_host_in_a_target_counts_and_not_the_field(house: House, target: str, host: str, seen: str) -> None:
    assert (await house.ask(request("GET", target), "GET")).status == 200
    last = house.replicas[0].seen.last
    assert (last.target, last.headers_named("x-forwarded-host")) == (seen, [host])


@pytest.mark.parametrize(
    "target",
    ["http://", "http:///v1/x", "http://u@a/v1/x", "http://a:99999/v1/x", "http://a:b:c/v1/x", "http://[::1/v1"],
)
@in_house
async def test_a_target_that_names_no_host_is_400(house: House, target: str) -> None:
    assert (await house.ask(request("GET", target), "GET")).status == 400
    assert house.replicas[0].seen.requests == []


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
async def test_request_id(house: House, row: tuple[str, bool]) -> None:
    """A request id is taken from the client or created, passed on, returned and logged."""
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


# What answers reveal


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
async def test_authorization_is_passed_on(house: House, value: str) -> None:
    """Authorization is passed on if the balancer holds no keys."""
    await house.ask(request(*GET, headers=(("Authorization", value),) if value else ()), "GET")
    assert house.replicas[0].seen.last.headers_named("authorization") == ([value] if value else [])


@on_uvloop
async def test_the_replicas_own_key_takes_its_place() -> None:
    async with LabReplica(api_key="inner") as a, serving(a, config={"replica_key": "inner"}) as house:
        answer = await house.ask(request(body=chat(), headers=(("Authorization", "Bearer outer"),)))
        assert answer.status == 200
        assert a.seen.last.headers_named("authorization") == ["Bearer inner"]
        assert b"inner" not in answer.body + str(answer.headers).encode() + str(house.log()).encode()
