"""A service on a real Kubernetes, whose replicas are simulated: nothing is lost but what the design says."""

import signal
from contextlib import ExitStack

import pytest

from tests.e2e.kubernetes.served import FLAGS, NAME, Served
from tests.lab.hosts import Hosts
from tests.lab.kubernetes.control_plane import ControlPlane
from tests.operate.streaming import Streams, streaming
from tests.support.until import wait_until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def streams_at_all(stack: ExitStack, served: Served, clients: int = 2) -> list[Streams]:
    """Clients of each balancer, for as long as the stack is open."""
    return [stack.enter_context(streaming(url, clients, BODY)) for url in served.endpoints()]


def test_up_scale_and_down_under_streams(served: Served) -> None:
    served.up()
    rows = served.until_ready(2)
    assert {row["node"] for row in rows} <= {"h1", "h2"}
    assert len(served.endpoints()) == 2
    assert rows[0]["leased"].startswith("GPU 0 (L4, ")
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        served("scale", NAME, "4")
        assert {row["node"] for row in served.until_ready(4)} == {"h1", "h2"}
        served("scale", NAME, "6")
        status = wait_until(
            served.status,
            within=120,
            fits=lambda s: sum("Insufficient" in row.get("reason", "") for row in s["replicas"]) == 2,
        )
        assert len([row for row in status["replicas"] if row["status"] == "READY"]) == 4
        served("scale", NAME, "2")
        served.until_ready(2)
        assert len(served.cluster.pods("replica")) == 2
    assert [one.failed for one in clients] == [[], []]
    assert "lab is down" in served("down", NAME)
    assert served.cluster.pods("replica") + served.cluster.pods("balancer") == []


def test_an_update_loses_no_stream(served: Served) -> None:
    served.up()
    served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        assert "is at version 2" in served("update", NAME, served.file(flags=f"{FLAGS} --served-model other"))
        assert {row["version"] for row in served.until_ready(2)} == {2}
    assert [one.failed for one in clients] == [[], []]


def test_streams_go_on_when_a_node_dies(served: Served, hosts: Hosts, cluster: ControlPlane) -> None:
    """Those of its replicas continue elsewhere; others take their place, which wait until it is back."""
    served.up(served.file(4))
    assert [row["node"] for row in served.until_ready(4)].count("h2") == 2
    balancers = {pod["spec"]["nodeName"]: pod["status"]["podIP"] for pod in cluster.pods("balancer")}
    with streaming(f"http://{balancers['h1']}:30001", 4, BODY) as client:
        hosts["h2"].power_off()
        wait_until(
            served.status,
            within=240,
            fits=lambda s: sum("Insufficient" in row.get("reason", "") for row in s["replicas"]) == 2,
        )
        assert {row["node"] for row in served.ready()} == {"h1"}
    assert client.failed == []
    hosts["h2"].power_on()
    cluster.join("h2")
    cluster.wait_for("h2")
    assert {row["node"] for row in served.until_ready(4)} == {"h1", "h2"}


def test_a_killed_controller_is_followed_by_the_next(served: Served) -> None:
    first = served.up()
    rows = served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        first.signal(signal.SIGKILL)
        first.wait()
        second = served.up()
        assert "found 2 of its replicas running" in second.text
        assert {row["name"] for row in served.until_ready(2)} == {row["name"] for row in rows}
    assert [one.failed for one in clients] == [[], []]
