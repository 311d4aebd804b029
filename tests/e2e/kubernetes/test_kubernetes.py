"""A service on a real Kubernetes, whose replicas are simulated: nothing is lost but what the design says."""

from contextlib import ExitStack

import pytest

from tests.e2e.kubernetes.served import FLAGS, NAME, Served
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
