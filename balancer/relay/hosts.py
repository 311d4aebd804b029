"""What a Host field may say, and which host names could belong to anybody's web page."""

import ipaddress
import re
from functools import lru_cache
from typing import Final

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::(\d*))?")
_DIGITS = 5  # digits of the highest port, 65535
_SHORT: Final = 128  # bytes of the longest Host whose check is cached: clients send the same few again and again
# Public DNS gives nobody a name under these or one without a dot, so no page of another site has such a name.
_PRIVATE = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".test", ".svc")


def is_host(value: bytes) -> bool:
    """Is this a name or an address, with or without a port, as RFC 9112 section 3.2 requires? An empty value is not."""
    return _is_remembered_host(value) if len(value) <= _SHORT else _is_host(value)


def _is_host(value: bytes) -> bool:
    found = _HOST.fullmatch(value)
    if found is None:
        return False
    host, port = found[1], (found[2] or b"").lstrip(b"0") or b"0"
    if len(port) > _DIGITS or int(port) > 65535:
        return False
    try:
        return not host.startswith(b"[") or bool(ipaddress.IPv6Address(host[1:-1].decode()))
    except ValueError:
        return False


_is_remembered_host = lru_cache(maxsize=1024)(_is_host)


def is_public_name(host: bytes) -> bool:
    """Could this name be in public DNS, so that its owner can point it at this machine?"""
    return _is_remembered_name(host) if len(host) <= _SHORT else _is_public_name(host)


def _is_public_name(host: bytes) -> bool:
    name = host.lower() if host.startswith(b"[") else host.lower().partition(b":")[0].rstrip(b".")
    if b"." not in name or name.startswith(b"["):
        return False
    try:
        ipaddress.IPv4Address(name.decode("latin-1"))
    except ValueError:
        return not name.decode("latin-1").endswith(_PRIVATE)
    return False


_is_remembered_name = lru_cache(maxsize=1024)(_is_public_name)
