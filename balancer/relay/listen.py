"""The sockets that the process listens on, and the servers behind them."""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from balancer.errors import ConfigError
from balancer.relay.doors import Doors
from balancer.relay.downstream import ClientConnection
from balancer.relay.tls_listener import TlsListener
from balancer.relay.vanished import expect_life

BACKLOG = 4096

Listener = asyncio.Server | TlsListener


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the app decides the order of shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server(app: Any, http: Any) -> Server:
    """A server for an ASGI app; `http` makes its connections."""
    config = uvicorn.Config(
        app,
        http=http,
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
    )
    return Server(config)


async def accept(doors: Doors, listener: socket.socket, context: ssl.SSLContext | None) -> Listener:
    """Accepts the endpoint's clients, over TLS if there is a `context`, until it is closed."""
    if context is None:
        return await doors.loop.create_server(lambda: ClientConnection(doors), sock=listener, backlog=BACKLOG)
    return TlsListener(doors, listener, context)


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError with a one-line reason if there cannot be one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            expect_life(listener)
            listener.bind(address)
            listener.listen(BACKLOG)  # claims the port now: uvloop would not report that another process was quicker
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another address or port") from None
    listener.setblocking(False)
    return listener


def handed_over(descriptor: int, flag: str) -> socket.socket:
    """The listening socket that our parent process hands to us; raises ConfigError if the descriptor is not one.

    It stays open in the parent, so clients that connect while no balancer accepts wait there instead of being refused.
    """
    try:
        listener = socket.socket(fileno=descriptor)
    except (OSError, ValueError):
        raise ConfigError(f"{flag} {descriptor}: no socket was handed over by that number") from None
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise ConfigError(f"{flag} {descriptor}: the socket that was handed over does not listen")
    listener.set_inheritable(False)
    listener.setblocking(False)
    expect_life(listener)
    return listener


def url_of(listener: socket.socket, is_tls: bool = False) -> str:
    """The URL at which clients reach this socket."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def reachable(endpoint: str) -> str:
    """The URL at which this process itself reaches the endpoint: 0.0.0.0 and :: are not addresses to connect to."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def raise_file_limit() -> None:
    """A request takes two descriptors, and many systems allow a process 1,024 unless it raises its own limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if 0 < most < enough else enough, most))
