"""What is read from a head, and what is made of it for a replica."""

import ipaddress
import time

import pytest

from balancer.errors import ServeError
from balancer.relay.request import Peer, Request, new_request_id, read_head

PEER = Peer(b"192.0.2.1", False, b"http")


def read(
    *headers: tuple[bytes, bytes], method: bytes = b"GET", target: bytes = b"/v1/x", version: str = "1.1"
) -> Request:
    request = Request(method, target, version, 0.0)
    read_head(request, [(b"Host", b"wire.test"), *headers], PEER)
    return request


@pytest.mark.parametrize(
    ("address", "seen", "is_trusted"),
    [
        ("10.1.2.3", b"10.1.2.3", True),
        ("::ffff:10.1.2.3", b"10.1.2.3", True),
        ("192.0.2.1", b"192.0.2.1", False),
        ("fd00::1", b"fd00::1", True),
        ("fe80::1%eth0", b"fe80::1", False),
        ("", b"unknown", False),
        ("x", b"unknown", False),
    ],
)
def test_who_is_at_the_other_end(address: str, seen: bytes, is_trusted: bool) -> None:
    trusted = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    peer = Peer.of(address, True, trusted)
    assert (peer.address, peer.is_trusted, peer.scheme) == (seen, is_trusted, b"https")


def test_made_ids_are_unique_and_could_be_a_clients() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    for one in ids:
        assert read((b"X-Request-Id", one)).id == one


@pytest.mark.parametrize(
    ("value", "is_generating"), [(b"POST", True), (b"PUT", True), (b"GET", False), (b"OPTIONS", False)]
)
def test_posts_and_puts_generate(value: bytes, is_generating: bool) -> None:
    assert read(method=value, target=b"/generate").is_generating is is_generating
    assert not read(method=value, target=b"/v1/models").is_generating


@pytest.mark.parametrize("target", [b"v1", b"?x", b"ftp://a/b", b"http:/a", b"", b"/v1#x"])
def test_targets_that_are_none(target: bytes) -> None:
    with pytest.raises(ServeError) as refused:
        read(target=target)
    assert (refused.value.status, refused.value.closes) == (400, True)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Connection", b"a," * 16_000), *[(b"z", b"")] * 8_000],
        [(b"Connection", b"a")] * 5_000,
        [(b"Connection", b"%x" % number) for number in range(4_000)],
        [(b"z", b"")] * 16_000,
    ],
    ids=["names to drop", "fields that name one", "fields that name others", "many fields"],
)
def test_no_head_of_64_kib_keeps_all_others_waiting(headers: list[tuple[bytes, bytes]]) -> None:
    began = time.process_time()
    read(*headers)
    assert time.process_time() - began < 0.2
