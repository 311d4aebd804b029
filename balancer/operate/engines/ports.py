"""Ports of this machine: which are free, whose the others are, and sockets that listen on them."""

import contextlib
import errno
import os
import pwd
import random
import socket
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.engines.family import descendants

# Below the range that Linux uses for outgoing connections (32768 and up), so that none of them takes a port in the
# minutes between its choice and the moment when the loaded model listens on it.
REPLICA_PORTS = range(20100, 22000)

# Connections that may wait to be accepted, as in the balancer: enough for all that arrive while it restarts.
_BACKLOG = 4096
_LISTEN = "0A"  # the state of a socket that listens, in /proc/net/tcp

# What holds the ports that this process chose lately, so that others choose different ones while nothing listens there
# yet, and how many are held. Replicas, which load for minutes, have claims to theirs.
_HELD = 32
_held: deque[int] = deque()


def free_ports(count: int, among: Iterable[int] | None = None) -> list[int]:
    """`count` ports that nothing listens on, in random order; raises ConfigError if there are too few.

    Those that this or another process was given lately are the last choice.
    """
    candidates = list(REPLICA_PORTS if among is None else among)
    random.shuffle(candidates)
    found: list[int] = []
    others: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if is_free("127.0.0.1", port):
            (found if _hold(port) else others).append(port)
    found += others[: count - len(found)]
    if len(found) < count:
        low, high = min(candidates, default=0), max(candidates, default=0)
        raise ConfigError(
            f"{count} free ports are needed and {low}-{high} has {len(found)}: "
            "stop what listens there, or ask for fewer replicas"
        )
    return found


def _hold(port: int) -> bool:
    """Holds a port for this process, unless another holds it, until it has chosen many others or ends."""
    name = claim(port)
    if name is None:
        return False
    _held.append(name.detach())
    if len(_held) > _HELD:
        os.close(_held.popleft())
    return True


def claim(port: int) -> socket.socket | None:
    """Keeps this port for a replica that listens there once it is loaded; None if another service keeps it.

    It is kept until the claim is closed, or we end. An abstract name, as a port, belongs to a network, goes with the
    process, and may be held by one.
    """
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0groundserve port {port}")
    except OSError:
        name.close()
        return None
    return name


def is_free(host: str, port: int) -> bool:
    """Could a server listen there now? Raises ConfigError if the address can never be listened on here."""
    probe = _bound(host, port)
    if probe is not None:
        probe.close()
    return probe is not None


def listen_on(host: str, port: int) -> socket.socket | None:
    """A socket that listens there; port 0 means any free port. None if another socket listens there already.

    Raises ConfigError if the address can never be listened on here.
    """
    listener = _bound(host, port)
    if listener is not None:
        try:
            # Several sockets may be bound to one port, but only one of them can listen.
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            return None
    return listener


def user_of(port: int) -> str:
    """Who listens on a port of this machine, as words for a message: " by process 123 (nginx)" or " by user www"."""
    for inode, user in _listening(port):
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # the process has ended, or we may not inspect it
                if descriptor.readlink() == Path(f"socket:[{inode}]"):
                    process = descriptor.parts[2]
                    return f" by process {process} ({_command(process)})"
        with contextlib.suppress(KeyError):
            return f" by user {pwd.getpwuid(user).pw_name}"
    return ""


def is_below(process: int, port: int) -> bool | None:
    """Does this process, or one below it, listen on that port? None if nobody listens there."""
    wanted = {Path(f"socket:[{inode}]") for inode, _ in _listening(port)}
    if not wanted:
        return None
    for member in (process, *descendants(process)):
        for descriptor in Path(f"/proc/{member}/fd").glob("*"):
            with contextlib.suppress(OSError):  # it has ended
                if descriptor.readlink() in wanted:
                    return True
    return False


def _listening(port: int) -> Iterator[tuple[str, int]]:
    """Inode and user id of each socket that listens on that port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                # proc(5): sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
                _, local, _, state, _, _, _, user, _, inode, *_ = line.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    yield inode, int(user)


def _command(process: str) -> str:
    """The command line of a process, shortened, and without the path of its program."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
        if shown := " ".join(Path(word).name if at == 0 else word for at, word in enumerate(words) if word):
            return textwrap.shorten(shown, 80, placeholder=" ...")
    return "a program"


def _bound(host: str, port: int) -> socket.socket | None:
    """A socket bound to that address; None if another socket is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as failure:
        raise ConfigError(f"cannot listen on {host}: {getattr(failure, 'strerror', failure)}") from None
    bound = socket.socket(family, kind, protocol)
    # Otherwise recently closed connections would prevent the bind.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as failure:
        bound.close()
        if isinstance(failure, PermissionError):
            raise ConfigError(f"cannot listen on {host}:{port}: ports below 1024 need root") from None
        if failure.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"cannot listen on {host}: it is no address of this machine") from None
        return None
    return bound
