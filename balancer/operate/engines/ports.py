"""Free ports on this machine's loopback."""

import random
import socket
from collections.abc import Iterable

from balancer.errors import ConfigError

# Below the range that Linux gives to outgoing connections (32768 and up): nothing can slip onto a port in
# the minutes between its choice and the moment when a loaded model listens on it.
REPLICA_PORTS = range(20100, 22000)


def free_ports(count: int, among: Iterable[int] | None = None) -> list[int]:
    """That many ports that nothing listens on, in random order; raises ConfigError when there are too few."""
    candidates = list(REPLICA_PORTS if among is None else among)
    # Two services that start at once should not choose alike.
    random.shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if is_free("127.0.0.1", port):
            found.append(port)
    if len(found) < count:
        low, high = min(candidates, default=0), max(candidates, default=0)
        raise ConfigError(
            f"{count} free ports are needed and {low}-{high} has {len(found)}: "
            "stop what listens there, or ask for fewer replicas"
        )
    return found


def is_free(host: str, port: int) -> bool:
    """Could a server listen there now? Raises ConfigError when the host is none of this machine's addresses."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as failure:
        raise ConfigError(f"cannot listen on {host}: {failure.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise ConfigError(f"cannot listen on {host}:{port}: ports below 1024 need root") from None
        except OSError as failure:
            if failure.errno == 99:
                raise ConfigError(f"cannot listen on {host}: it is no address of this machine") from None
            return False
    return True
