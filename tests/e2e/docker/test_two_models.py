"""Two models behind one endpoint, each in containers of its own."""

from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.docker.conftest import LAB_FILES
from tests.e2e.docker.project import Project
from tests.support.until import wait_until

pytestmark = pytest.mark.docker

FILES = (*LAB_FILES, "docker/compose.two-models.yaml", "tests/e2e/docker/compose.two-labs.yaml")
BODY = {"max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def two(lab_images: Project) -> Iterator[Project]:
    assert lab_images.files == LAB_FILES
    project = Project("groundserve-test-two", FILES, {"MODEL_2": "lab/other", "NAME_2": "other"})
    project.up()
    yield project
    project.down()


def test_requests_go_by_their_model(two: Project) -> None:
    with httpx.Client(base_url=two.url(), timeout=20) as client:

        def listed() -> set[str]:
            data = client.get("/v1/models").json()["data"]
            return {entry["id"] for entry in data if entry["status"] == "READY"}

        assert wait_until(listed, "both are ready", fits=lambda ids: ids >= {"lab", "lab/other"}) == {
            "lab", "first", "lab/other", "other",
        }  # fmt: skip
        members = {
            model: client.post("/v1/chat/completions", json=BODY | {"model": model}).headers["x-replica-id"]
            for model in ("lab", "first", "lab/other", "other")
        }
        assert members["lab"] == members["first"] == two.containers("replica")[0].member
        assert members["lab/other"] == members["other"] == two.containers("replica-2")[0].member
        assert client.post("/v1/chat/completions", json=BODY | {"model": "none"}).status_code == 404
