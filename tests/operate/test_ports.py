import json
import os
import socket
from pathlib import Path

import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.ports import REPLICA_PORTS, free_ports, is_free
from tests.support.program import printed

OURS = range(22000, 23000)  # no other test takes ports of these, so none is given or listened on meanwhile


def test_free_ports() -> None:
    """Free ports are distinct, and below the range that the kernel assigns by itself."""
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert set(ports) <= set(REPLICA_PORTS)
    assert max(REPLICA_PORTS) < 32768


def test_a_port_that_is_listened_on_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.socket() as two:
        taken = one.getsockname()[1]
        two.bind(("127.0.0.1", 0))
        free = two.getsockname()[1]
        two.close()
        assert not is_free("127.0.0.1", taken)
        assert free_ports(1, [taken, free]) == [free]


def test_what_another_process_was_given_is_chosen_last() -> None:
    """Two services that start at once choose different ports, though nothing listens on any of them yet."""
    few = free_ports(6, OURS)
    others = free_in_another_process(3, [port for port in OURS if port not in few])
    assert set(free_in_another_process(3, few + others)) == set(others)
    assert set(free_in_another_process(6, few)) == set(few)


def free_in_another_process(count: int, among: list[int]) -> list[int]:
    code = f"from balancer.operate.engines.ports import free_ports; print(free_ports({count}, {among}))"
    said: list[int] = json.loads(printed("-c", code, environ=os.environ))
    return said


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_more_than_a_few_are_held() -> None:
    """A controller that starts replicas again for weeks does not run out of descriptors."""
    free_ports(200)
    before = descriptors()
    free_ports(200)
    assert descriptors() == before


def test_too_few_free_ports_are_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"1 free ports are needed and {taken}-{taken} has 0: stop what listens"):
            free_ports(1, [taken])


@pytest.mark.parametrize(
    ("host", "said"), [("192.0.2.1", "it is no address of this machine"), ("nowhere.invalid", "cannot listen on")]
)
def test_an_address_that_is_not_ours_is_said(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        is_free(host, 8000)
