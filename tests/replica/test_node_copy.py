from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from replica import node_copy
from replica.node_copy import Copied, on_this_node

NOTHING: Mapping[str, str] = MappingProxyType({})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "some-model"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "weights").write_bytes(b"w" * 1000)
    return folder


def copied(model: str | Path, here: Path, envs: Mapping[str, str] = NOTHING) -> tuple[Copied, list[str]]:
    said: list[str] = []
    argv = ["python", "-m", "replica", "--model", str(model), "--port", "1"]
    return on_this_node(argv, envs, str(here), said.append), said


def test_a_folder_is_copied_once_and_used_from_there(model: Path, tmp_path: Path) -> None:
    first, said = copied(model, tmp_path / "disk")
    copy = Path(first.argv[4])
    assert copy.is_relative_to(tmp_path / "disk")
    assert (copy / "inner" / "weights").read_bytes() == b"w" * 1000
    assert first.argv[5:] == ("--port", "1")
    assert "fetching some-model" in said[0]
    assert copied(model, tmp_path / "disk") == (first, [])


def test_a_model_that_changed_is_copied_anew(model: Path, tmp_path: Path) -> None:
    first, _ = copied(model, tmp_path / "disk")
    (model / "config.json").write_text('{"a": 1}')
    second, _ = copied(model, tmp_path / "disk")
    assert (Path(second.argv[4]) / "config.json").read_text() == '{"a": 1}'
    assert second.argv[4] != first.argv[4]


def test_a_copy_that_broke_off_is_made_anew(model: Path, tmp_path: Path) -> None:
    first, _ = copied(model, tmp_path / "disk")
    copy = Path(first.argv[4])
    (copy.parent / node_copy._WHOLE).unlink()
    (copy / "inner" / "weights").unlink()
    again, said = copied(model, tmp_path / "disk")
    assert again == first
    assert said
    assert (copy / "inner" / "weights").exists()


def test_a_model_of_the_hub_keeps_its_layout(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "abc").write_text("weights")
    (repo / "snapshots" / "1").mkdir(parents=True)
    (repo / "snapshots" / "1" / "model").symlink_to("../../blobs/abc")
    made, _ = copied("org/name", tmp_path / "disk", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert made.argv[4] == "org/name"
    there = Path(made.envs["HF_HUB_CACHE"]) / "models--org--name" / "snapshots" / "1" / "model"
    assert there.is_symlink()
    assert there.read_text() == "weights"


def test_a_folder_that_others_may_write_to_is_not_used(model: Path, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    disk.chmod(0o777)
    made, said = copied(model, disk)
    assert made.argv[4] == str(model)
    assert "others may write to" in said[0]


def test_a_full_disk_leaves_the_model_where_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copy, "_SPARE", 1 << 60)
    made, said = copied(model, tmp_path / "disk")
    assert made.argv[4] == str(model)
    assert "free" in said[0]


def test_what_is_no_folder_is_left_alone(tmp_path: Path) -> None:
    made, said = copied("org/never-fetched", tmp_path / "disk", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert (made.argv[4], said) == ("org/never-fetched", [])
    assert on_this_node(["bash", "-c", "run"], {}, str(tmp_path), said.append).argv == ("bash", "-c", "run")


def test_a_folder_whose_links_lead_out_of_it_is_copied_whole(tmp_path: Path) -> None:
    """As a snapshot in the hub's cache is, given by its path."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "weights").write_text("w")
    (snapshot / "weights").symlink_to("../../../weights")
    first, _ = copied(snapshot, tmp_path / "disk")
    assert (Path(first.argv[4]) / "weights").read_text() == "w"


def test_what_lies_in_a_folder_of_others_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    (tmp_path / "disk" / "hub").mkdir(mode=0o700, parents=True)
    (tmp_path / "disk").chmod(0o777)
    found, said = copied("org/name", tmp_path / "disk", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert found.envs["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert "others may write" in said[0]
