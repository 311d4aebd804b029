"""Whether an address is one of this machine's own: its kernel is asked where packets to it would go."""

import errno
import ipaddress
import socket
import struct

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# rtnetlink(7). A header: length, kind, flags, number, port. An answer: a header, then an error number, or a route,
# whose eighth byte is its type.
_HEADER, _ROUTE, _ATTRIBUTE, _NUMBER = map(struct.Struct, ("=IHHII", "=8BI", "=HH", "=i"))
_GET_ROUTE, _NEW_ROUTE, _ERROR, _REQUEST, _DESTINATION, _TYPE = 26, 24, 2, 1, 1, 7
_UNICAST = 1  # the type of a route to other machines
_NOWHERE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
_PATIENCE = 1.0  # seconds


def is_own(address: Address) -> bool:
    """Does this machine take what is sent to the address itself? True if that cannot be found out."""
    try:
        return _stays_here(address)
    except OSError:  # netlink is forbidden, or not there
        return _can_be_bound(address)


def _stays_here(address: Address) -> bool:
    """By the kernel's route to it. Raises OSError if there is no telling."""
    where, family = address.packed, socket.AF_INET if address.version == 4 else socket.AF_INET6
    wanted = _ROUTE.pack(family, len(where) * 8, *[0] * 7)
    wanted += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(where), _DESTINATION) + where
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        kernel.settimeout(_PATIENCE)
        kernel.send(_HEADER.pack(_HEADER.size + len(wanted), _GET_ROUTE, _REQUEST, 1, 0) + wanted)
        answer = kernel.recv(4096)
    kind, said = _HEADER.unpack_from(answer)[1], answer[_HEADER.size :]
    if kind == _ERROR:
        number = -_NUMBER.unpack_from(said)[0]
        if number in _NOWHERE:
            return False
        raise OSError(number, "the kernel does not tell where that is")
    if kind != _NEW_ROUTE or len(said) <= _TYPE:
        raise OSError(errno.EPROTO, "the kernel's answer is not understood")
    return said[_TYPE] != _UNICAST


def _can_be_bound(address: Address) -> bool:
    """Only its own addresses can be, unless net.ipv4.ip_nonlocal_bind is set: then all."""
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
