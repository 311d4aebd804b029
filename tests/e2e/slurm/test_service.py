"""A service on a real Slurm, from its start to its end."""

import pytest

from tests.e2e.slurm.served import ENDPOINT, Served
from tests.operate.streaming import streaming

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_up_serves_from_two_nodes(served: Served) -> None:
    said = served.up(served.file(replicas=4))
    assert "is up after" in said
    rows = served.until_ready(4)["replicas"]
    assert sorted(row["node"] for row in rows) == ["h1", "h1", "h2", "h2"]
    assert {row["infra"] for row in rows} == {"slurm (gpu)"}
    with streaming(ENDPOINT, clients=8) as seen:
        pass
    assert seen.failed == []
