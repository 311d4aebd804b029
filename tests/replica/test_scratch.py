"""replica/scratch.py: what a replica leaves lying is removed by the next one, and by none before it has ended."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replica.scratch import take

ROOT = Path(__file__).resolve().parents[2]
# As a replica does: takes a folder, becomes another program, and leaves files there and elsewhere.
HOLD = """
import os, sys
from pathlib import Path
from replica.scratch import ELSEWHERE, take
folder = take(Path(sys.argv[1]))
(folder / "left").touch()
(folder / f"{ELSEWHERE}one").symlink_to(sys.argv[2])
print(folder, flush=True)
os.execv("/bin/sh", ["sh", "-c", "read line"])
"""


@contextmanager
def replica(parent: Path, elsewhere: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", HOLD, str(parent), str(elsewhere)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip()), process
        process.kill()


def test_folder_lives_as_long_as_its_replica(tmp_path: Path) -> None:
    """A folder stays while its replica lives, and is removed at the next start."""
    elsewhere = tmp_path / "in shared memory"
    elsewhere.touch()
    parent = Path("/tmp") / f"gs-{tmp_path.name[-8:]}"
    parent.mkdir()
    try:
        with replica(parent, elsewhere) as (first, process):
            second = take(parent)
            assert second is not None
            assert second != first
            assert (first / "left").exists()
            assert elsewhere.exists()
            process.kill()
            process.wait()
            third = take(parent)
            assert third is not None
            assert not first.exists()
            assert not elsewhere.exists()
            assert second.exists()
            assert list(third.iterdir()) == []
    finally:
        subprocess.run(["rm", "-r", str(parent)], check=True)


def test_what_others_have_there_is_left_alone(tmp_path: Path) -> None:
    parent = Path("/tmp") / f"gs-{tmp_path.name[-8:]}"
    parent.mkdir()
    try:
        (parent / "groundserve-scratch-link").symlink_to(tmp_path)
        (parent / "groundserve-scratch-file").touch()
        (parent / "other").mkdir()
        assert take(parent) is not None
        assert (parent / "groundserve-scratch-link").is_symlink()
        assert (parent / "groundserve-scratch-file").exists()
        assert (parent / "other").exists()
        assert tmp_path.exists()
    finally:
        subprocess.run(["rm", "-r", str(parent)], check=True)


def test_no_folder_where_none_can_be(tmp_path: Path) -> None:
    """There is no scratch folder where socket paths would be too long or nothing can be created."""
    (tmp_path / ("long" * 20)).mkdir()
    assert take(tmp_path / ("long" * 20)) is None
    assert take(Path("/no/such/folder")) is None
    assert take(Path("/proc")) is None
