"""Who may do what: keys, TLS, and the admin port of the containers."""

import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.docker.conftest import LAB_FILES
from tests.e2e.docker.project import Project, docker

pytestmark = pytest.mark.docker

BODY = {"model": "any", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Keys, and a certificate for localhost, as files that the container's user can read."""
    (tmp_path / "api-keys").write_text("a-caller:" + "0" * 64 + "\nsesame\n")
    (tmp_path / "admin-key").write_text("open-up\n")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    files = ("-keyout", tmp_path / "privkey.pem", "-out", tmp_path / "fullchain.pem")
    subprocess.run(["openssl", "req", *kind, *names, *files], check=True, capture_output=True)
    for file in tmp_path.iterdir():
        file.chmod(0o644)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    return tmp_path


@pytest.fixture
def guarded(lab_images: Project, folder: Path) -> Iterator[Project]:
    given = {
        "TLS_DIR": str(folder),
        "API_KEYS_FILE": str(folder / "api-keys"),
        "ADMIN_KEY_FILE": str(folder / "admin-key"),
    }
    assert lab_images.files == LAB_FILES
    project = Project("groundserve-test-doors", (*LAB_FILES, "docker/compose.tls.yaml"), given)
    project.up()
    yield project
    project.down()


def test_https_with_keys_and_an_admin_port_that_wants_its_own(guarded: Project, folder: Path) -> None:
    endpoint = guarded.url().replace("http://", "https://") + "/v1/chat/completions"
    trust = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    with httpx.Client(verify=trust, timeout=20) as client:
        assert client.post(endpoint, json=BODY).status_code == 401
        answer = client.post(endpoint, json=BODY, headers={"Authorization": "Bearer sesame"})
        assert answer.status_code == 200, answer.text
        drain = guarded.url(30002) + "/replicas/1/drain"
        assert client.post(drain).status_code == 401
        assert client.post(drain, headers={"Authorization": "Bearer open-up"}).status_code == 200


@pytest.mark.parametrize("mounted", ["folder", "file"])
def test_a_key_that_an_editor_takes_out_stops_working(lab_images: Project, folder: Path, mounted: str) -> None:
    assert lab_images.files == LAB_FILES
    keys = folder / "api-keys"
    keys.write_text("old-key-11111111\nkept-key-2222222\n")
    ways = {
        "folder": (("docker/compose.keys.yaml",), {"KEYS_DIR": str(folder), "KEYS": keys.name}),
        "file": ((), {"API_KEYS_FILE": str(keys)}),
    }
    overlays, given = ways[mounted]
    project = Project("groundserve-test-keys", (*LAB_FILES, *overlays), given)

    def status(key: str) -> int:
        return httpx.get(
            project.url() + "/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=20
        ).status_code

    try:
        project.up()
        assert [status("old-key-11111111"), status("kept-key-2222222")] == [200, 200]
        subprocess.run(["sed", "-i", "/old-key/d", str(keys)], check=True)  # writes a new file under the old name
        give_up = time.monotonic() + 10
        while status("old-key-11111111") != 401:
            assert time.monotonic() < give_up
            time.sleep(0.2)
        # Of a single file the container never sees what replaced it, so no key can be trusted there.
        assert status("kept-key-2222222") == (200 if mounted == "folder" else 401)
    finally:
        project.down()


def test_admin_port_without_a_key(lab: Project) -> None:
    """Without an admin key, the admin port shows the status and changes nothing."""
    assert len(lab.ready()) == 2
    refused = httpx.post(lab.url(30002) + "/replicas/1/drain", timeout=10)
    assert refused.status_code == 403
    assert "--admin-key" in refused.json()["error"]["message"]
    assert len(lab.ready()) == 2
    for port, path in ((30001, "/v1/models"), (30002, "/status")):
        answer = httpx.get(lab.url(port) + path, headers={"Host": "evil.example"}, timeout=10)
        assert answer.status_code == 403, "a name that was made to point here"


def test_a_token_is_shown_by_no_inspect(lab_images: Project, folder: Path) -> None:
    """Given in the environment or as a file, it comes to the replica and is no variable of the container."""
    assert lab_images.files == LAB_FILES
    project = Project("groundserve-test-token", LAB_FILES)
    (folder / "token").write_text("hush-2\n")
    (folder / "token").chmod(0o644)
    ask = "import os; from replica.options import token; print(token(os.environ))"
    given = ({"HF_TOKEN": "hush$1"}, {"HF_TOKEN_FILE": str(folder / "token")}, {"HF_TOKEN": ""})
    try:
        for environ, token in zip(given, ("hush$1", "hush-2", "None"), strict=True):
            project.compose("up", "-d", "--no-deps", "--force-recreate", "replica", **environ)
            (replica,) = project.containers()
            assert docker("exec", replica.id, "python3", "-c", ask).strip() == token
            assert "hush" not in docker("inspect", replica.id)
        services = json.loads(project.compose("--profile", "pull", "config", "--format", "json", **given[0]))[
            "services"
        ]
        assert services["pull"]["configs"] == services["replica"]["configs"]
        assert not services["pull"].get("read_only"), "Compose copies nothing into one that is"
    finally:
        project.down()
