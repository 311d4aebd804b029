"""The sockets that the process listens on."""

import socket

import pytest

from balancer.errors import ConfigError
from balancer.relay.listen import listening


def test_a_port_is_one_process_own_before_anything_else_is_done() -> None:
    """Of two that are started at once, the second says so; it must not go on with a port that it does not have."""
    with listening("127.0.0.1", 0) as ours, socket.socket() as theirs:
        host, port = ours.getsockname()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            theirs.bind((host, port))
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*in use; choose another"):
            listening(host, port)


def test_who_had_only_bound_it_does_not_get_it() -> None:
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        theirs.bind(("127.0.0.1", 0))
        with listening("127.0.0.1", theirs.getsockname()[1]), pytest.raises(OSError, match="in use"):
            theirs.listen()
