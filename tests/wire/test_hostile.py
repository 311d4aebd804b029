"""Bytes that are no request, or that could be read as two: refused and disconnected; no replica ever sees them."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.client import chat, chunks, request
from tests.wire.running import House, each, in_house, kept

POST = request(body=chat())
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: evil\r\n\r\n"


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


def head(*lines: bytes, first: bytes = b"POST /v1/images/edits HTTP/1.1", host: bytes = b"Host: wire.test") -> bytes:
    return b"\r\n".join((first, *([host] if host else []), *lines)) + b"\r\n\r\n"


FRAMING = {
    "length and chunked": head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked and length": head(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"0\r\n\r\n",
    "two lengths": head(b"Content-Length: 5", b"Content-Length: 6") + b"hello!",
    "two lengths in one field": head(b"Content-Length: 5, 6") + b"hello!",
    "a length with a sign": head(b"Content-Length: +5") + b"hello",
    "a negative length": head(b"Content-Length: -5") + b"hello",
    "a hexadecimal length": head(b"Content-Length: 0x5") + b"hello",
    "a length with an underscore": head(b"Content-Length: 1_0") + b"hellohello",
    "a length beyond counting": head(b"Content-Length: 99999999999999999999"),
    "a length with zeros before it": head(b"Content-Length: " + b"0" * 5000 + b"5") + b"hello",
    "an empty length": head(b"Content-Length:"),
    "gzip": head(b"Transfer-Encoding: gzip") + b"hello",
    "gzip, chunked": head(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "gzip and chunked in two fields": head(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked and identity in two fields": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")
    + b"0\r\n\r\n",
    "chunked twice": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked twice in one field": head(b"Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "xchunked": head(b"Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "chunked with a tab before it": head(b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
    "an empty coding": head(b"Transfer-Encoding:") + b"0\r\n\r\n",
    "identity": head(b"Transfer-Encoding: identity") + b"0\r\n\r\n",
    "chunked in HTTP/1.0": head(b"Transfer-Encoding: chunked", first=b"POST /v1/images/edits HTTP/1.0") + b"0\r\n\r\n",
    "chunked in HTTP/1.0 with keep-alive": head(
        b"Transfer-Encoding: chunked", b"Connection: keep-alive", first=b"POST /v1/images/edits HTTP/1.0"
    )
    + b"0\r\n\r\n",
}

CHUNKED = head(b"Transfer-Encoding: chunked")
CHUNKS = {
    "a size that is none": CHUNKED + b"x\r\nhello\r\n0\r\n\r\n",
    "a negative size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "a size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size with a sign": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "a size with a space": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "a size with an underscore": CHUNKED + b"1_0\r\nhellohellohelloh\r\n0\r\n\r\n",
    "an empty size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "a size beyond counting": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "a bare LF behind the size": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "a bare CR behind the size": CHUNKED + b"5\rhello\r\n0\r\n\r\n",
    "a bare LF in an extension": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "more than its size": CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n",
    "a bare LF behind the data": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "a bare LF behind the last": CHUNKED + b"5\r\nhello\r\n0\r\n\n",
    "a bare LF in the trailers": CHUNKED + b"5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n",
}

FIELDS = {
    "no Host": head(host=b""),
    "two Hosts": head(b"Host: other"),
    "the same Host twice": head(b"Host: wire.test"),
    "a space before the colon": head(b"A : b"),
    "a tab before the colon": head(b"A\t: b"),
    "a length with a space before the colon": head(b"Content-Length : 5") + b"hello",
    "no colon": head(b"Alone"),
    "no name": head(b": b"),
    "a name of two words": head(b"A B: c"),
    "a name beyond ASCII": head(b"\xc3\xa4: b"),
    "a NUL in a name": head(b"A\0: b"),
    "a NUL in a value": head(b"A: b\0c"),
    "a control character in a value": head(b"A: b\x01c"),
    "a bare LF in the head": head(b"A: b\nC: d"),
    "a bare LF at its end": b"POST /v1/images/edits HTTP/1.1\nHost: wire.test\n\n",
    "a bare CR in a value": head(b"A: b\rC: d"),
    "a bare CR before the colon": head(b"A\r: b"),
    "folding": head(b"A: b", b" c"),
    "folding with a tab": head(b"A: b", b"\tc"),
    "a folded length": head(b"Content-Length:", b" 5") + b"hello",
    "a space before the first field": b"POST /v1/images/edits HTTP/1.1\r\n Host: wire.test\r\n\r\n",
}

LINES = {
    "no version": head(first=b"GET /v1/models"),
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/2.0": head(first=b"GET /v1/models HTTP/2.0"),
    "HTTP/1.2": head(first=b"GET /v1/models HTTP/1.2"),
    "HTTP/3": head(first=b"GET /v1/models HTTP/3"),
    "http in small letters": head(first=b"GET /v1/models http/1.1"),
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "a method that is none": head(first=b"FETCH /v1/models HTTP/1.1"),
    "a method in small letters": head(first=b"get /v1/models HTTP/1.1"),
    "two targets": head(first=b"GET /v1/models /v1/other HTTP/1.1"),
    "a target without a slash": head(first=b"GET v1/models HTTP/1.1"),
    "a target with another scheme": head(first=b"GET ftp://wire.test/v1/models HTTP/1.1"),
    "a target with a control character": head(first=b"GET /v1/models\x01 HTTP/1.1"),
    "a target with a NUL": head(first=b"GET /v1/models\0 HTTP/1.1"),
    "a target beyond ASCII": head(first=b"GET /v1/mod\xc3\xa4ls HTTP/1.1"),
    "a target with a fragment": head(first=b"GET /v1/models#/../flush_cache HTTP/1.1"),
    "a space behind the version": head(first=b"GET /v1/models HTTP/1.1 "),
    "a tab for a space": head(first=b"GET\t/v1/models\tHTTP/1.1"),
    "random bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", **each({**FRAMING, **CHUNKS, **FIELDS, **LINES}))
@in_house
async def test_is_refused_with_400_and_the_connection_closed(house: House, data: bytes) -> None:
    client = await house.client()
    await client.send(data + SMUGGLED)
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.is_last) == (400, "bad_request", True)
    assert answer.error["message"].endswith("Send a well-formed HTTP/1.1 request.")
    assert await client.is_ended(), "nothing behind it is answered"
    assert house.replicas[0].seen.requests == []
    line = (await house.logged(1))[0]
    assert (line["status"], line["error"], line["attempts"]) == (400, "bad_request", 0)


@pytest.mark.parametrize("data", [FRAMING["two lengths"], CHUNKS["more than its size"], FIELDS["folding"]])
@in_house
async def test_what_came_before_it_is_answered_first(house: House, data: bytes) -> None:
    client = await house.client()
    await client.send(POST + POST + data + SMUGGLED)
    assert [(await client.answer()).status for _ in range(3)] == [200, 200, 400]
    assert await client.is_ended()
    assert len(house.replicas[0].seen.requests) == 2


UPGRADE = (("Connection", "upgrade"), ("Upgrade", "h2c"))
HIDDEN = {
    "in a body": request(path="/v1/images/edits", body=SMUGGLED),
    "in chunks": head(b"Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "in a body that looks like its end": request(path="/v1/images/edits", body=b"0\r\n\r\n" + SMUGGLED),
    "in an extension": head(b"Transfer-Encoding: chunked") + b'5;a="GET /v1/smuggled"\r\nhello\r\n0\r\n\r\n',
    "in a value": request(path="/v1/images/edits", body=b"", headers=(("A", "b%0d%0aGET /v1/smuggled"),)),
    "behind Upgrade": head(b"Connection: upgrade", b"Upgrade: h2c", b"Content-Length: 0"),
    "behind Upgrade, in a body": request(path="/v1/images/edits", body=SMUGGLED, headers=UPGRADE),
    "behind Upgrade, in chunks": head(b"Connection: upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked")
    + b"%x\r\n%b\r\n0\r\nA: b\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "behind HTTP2-Settings": head(
        b"Connection: upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA", b"Content-Length: 0"
    ),
}


@pytest.mark.parametrize("data", **each(HIDDEN))
@in_house
async def test_a_request_hidden_in_another_stays_a_part_of_it(house: House, data: bytes) -> None:
    client = await house.client()
    await client.send(data + POST)
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    assert [r.target for r in house.replicas[0].seen.requests] == ["/v1/images/edits", "/v1/chat/completions"]
    assert house.replicas[0].seen.requests[0].header("upgrade") is None


@in_house
async def test_content_length_that_connection_names_is_not_dropped(house: House) -> None:
    """If it were dropped, the body would be read as the next request."""
    fields = (("Connection", "content-length, host, transfer-encoding, x-request-id"), ("Content-Length", "41"))
    client = await house.client()
    await client.send(request(path="/v1/images/edits", headers=fields) + SMUGGLED + POST)
    assert (await client.answer()).body == SMUGGLED
    assert (await client.answer()).status == 200
    assert house.replicas[0].seen.requests[0].header("content-length") == str(len(SMUGGLED))


@pytest.mark.parametrize("cut", range(1, 7))
@in_house
async def test_a_body_behind_upgrade_is_the_requests_however_it_comes(house: House, cut: int) -> None:
    """Its first bytes arrive with the head, later, or one by one; the next request asks for an upgrade as well."""
    head_of_it, body = (
        request(path="/v1/images/edits", headers=(*UPGRADE, ("Transfer-Encoding", "chunked"))),
        chunks(b"hello"),
    )
    client = await house.client()
    for piece in (head_of_it + body[:cut], body[cut : cut + 1], body[cut + 1 :] + head_of_it + body):
        await client.send(piece)
        await asyncio.sleep(0.02)
    for _ in range(2):
        assert (await client.answer()).body == b"hello"
    assert [r.body for r in house.replicas[0].seen.requests] == [b"hello", b"hello"]


@pytest.mark.parametrize("body", [b"", SMUGGLED])
@in_house
async def test_connect_is_refused_with_its_body(house: House, body: bytes) -> None:
    client = await house.client()
    await client.send(request("CONNECT", "replica:8000", body=body) + POST)
    assert (await client.answer("POST")).status == 405
    assert (await client.answer()).status == 200
    assert [r.target for r in house.replicas[0].seen.requests] == ["/v1/chat/completions"]
