"""Where a service's balancer listens and who may come in: as the flags of `groundserve up` say, else what is free."""

from dataclasses import dataclass

from balancer.errors import ConfigError
from balancer.operate.engines.ports import free_ports, is_free
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.service_folder import DetachedRecord
from balancer.spec.loopback import is_loopback_name

# SkyServe's first port for endpoints; the next service takes the next pair that is free.
_FIRST_PORT = 30001
_LAST_PORT = 30999


@dataclass(frozen=True, slots=True)
class AddressFlags:
    """What a person asked for: HOST:PORT each, port 0 being any free one, and None what suits us."""

    listen: str | None = None
    admin: str | None = None
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the balancer listens, HOST:PORT each, and who may come in: all, or whoever has a key of that file.

    `admin_key` is the file with the key for changes on the admin port; None: one of the service's own.
    """

    listen: str
    admin: str
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None

    def endpoint(self, recipe: Recipe) -> str:
        return f"{'http' if recipe.spec.tls is None else 'https'}://{self.listen}"


def choose_addresses(flags: AddressFlags, record: DetachedRecord | None = None) -> Addresses:
    """What was asked for; else where the record says that the service serves; else the first free pair from 30001 on.

    Raises ConfigError when a port that was asked for is taken, or an address wants a word on who may come in.
    """
    check_admin(flags)
    access = (flags.is_open, flags.api_keys, flags.admin_key)
    if record is not None and flags.listen in (None, record.listen) and flags.admin in (None, record.admin):
        return Addresses(record.listen, record.admin, *access)  # taken, by the service itself
    listen, admin = (
        None if address is None else _usable(flag, address)
        for flag, address in (("--listen", flags.listen), ("--admin", flags.admin))
    )
    for port in range(_FIRST_PORT, _LAST_PORT, 2):
        pair = Addresses(listen or f"127.0.0.1:{port}", admin or f"127.0.0.1:{port + 1}", *access)
        if (listen and admin) or all(is_free(*split(address)) for address in (pair.listen, pair.admin)):
            return pair
    raise ConfigError(f"no two ports are free between {_FIRST_PORT} and {_LAST_PORT}: give --listen and --admin")


def check_admin(flags: AddressFlags) -> None:
    """Raises ConfigError where everyone who reaches the admin port could look, and nobody said that they may."""
    if flags.admin is not None and not flags.is_open and flags.admin_key is None and not is_loopback_name(flags.admin):
        raise ConfigError(
            f"--admin {flags.admin} is not loopback: give --admin-key FILE, or say --open to let everyone who reaches "
            "it look"
        )


def split(address: str) -> tuple[str, int]:
    """Host and port; port -1 where there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else -1


def _usable(flag: str, address: str) -> str:
    host, port = split(address)
    if not host or not 0 <= port < 65536:
        raise ConfigError(f"{flag} {address}: write HOST:PORT, as in 127.0.0.1:30001")
    if port == 0:
        return f"{address.rpartition(':')[0]}:{free_ports(1)[0]}"
    if not is_free(host, port):
        raise ConfigError(f"{flag} {address}: the port is in use: stop what listens there, or give another one")
    return address
