"""What the machine's own resolver makes of a real name server's answers, in a network of the test's own."""

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fleet.name_server import MANY
from tests.support.needed import lacking

UNSHARE = ["unshare", "--map-root-user", "--net", "--mount"]
ROOT = Path(__file__).parents[2]


@functools.cache
def resolved() -> dict[str, list[str] | str]:
    """What resolve says of each name, asked in one go."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        lacking("this machine lets no test have a network of its own (unshare --map-root-user --net --mount)")
    names = ["one.test", "both.test", "six.test", "many.test", "nodata.test", "gone.test", "broken.test", "silent.test"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*UNSHARE, sys.executable, "-m", "tests.fleet.name_server", folder, *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str] | str] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("one.test", ["10.0.0.1"]),
        ("both.test", ["10.0.0.1", "10.0.0.2", "fd00::1"]),
        ("six.test", ["fd00::2"]),
        ("many.test", sorted(MANY)),
    ],
)
def test_all_records_are_found(name: str, addresses: list[str]) -> None:
    """All records are found, of both address families, even if they do not fit into a datagram."""
    assert resolved()[name] == addresses


@pytest.mark.parametrize("name", ["gone.test", "nodata.test"])
def test_a_name_without_records_is_an_answer_without_addresses(name: str) -> None:
    assert resolved()[name] == []


@pytest.mark.parametrize("name", ["broken.test", "silent.test"])
def test_a_name_server_that_fails_or_says_nothing_is_an_error(name: str) -> None:
    assert resolved()[name] == "gaierror"
