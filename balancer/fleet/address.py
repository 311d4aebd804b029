"""Where a replica is and what it is called: all that the relay needs to know about it."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaAddress:
    """The address of one life of a replica. After a restart there is another object, even if all its fields are equal.

    `authority` is the value of the Host field.
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
