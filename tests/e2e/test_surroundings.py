"""Replicas come up whatever their surroundings say; the pair that the other tests use was started in bad ones."""

from pathlib import Path

from tests.e2e.conftest import SURROUNDINGS
from tests.e2e.running import Replica


def test_foreign_surroundings(replicas: list[Replica]) -> None:
    """Replicas serve with environment variables that were meant for other programs."""
    for replica, around in zip(replicas, SURROUNDINGS, strict=True):
        assert replica.is_ready()
        lines = Path(f"/proc/{replica.process.pid}/environ").read_text().split("\0")
        has = dict(line.split("=", 1) for line in lines if "=" in line)
        assert set(around) <= set(has)
        assert "127.0.0.1" in has["no_proxy"].split(",")
        assert Path(has["HOME"]).is_dir()
        assert Path(has["TMPDIR"]).is_dir()
        assert has["HOME"] != "/proc"


def test_each_has_a_temporary_folder_of_its_own(replicas: list[Replica]) -> None:
    folders = {
        line
        for replica in replicas
        for line in Path(f"/proc/{replica.process.pid}/environ").read_text().split("\0")
        if line.startswith("TMPDIR=")
    }
    assert len(folders) == 2
