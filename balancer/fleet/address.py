"""Where a replica is, and what it is called: all that the relay needs to know of one."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaAddress:
    """One life of a replica. What answers there after a restart has an address of its own, though all fields are equal.

    `authority` is what a Host field says.
    """

    name: str
    host: str
    port: int
    is_https: bool
    authority: bytes

    @classmethod
    def of(cls, name: str, url: str) -> "ReplicaAddress":
        parts = urlsplit(url)
        is_https = parts.scheme == "https"
        port = parts.port or (443 if is_https else 80)
        return cls(name, parts.hostname or "", port, is_https, parts.netloc.encode())
