"""Where a service's balancer listens and who may use it: as the flags of `groundserve up` say, else on free ports."""

import contextlib
import socket
from dataclasses import dataclass

from balancer.errors import ConfigError
from balancer.operate.engines.ports import free_ports, is_free, listen_on, user_of
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.desired import Desired
from balancer.spec.loopback import is_loopback_name

# SkyServe's first port for endpoints. Each service takes the first free pair.
_FIRST_PORT = 30001
_LAST_PORT = 30999


@dataclass(frozen=True, slots=True)
class AddressFlags:
    """What the user asked for: HOST:PORT each; port 0 means any free port, None leaves the choice to us."""

    listen: str | None = None
    admin: str | None = None
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None
    join: str | None = None  # the name of a service whose endpoint this one is to share
    balancers: tuple[str, ...] = ()  # admin ports of balancers that run already

    def resolved(self, listen: str, admin: str) -> "Addresses":
        """These two addresses, with what the flags say about who may use them."""
        return Addresses(listen, admin, self.is_open, self.api_keys, self.admin_key, self.balancers)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the balancer listens (HOST:PORT each), and who may use it: everyone, or holders of a key in `api_keys`.

    `admin_key` is the file with the key for changes on the admin port; None means the service's own key. `balancers`
    are the admin ports of balancers that somebody else started; `admin` then is the first.
    """

    listen: str
    admin: str
    is_open: bool = False
    api_keys: str | None = None
    admin_key: str | None = None
    balancers: tuple[str, ...] = ()

    def endpoint(self, recipe: Recipe) -> str:
        return f"{'http' if recipe.spec.tls is None else 'https'}://{self.listen}"


class Listeners:
    """The listening sockets of a balancer's two ports, open until `close`, whichever process accepts on them."""

    def __init__(self, endpoint: socket.socket, admin: socket.socket) -> None:
        self.endpoint = endpoint
        self.admin = admin

    def close(self) -> None:
        self.endpoint.close()
        self.admin.close()


def open_listeners(flags: AddressFlags) -> tuple[Addresses, Listeners]:
    """Opens the requested ports, or the first free pair from 30001 on, and listens on them from now on.

    Raises ConfigError if a requested port is taken, or if --admin is beyond loopback without a key or --open.
    """
    _check_admin(flags)
    with contextlib.ExitStack() as unused:

        def opened(flag: str, address: str) -> socket.socket:
            listener = listen_on(*_checked(flag, address))
            if listener is None:
                raise _in_use(flag, address)
            return unused.enter_context(listener)

        endpoint = opened("--listen", flags.listen) if flags.listen is not None else None
        admin = opened("--admin", flags.admin) if flags.admin is not None else None
        for port in range(_FIRST_PORT, _LAST_PORT, 2):
            first = endpoint or listen_on("127.0.0.1", port)
            second = admin or listen_on("127.0.0.1", port + 1)
            if first is not None and second is not None:
                unused.pop_all()
                listen = _address_of(first, flags.listen)
                return flags.resolved(listen, _address_of(second, flags.admin)), Listeners(first, second)
            for listener in {first, second} - {endpoint, admin, None}:
                assert listener is not None
                listener.close()
    raise ConfigError(f"no two ports are free between {_FIRST_PORT} and {_LAST_PORT}: give --listen and --admin")


def choose_addresses(flags: AddressFlags, left: Desired | None = None) -> Addresses:
    """Addresses for a balancer that opens its ports itself, later: those requested, else those that it has, else the
    first free pair from 30001 on.

    Raises ConfigError if a requested port is taken, or if --admin is beyond loopback without a key or --open.
    """
    _check_admin(flags)
    if left is not None and flags.listen in (None, left.listen) and flags.admin in (None, left.admin):
        return flags.resolved(left.listen, left.admin)  # the service itself uses these ports already
    listen, admin = (
        None if address is None else _free(flag, address)
        for flag, address in (("--listen", flags.listen), ("--admin", flags.admin))
    )
    for port in range(_FIRST_PORT, _LAST_PORT, 2):
        pair = flags.resolved(listen or f"127.0.0.1:{port}", admin or f"127.0.0.1:{port + 1}")
        if (listen and admin) or all(is_free(*_split(address)) for address in (pair.listen, pair.admin)):
            return pair
    raise ConfigError(f"no two ports are free between {_FIRST_PORT} and {_LAST_PORT}: give --listen and --admin")


def _check_admin(flags: AddressFlags) -> None:
    """Raises ConfigError if the admin port would be readable beyond loopback without a key or --open."""
    if flags.admin is not None and not flags.is_open and flags.admin_key is None and not is_loopback_name(flags.admin):
        raise ConfigError(
            f"--admin {flags.admin} is not loopback: give --admin-key FILE, or say --open to let everyone who reaches "
            "it look"
        )


def _split(address: str) -> tuple[str, int]:
    """Host and port; port -1 if there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else -1


def _checked(flag: str, address: str) -> tuple[str, int]:
    host, port = _split(address)
    if not host or not 0 <= port < 65536:
        raise ConfigError(f"{flag} {address}: write HOST:PORT, as in 127.0.0.1:30001")
    return host, port


def _address_of(listener: socket.socket, wanted: str | None) -> str:
    """HOST:PORT, with the host as the user wrote it."""
    host = wanted.rpartition(":")[0] if wanted is not None else "127.0.0.1"
    return f"{host}:{listener.getsockname()[1]}"


def _free(flag: str, address: str) -> str:
    host, port = _checked(flag, address)
    if port == 0:
        return f"{address.rpartition(':')[0]}:{free_ports(1)[0]}"
    if not is_free(host, port):
        raise _in_use(flag, address)
    return address


def _in_use(flag: str, address: str) -> ConfigError:
    return ConfigError(
        f"{flag} {address}: the port is in use{user_of(_split(address)[1])}: stop what listens there, or give another "
        "one"
    )
