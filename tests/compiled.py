"""`make compiled-test` runs this first: are the modules under test the compiled ones?"""

import importlib
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", PROJECT["tool"]["groundserve"]["compiled"])
def test_the_module_is_compiled(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    assert str(module.__file__).endswith(".so")
