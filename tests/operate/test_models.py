"""`groundserve models remove`: it knows which models the services here use."""

import shutil
from pathlib import Path

import pytest

from balancer.operate.commands.models import used
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import ServiceFolder
from tests.operate.command_line import Groundserve
from tests.operate.meant import desired

SGLANG = "python -m sglang.launch_server --model-path {} --speculative-draft-model-path=org/draft --port 8000"


def meant(folder: Path, name: str, **changed: object) -> ServiceFolder:
    """A service that is meant to exist there."""
    one = ServiceFolder(folder / "state/groundserve", name)
    with one.claim():
        one.write_desired(desired(**{"base": str(folder), "serving": 1, **changed}))
    return one


def version(number: int, run: str, **envs: str) -> Version:
    text = f"envs: {{MODEL: org/default}}\nservice: {{replicas: 1, readiness_probe: /health}}\nrun: |\n  {run}\n"
    return Version(number, text, "x.yaml", envs, ())


@pytest.fixture
def cache(groundserve: Groundserve) -> Path:
    """Two models there."""
    cache = groundserve.folder / "hub"
    groundserve.environ |= {"HF_HUB_CACHE": str(cache), "MODELS_DIR": str(groundserve.folder / "embedded")}
    for name in ("one", "two"):
        (blobs := cache / f"models--org--{name}/blobs").mkdir(parents=True)
        (blobs / "abc").write_bytes(b"x" * 1_000_000)
    return cache


def test_what_services_use_is_removed_by_force_only(groundserve: Groundserve, cache: Path) -> None:
    meant(groundserve.folder, "mine", versions=(version(1, SGLANG.format("org/one")),))
    said = groundserve("models", "remove", "org/two", "org/one", code=1)
    assert "groundserve: org/one is used by mine" in said
    assert len(list(cache.glob("models--*"))) == 2
    assert "org/two is removed: 1.0 MB" in groundserve("models", "remove", "org/two")
    assert "org/two is not here: here are org/one" in groundserve("models", "remove", "org/two", code=1)
    assert "org/one is removed: 1.0 MB" in groundserve("models", "remove", "--force", "org/one")
    assert groundserve("models").split() == ["MODEL", "SIZE", "STATE"]


@pytest.mark.parametrize(
    ("changed", "models", "others"),
    [
        ({"versions": (version(1, SGLANG.format("$MODEL")),)}, {"org/default", "org/draft"}, set()),
        ({"versions": (version(1, SGLANG.format("$MODEL"), MODEL="org/b"),)}, {"org/b", "org/draft"}, {"org/default"}),
        ({"versions": (version(1, "exec my-server 'org/a' --also=org/b"),)}, {"org/a", "org/b", "org/default"}, set()),
        ({"versions": (version(1, "x org/a"), version(2, "x org/b")), "serving": 2}, {"org/b"}, {"org/a"}),
        ({"versions": (version(1, "x org/a"), version(2, "x org/b")), "coming": 2}, {"org/a", "org/b"}, set()),
        ({"versions": (Version(1, "no: service\nrun: org/a", "x.yaml", {}, ()),)}, {"org/a"}, set()),
    ],
    ids=["default", "given", "script", "earlier", "coming", "unreadable"],
)
def test_a_service_uses_what_its_file_names(
    tmp_path: Path, changed: dict[str, object], models: set[str], others: set[str]
) -> None:
    meant(tmp_path, "mine", **changed)
    (words,) = used(tmp_path / "state/groundserve").values()
    assert models <= set(words)
    assert not others & set(words)


def test_one_that_is_down_uses_nothing(tmp_path: Path) -> None:
    one = meant(tmp_path, "mine", versions=(version(1, "x org/a"),))
    assert used(tmp_path / "state/groundserve")
    one.remove_desired()
    assert used(tmp_path / "state/groundserve") == {}
    shutil.rmtree(tmp_path / "state")
    assert used(tmp_path / "state/groundserve") == {}
