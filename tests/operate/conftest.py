from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.operate.command_line import Groundserve


@pytest.fixture
def groundserve(tmp_path: Path) -> Iterator[Groundserve]:
    command = Groundserve(tmp_path)
    yield command
    command.stop_all()
