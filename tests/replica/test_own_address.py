"""Which addresses are the machine's own."""

import ipaddress
import socket
from typing import Any

import pytest

from replica import own_address
from replica.media import is_public
from replica.own_address import is_own

PUBLIC = ("1.1.1.1", "2606:4700:4700::1111")
OWN = ("127.0.0.1", "127.3.2.1")


class BindsAll(socket.socket):
    """As with the sysctl net.ipv4.ip_nonlocal_bind=1."""

    def bind(self, _: Any) -> None: ...


class WithoutNetlink(socket.socket):
    def __init__(self, family: int = socket.AF_INET, *more: int) -> None:
        if family == socket.AF_NETLINK:
            raise PermissionError("a sandbox forbids it")
        super().__init__(family, *more)


class BindsAllWithoutNetlink(BindsAll, WithoutNetlink):
    """Both at once."""


def own(*addresses: str) -> list[bool]:
    return [is_own(ipaddress.ip_address(address)) for address in addresses]


@pytest.mark.parametrize("kind", [socket.socket, BindsAll, WithoutNetlink])
def test_the_machines_own_addresses_are_known(kind: type[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_address.socket, "socket", kind)
    assert own(*OWN, *PUBLIC) == [True, True, False, False]


def test_other_machines_are_public_if_all_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_address.socket, "socket", BindsAll)
    assert all(map(is_public, PUBLIC))


def test_an_address_that_may_be_its_own_is_not_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells whose it is."""
    monkeypatch.setattr(own_address.socket, "socket", BindsAllWithoutNetlink)
    assert own(*OWN, *PUBLIC) == [True, True, True, True]
    assert not any(map(is_public, PUBLIC))
